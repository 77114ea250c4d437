"""The base of every settings object: typed, immutable, strict about unknown fields."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MOST_SEED = 2**32 - 1  # as Optuna's samplers take; of torch's 64 bits, enough are left to mix in step and rank
Seed = Annotated[int, Field(ge=0, le=MOST_SEED)]


class Settings(BaseModel):
    """Immutable settings; a field that does not exist is an error, never ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

"""The base of every settings object: typed, immutable, strict about unknown fields."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Immutable settings; a field that does not exist is an error, never ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

"""The training loop."""

from typing import Literal

from pydantic import Field

from iaml import Settings

BatchNorm = Literal["global", "worker"]


class TrainSettings(Settings):
    """The training loop, counted in optimizer steps."""

    steps: int = Field(ge=1, description="optimizer steps in all")
    global_batch: int = Field(8, ge=1, description="pairs in one optimizer step, over all workers")
    accumulation: int = Field(1, ge=1, description="forward passes that make up one optimizer step on each worker")
    batch_norm: BatchNorm = Field(
        "global",
        description="whose pairs batch normalisation spans in a forward pass: those of all workers, so that their "
        "number changes nothing but rounding; or each worker's own, which spares two exchanges for each layer, wants "
        "many pairs on each worker, and makes the number of workers matter",
    )
    log_every: int = Field(50, ge=1, description="steps between two lines of progress")
    nonfinite_limit: int = Field(
        10, ge=1, description="skipped steps in a row, for a non-finite loss, before the run stops"
    )

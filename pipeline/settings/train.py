"""The training loop."""

from pydantic import Field

from iaml import Settings


class TrainSettings(Settings):
    """The training loop, counted in optimizer steps."""

    steps: int = Field(ge=1, description="optimizer steps in all")
    global_batch: int = Field(8, ge=1, description="pairs in one optimizer step, over all workers")
    accumulation: int = Field(1, ge=1, description="forward passes that make up one optimizer step on each worker")
    log_every: int = Field(50, ge=1, description="steps between two lines of progress")
    nonfinite_limit: int = Field(
        10, ge=1, description="skipped steps in a row, for a non-finite loss, before the run stops"
    )

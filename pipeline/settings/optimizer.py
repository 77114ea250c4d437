"""The optimizer, its schedule and its precision."""

import math
from typing import Self

from pydantic import Field, field_validator, model_validator

from iaml import Precision, Settings


class OptimizerSettings(Settings):
    """The optimizer (Adam), its schedule and its precision."""

    learning_rate: float = Field(2e-4, gt=0, description="peak learning rate")
    final_learning_rate: float = Field(1e-7, ge=0, description="learning rate at the end of the cosine")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up before the cosine")
    betas: tuple[float, float] = Field((0.9, 0.999), description="decay rates of Adam's two moments")
    clip: float = Field(
        0.0, ge=0, description="largest gradient norm; larger gradients are scaled to it; 0 is no limit"
    )
    precision: Precision = Field(
        "auto",
        description="bf16 runs the networks under autocast; weights, losses and the average stay float32; auto is bf16 "
        "where all workers' processors multiply it fast, else float32, so name one where a run is to resume on others",
    )
    zero_stage: int = Field(
        0,
        ge=0,
        description="DeepSpeed ZeRO stage: 0 shards nothing, which is fastest for a network of this size; 1 shards the "
        "optimizer state, 2 the gradients as well",
    )
    channels_last: bool = Field(True, description="lay feature maps out with channels last, which is faster")

    @field_validator("zero_stage")
    @classmethod
    def _stage_3_cannot_feed_the_average(cls, stage: int) -> int:
        if stage > 2:
            raise ValueError(
                "must be 0, 1 or 2: stage 3 shards the weights, which the teacher's average and its shared encoder "
                "read whole at every step, and a network of 10 M parameters gains nothing from it"
            )
        return stage

    @model_validator(mode="after")
    def _rates_fall(self) -> Self:
        if self.final_learning_rate > self.learning_rate:
            raise ValueError(f"final_learning_rate must not exceed learning_rate ({self.learning_rate})")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1): {list(self.betas)}")
        return self

    def rate_at(self, step: int, steps: int) -> float:
        """The learning rate of step ``step`` (from 0) of ``steps``: linear warm-up, then a cosine."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return self.final_learning_rate + (self.learning_rate - self.final_learning_rate) * cosine

"""When checkpoints are written, which are kept, and which is the best."""

import math
from typing import Literal

from pydantic import Field, field_validator

from iaml import Settings


class CheckpointSettings(Settings):
    """When checkpoints are written and which are kept; all are scored on the development split."""

    every: int = Field(1000, ge=1, description="steps between checkpoints; the last step always writes one")
    keep_last: int = Field(3, ge=1, description="newest checkpoints whose weights are kept")
    keep_best: int = Field(3, ge=1, description="best checkpoints whose weights are kept")
    metric: Literal["psnr", "ssim", "lpips"] = Field("psnr", description="score that ranks checkpoints")
    network: Literal["student", "averaged"] = Field("student", description="whose score ranks checkpoints")
    split: Literal["dev", "test"] = Field("dev", description="split whose scores rank checkpoints; test is refused")

    @field_validator("split")
    @classmethod
    def _test_split_does_not_choose(cls, split: str) -> str:
        if split == "test":
            raise ValueError(
                "checkpoints are not chosen by the test split: the best of 150 evaluations on the scored images "
                "is biased upwards by 0.3 to 1.6 dB; leave it at dev, and score the chosen checkpoint once, at the "
                "end, with pipeline/evaluate.py --split test"
            )
        return split

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger score is the better one."""
        return self.metric != "lpips"

    def sort_key(self, score: float, step: int) -> tuple[bool, float, int]:
        """Sorts checkpoints best first; of equal scores the newest comes first, what is not a number last."""
        if math.isnan(score):
            return True, 0.0, -step
        return False, -score if self.higher_is_better else score, -step

    @property
    def ranking(self) -> str:
        """What the ranking score is called where it is shown."""
        return f"{self.split}_{self.network}_{self.metric}"

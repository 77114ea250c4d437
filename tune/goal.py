"""What a search improves: a metric, or a weighted sum of metrics, of the chosen checkpoint on the development split."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.reporting.tables import FORMATS

BETTER: Mapping[str, Literal["maximize", "minimize"]] = {"psnr": "maximize", "ssim": "maximize", "lpips": "minimize"}
TERM = re.compile(r"\s*(?P<sign>[+-])?\s*(?:(?P<factor>\d+\.?\d*(?:e[+-]?\d+)?)\s*\*?\s*)?(?P<metric>[a-z]+)\s*")
Values = tuple[float, ...]


@dataclass(frozen=True)
class Goal:
    """One goal of a search.

    Attributes:
        text: as the user wrote it.
        factors: of each metric in the sum.
        direction: in which it improves; sums improve upwards.
    """

    text: str
    factors: Mapping[str, float]
    direction: Literal["maximize", "minimize"]

    @classmethod
    def parse(cls, text: str) -> "Goal":
        """Read ``psnr``, ``ssim``, ``lpips`` or a sum such as ``psnr + 10 ssim - 20 lpips``.

        Raises:
            ValueError: it is neither, or the sum would improve by a worse score.
        """
        factors: dict[str, float] = {}
        place = 0
        while place < len(text) or not factors:
            term = TERM.match(text, place)
            if not term or term["metric"] not in BETTER or term["metric"] in factors or (factors and not term["sign"]):
                raise ValueError(
                    f"{text!r}: must be a metric ({', '.join(BETTER)}) or a sum of some, such as psnr - 20 lpips"
                )
            factors[term["metric"]] = float(f"{term['sign'] or '+'}{term['factor'] or 1}")
            place = term.end()
        if text.strip() in BETTER:
            return cls(text.strip(), factors, BETTER[text.strip()])
        for metric, factor in factors.items():
            if not 0 < abs(factor) < math.inf or (factor > 0) != (BETTER[metric] == "maximize"):
                what = "subtracted" if BETTER[metric] == "minimize" else "added"
                raise ValueError(f"{text!r}: a sum improves upwards, so {metric} must be {what}")
        return cls(" ".join(text.split()), factors, "maximize")

    def value(self, scores: Mapping[str, float]) -> float:
        """Its value for the mean ``scores`` of a checkpoint, by metric."""
        return sum(factor * scores[metric] for metric, factor in self.factors.items())

    def format_value(self, value: float, sign: Literal["", "+"] = "") -> str:
        """A value of it as text: a metric as in tables of scores, a sum with four digits; ``+`` shows signs always."""
        return format(value, sign + (FORMATS[self.text][1] if self.text in FORMATS else ".4g"))


def dominates(one: Values, other: Values, objectives: Sequence[Goal]) -> bool:
    """Whether ``one`` is better by some objective and worse by none."""
    signs = [1 if objective.direction == "maximize" else -1 for objective in objectives]
    gains = [sign * (mine - theirs) for sign, mine, theirs in zip(signs, one, other, strict=True)]
    return min(gains) >= 0 and max(gains) > 0

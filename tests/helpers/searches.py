"""A search without training, for tests of what is made of its trials."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tune.settings import SearchConfig
from tune.study import Study

EVERY_RANGE = {"beta": [0.1, 1.0], "mirror_weight": [0.1, 2.0], "learning_rate": [1e-5, 1e-3]}  # beside the usual


class PlayedSearch:
    """A study in which trials are played."""

    def __init__(self, folder: Path, **search: Any) -> None:
        self.config = SearchConfig.model_validate(
            {
                "run": {"name": "s", "root": str(folder)},
                "data": {"url": "/data"},
                "train": {"steps": 900},
                "checkpoint": {"every": 100},
                "search": {"trials": 14, "sampler": "random"} | search,
            }
        )
        (folder / "s-search").mkdir()
        self.study = Study(self.config, ["checksum"])

    def play(
        self, psnr: Sequence[float] = (), end: str | None = "finish", ssim: float = 0.5, lpips: float | None = 0.25
    ) -> Mapping[str, float]:
        """A trial with these PSNRs at steps 100, 200, ...; SSIM and LPIPS get 0.01 better each time.

        Its parameters; ``end`` is how it ends, none leaves it running.
        """
        number, parameters = self.study.next()
        for index, value in enumerate(psnr):
            scores = {"psnr": value, "ssim": ssim + index / 100}
            if lpips is not None:
                scores["lpips"] = lpips - index / 100
            self.study.record(number, 100 * (index + 1), scores)
        if end == "fail":
            self.study.fail(number, "out of memory")
        elif end:
            getattr(self.study, end)(number)
        return parameters


def proportions(parameters: Mapping[str, float]) -> list[float]:
    """The scale weights that a trial's parameters stand for."""
    drawn = [parameters[f"scale_{scale}"] for scale in (1, 2, 3, 4)]
    return [share / sum(drawn) for share in drawn]

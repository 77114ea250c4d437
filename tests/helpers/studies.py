"""Studies of searches, and scores to record in them."""

import optuna

from tune.settings import VARIED, SearchConfig
from tune.study import Study

RUNGS = (100, 300)  # of 900 steps, a checkpoint each 100, reduction 3

RANGES = dict.fromkeys(VARIED) | {"gamma": (0.25, 4.0), "ema_rate": (0.9, 0.9999)}


def scores(psnr=20.0, ssim=0.5, lpips=0.5):
    return {"psnr": psnr, "ssim": ssim, "lpips": lpips}


class Searches:
    """Opens the search of one folder, again and again as its command does."""

    def __init__(self, folder):
        self.folder = folder
        (folder / "s-search").mkdir()

    def config(self, **changes):
        parts = {
            "run": {"name": "s", "root": str(self.folder)},
            "data": {"url": "/d"},
            "train": {"steps": 900},
            "checkpoint": {"every": 100},
            "search": RANGES | {"sampler": "random"},
        }
        for dotted, value in changes.items():
            part, field = dotted.split("__")
            parts.setdefault(part, {})[field] = value
        return SearchConfig.model_validate(parts)

    def open(self, data=("checksum",), **changes):
        return Study(self.config(**changes), data)

    @property
    def raw(self):
        """The study as Optuna and its dashboard see it."""
        return optuna.load_study(study_name="s", storage=f"sqlite:///{self.folder}/s-search/study.db")

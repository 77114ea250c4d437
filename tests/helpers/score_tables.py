"""Tables of scores and runs without networks, for tests of what is made of scores."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline import storage
from pipeline.run import checkpoint, scores
from pipeline.run.scores import Table
from pipeline.settings.config import Config
from pipeline.settings.evaluation import Split

DATA = "5e5e"  # stands for the checksum of the data set's manifest
Values = Mapping[str, Mapping[str, float | None]]  # by method and image; None could not be scored


def score_rows(
    values: Values, metric: str = "psnr", protocol: str = "rgb_u8", *, step: int = 1, **others: Any
) -> list[dict[str, Any]]:
    """Rows of a checkpoint's scores by one metric; ``others`` are columns that all of them share."""
    common = {"checkpoint": checkpoint.name_at(step), "step": step, "split": "dev", "data": DATA}
    common |= {"device": "cpu", "precision": "float32", **others}
    return [
        {"reason": "too dark" if value is None else None}
        | common
        | {"method": method, "key": key, "value": value, "metric": metric, "protocol": protocol}
        for method, images in values.items()
        for key, value in images.items()
    ]


def score_table(values: Values, metric: str = "psnr", protocol: str = "rgb_u8", **others: Any) -> Table:
    """The same as a table."""
    return scores.to_table(score_rows(values, metric, protocol, **others))


def checkpoint_rows(step: int, psnr: float, **others: Any) -> list[dict[str, Any]]:
    """Rows of two images: the student's mean PSNR is ``psnr``, its LPIPS falls with it, and the average's is -psnr."""
    student, averaged = {"a": psnr - 1, "b": psnr + 1}, {"a": -psnr, "b": -psnr}
    lpips = {"a": -psnr, "b": -psnr}
    return [
        *score_rows({"input": {"a": 5.0, "b": 7.0}, "student": student, "averaged": averaged}, step=step, **others),
        *score_rows({"input": lpips, "student": lpips, "averaged": lpips}, "lpips", "alex", step=step, **others),
    ]


def make_run(folder: Path | str, psnr: Mapping[int, float | None], *, steps: int = 4, **settings: Any) -> str:
    """URL of a run below ``folder``; its checkpoints hold empty weights, and scores where a PSNR is given."""
    tree = {
        "data": {"url": "/data"},
        "train": {"steps": steps},
        **settings,
        "run": {"name": "run", "root": str(folder), **settings.get("run", {})},
    }
    config = Config.model_validate(tree)
    provenance = json.dumps({"git": "abc", "manifest_sha256": [DATA, "another set"]})
    url = config.run.url
    for place in (url, *(storage.join(url, checkpoint.name_at(step)) for step in psnr)):
        storage.write_text(storage.join(place, checkpoint.SETTINGS), config.to_yaml())
        storage.write_text(storage.join(place, checkpoint.PROVENANCE), provenance)
    for step, value in psnr.items():
        for name in (checkpoint.STATE, *checkpoint.WEIGHT_FILES):
            storage.write_text(storage.join(url, checkpoint.name_at(step), name), "{}")
        if value is not None:
            write_scores(url, step, scores.to_table(checkpoint_rows(step, value)))
    return url


def write_scores(run: str, step: int, table: Table, split: Split = "dev") -> None:
    """Add the scores of a run's checkpoint on a split."""
    scores.store(storage.join(run, checkpoint.name_at(step), scores.scores_file(split)), table)


def draw_arms(draw: np.random.Generator, arms: int, seeds: int, images: int) -> NDArray[np.float64]:
    """PSNR of equal arms, float64 [arms, seeds, images], with noise over seeds, over images and over both."""
    # standard deviations of a difference in dB, which are not the same in all studies
    over_seeds, over_images, rest = draw.uniform((0.1, 0, 0.3), (0.5, 2, 1)) / np.sqrt(2)
    values = 20 + 3 * draw.normal(size=images) + over_seeds * draw.normal(size=(arms, seeds, 1))
    values = values + over_images * draw.normal(size=(arms, 1, images))
    return values + rest * draw.normal(size=(arms, seeds, images))

"""Ranking and pruning of checkpoints by their scores."""

import json

import pytest

from pipeline import checkpoint, storage
from pipeline.config import Config
from pipeline.evaluation import results
from pipeline.training.settings import CheckpointSettings


def make_run(folder, psnr_by_step):
    """A run whose checkpoints hold empty weights, and scores where they are given."""
    for step, psnr in psnr_by_step.items():
        url = storage.join(str(folder), checkpoint.name_at(step))
        for name in (checkpoint.STATE, *checkpoint.WEIGHT_FILES):
            storage.write_text(storage.join(url, name), json.dumps({"step": step}))
        if psnr is not None:
            methods = {"student": {"psnr": psnr, "lpips": -psnr}}
            scores = {"checkpoint": checkpoint.name_at(step), "step": step, "split": "dev", "methods": methods}
            storage.write_text(storage.join(url, results.scores_file("dev")), json.dumps(scores))
    return str(folder)


@pytest.mark.parametrize(
    ("psnr_by_step", "finished"),
    [
        ({2: 10.0, 4: 20.0}, True),
        ({2: 10.0}, False),
        ({2: 10.0, 4: None}, False),
        ({2: None, 4: 20.0}, False),
        ({}, False),
    ],
)
def test_a_run_is_finished_once_its_last_step_is_done_and_every_checkpoint_scored(tmp_path, psnr_by_step, finished):
    make_run(tmp_path / "r", psnr_by_step)
    run, data = {"name": "r", "storage": str(tmp_path)}, {"url": "/data"}
    config = Config.model_validate({"run": run, "data": data, "train": {"steps": 4}, "optimizer": {"warmup_steps": 0}})
    assert results.is_finished(config) == finished


def kept(run):
    return [int(url[-8:]) for url in checkpoint.complete_checkpoints(run)]


def test_keeps_the_last_the_best_and_what_is_not_scored_yet(tmp_path):
    run = make_run(tmp_path, {1: 30.0, 2: 10.0, 3: 20.0, 4: None, 5: 11.0, 6: 12.0})
    results.prune(run, CheckpointSettings(keep_last=1, keep_best=2))
    assert kept(run) == [1, 3, 4, 6]
    assert [entry["step"] for entry in results.read_scores(run)] == [1, 2, 3, 5, 6]


@pytest.mark.parametrize(("metric", "order"), [("psnr", [3, 2, 1, 4]), ("lpips", [3, 2, 1, 4])])
def test_ranks_by_the_metric_in_its_own_direction(tmp_path, metric, order):
    run = make_run(tmp_path, {1: 10.0, 2: 20.0, 3: 20.0, 4: float("nan")})
    ranked = results.ranked(results.read_scores(run), CheckpointSettings(metric=metric))
    assert [entry["step"] for entry in ranked] == order


def test_best_checkpoint_of_a_run_without_scores_is_refused(tmp_path):
    with pytest.raises(ValueError, match="none of its checkpoints has been scored"):
        results.best_checkpoint(make_run(tmp_path, {1: None}), CheckpointSettings())

"""Trials run by Ray Tune, their training replaced by a formula that writes scores as the evaluation actors do."""

import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import score_tables
from commands import CPUS, options
from ray import cloudpickle
from ray.experimental.internal_kv import _internal_kv_del
from ray.train import WorkerGroupError
from ray.util.placement_group import placement_group, remove_placement_group

from pipeline import interruption, storage
from pipeline.interruption import JobInterruptedError
from pipeline.launch import capacity, concurrent_runs, preflight
from pipeline.launch.provenance import collect_provenance
from pipeline.launch.trainer import TrainingStoppedError
from pipeline.run import checkpoint, scores
from pipeline.settings.command_line import argument_parser
from pipeline.settings.config import Config
from pipeline.settings.files import parse_config
from tune import space, trials
from tune.pruning import should_prune
from tune.settings import SearchConfig
from tune.study import Study

for module in (sys.modules[__name__], score_tables):
    cloudpickle.register_pickle_by_value(module)
STEPS, EVERY = 90, 10
OPTIMUM = {"scale_weights": (0.1, 0.2, 0.3, 0.4), "gamma": 1.8, "ema_rate": 0.996}
BEST_DB, PAPER_DB = 24.0, 20.0


def config_of(folder: Path | str, **search: Any) -> SearchConfig:
    storage.check_writable(f"{folder}/formula-search")
    return SearchConfig.model_validate(
        {
            "run": {"name": "formula", "root": str(folder), "use_gpu": False, "seed": search.pop("seed", 0)},
            "data": {"url": "/no/data"},
            "train": {"steps": STEPS},
            "checkpoint": {"every": EVERY},
            "evaluation": {"lpips": "none", "actors": 1, "gpus_per_actor": 0},
            "search": search,
        }
    )


def distance(config: Config) -> float:
    """From the optimum, in parts of the paper's setting's distance: mean of three squares."""
    weights = config.objective.scale_weights
    best = OPTIMUM["scale_weights"]
    scales = sum((a - b) ** 2 for a, b in zip(weights, best, strict=True)) / sum((0.25 - b) ** 2 for b in best)
    gamma = (math.log(config.objective.gamma / OPTIMUM["gamma"]) / math.log(1 / OPTIMUM["gamma"])) ** 2
    horizon = 1 - OPTIMUM["ema_rate"]
    ema = (math.log((1 - config.teacher.ema_rate) / horizon) / math.log(0.001 / horizon)) ** 2
    return (scales + gamma + ema) / 3


def psnr_of(config: Config) -> float:
    return BEST_DB - (BEST_DB - PAPER_DB) * distance(config)


def write_scores(config: Config, step: int, psnr: float) -> None:
    rows = []
    for metric, value in {"psnr": psnr, "ssim": 0.5 + psnr / 100}.items():
        rows += score_tables.score_rows({"student": {"a": value - 1, "b": value + 1}}, metric, step=step)
    url = storage.join(config.run.url, checkpoint.name_at(step), scores.scores_file("dev"))
    scores.write(url, scores.to_table(rows))


def formula(config: Config) -> None:
    """Stands for a training: its checkpoints come to within nothing of the formula's value."""
    for step in range(EVERY, STEPS + 1, EVERY):
        write_scores(config, step, psnr_of(config) - 5 * (1 - step / STEPS))


def searched(
    folder: Path | str, train: Callable[[Config], None] = formula, concurrent: int = 2, **search: Any
) -> Study:
    config = config_of(folder, **search)
    study = Study(config, ["checksum"])
    trials.run(config, study, train, concurrent)
    return study


def ended(study: Study) -> dict[int, str]:
    return {trial.number: trial.state for trial in study.trials()}


@pytest.fixture(scope="module")
def folder(driver, tmp_path_factory):
    """The folder of a search of five trials over the formula."""
    folder = tmp_path_factory.mktemp("formula")
    searched(folder, trials=5, concurrent=5)
    return folder


def test_each_trial_is_told_with_the_scores_of_its_run(folder):
    config = config_of(folder, trials=5)
    study = Study(config, ["checksum"])
    assert [trial.number for trial in study.trials()] == list(range(5))
    assert set(ended(study).values()) == {"finished", "pruned"}
    for trial in study.trials():
        run = space.run_settings(config, trial.parameters, trials.run_name(trial.number), 0)
        assert storage.exists(run.run.url)
        for step, found in trial.scores.items():
            assert found["psnr"] == pytest.approx(psnr_of(run) - 5 * (1 - step / STEPS))
            assert found["ssim"] == pytest.approx(0.5 + found["psnr"] / 100)
        reached = max(trial.scores)
        assert reached == STEPS if trial.state == "finished" else reached in config.rungs
    assert study.trial(0).values == pytest.approx((PAPER_DB,))


def test_a_search_that_is_complete_or_wants_more_trials_runs_only_the_missing_ones(folder):
    before = Study(config_of(folder, trials=5), ["checksum"]).trials()
    study = searched(folder, trials=6)
    assert study.trials()[:5] == before and len(study.trials()) == 6


def searched_in_turn(folder: Path, **search: Any) -> Study:
    """The same search without Ray, one trial after the other."""
    config = config_of(folder, **search)
    study = Study(config, ["checksum"])
    while drawn := study.next():
        number, parameters = drawn
        psnr = psnr_of(space.run_settings(config, parameters, trials.run_name(number), 0))
        for step in range(EVERY, STEPS + 1, EVERY):
            study.record(number, step, {"psnr": psnr - 5 * (1 - step / STEPS)})
            if should_prune(study, number):
                study.prune(number)
                break
        else:
            study.finish(number)
    return study


def medians(folder: Path, search: Callable[..., Study], **settings: Any) -> float:
    """Median over five seeds of the best value that forty trials find."""
    found = [search(folder / f"seed{seed}", seed=seed, trials=40, **settings).best()[0].values for seed in range(5)]
    return statistics.median(values[0] for values in found)


@pytest.mark.slow
def test_a_known_optimum_is_found_and_better_than_at_random(without_waiting_for_the_disk, tmp_path):
    found, at_random = (medians(tmp_path / name, searched_in_turn, sampler=name) for name in ("tpe", "random"))
    assert found > 0.95 * BEST_DB > at_random


@pytest.mark.slow
def test_a_known_optimum_is_found_through_ray_tune(driver, tmp_path):
    found = medians(tmp_path / "tpe", searched, concurrent=4)
    assert found > 0.95 * BEST_DB and found > medians(tmp_path / "random", searched_in_turn, sampler="random")


@dataclass(frozen=True)
class Troubled:
    """A training that goes wrong in another way in each trial."""

    folder: Path

    def __call__(self, config: Config) -> None:
        match config.run.name:
            case "trial-0000":
                raise TrainingStoppedError("10 steps in a row had a loss that is not finite")
            case "trial-0001":
                os._exit(1)  # lost, and lost again when it is tried again
            case "trial-0002":
                if not (self.folder / "lost-once").exists():
                    (self.folder / "lost-once").touch()
                    os._exit(1)
                formula(config)
            case "trial-0003":
                raise WorkerGroupError("a long text", {0: MemoryError("CUDA out of memory"), 1: ValueError("a\nb")})
            case _:
                pass  # ends without any scores


def test_failed_trials_keep_their_reason_and_do_not_stop_the_search(driver, tmp_path):
    study = searched(tmp_path, Troubled(tmp_path), 5, trials=5, reduction=None)
    assert ended(study) == {0: "failed", 1: "failed", 2: "finished", 3: "failed", 4: "failed"}
    reasons = {trial.number: trial.failure for trial in study.trials()}
    assert reasons[0] == "10 steps in a row had a loss that is not finite"
    assert "died" in reasons[1]
    assert reasons[2] is None and (tmp_path / "lost-once").exists()
    assert reasons[3] == "CUDA out of memory; b"
    assert reasons[4] == "none of its checkpoints was scored"


@pytest.mark.slow
def test_runs_may_lie_on_s3(driver, s3, tmp_path):
    bucket = s3.make_bucket()
    study = searched(bucket, trials=2, reduction=None, database=f"sqlite:///{tmp_path}/study.db")
    assert ended(study) == {0: "finished", 1: "finished"} and study.trial(0).values == pytest.approx((PAPER_DB,))
    assert {"trial-0000", "trial-0001"} <= set(storage.listdir(f"{bucket}/formula-search"))


@pytest.mark.slow
def test_time_that_is_over_leaves_trials_to_go_on_another_time(driver, tmp_path):
    def slow(config: Config) -> None:
        write_scores(config, EVERY, 10.0)
        time.sleep(3600)

    study = searched(tmp_path, slow, trials=4, hours=10 / 3600)
    assert study.seconds_left() == 0
    assert set(ended(study).values()) == {"running"} and len(study.trials()) == 2
    began = {trial.number: trial.parameters for trial in study.trials()}
    study = searched(tmp_path, formula, trials=3, hours=1)
    assert set(ended(study).values()) <= {"finished", "pruned"} and len(study.trials()) == 3
    assert {number: study.trial(number).parameters for number in began} == began


@pytest.mark.slow
def test_a_job_that_is_to_make_way_leaves_its_trials_to_go_on_another_time(driver, tmp_path):
    def interrupted(config: Config) -> None:
        write_scores(config, EVERY, 10.0)
        interruption.request()
        raise JobInterruptedError

    try:
        study = searched(tmp_path, interrupted, trials=4)
        assert interruption.requested()
    finally:
        _internal_kv_del(interruption._key())
    assert set(ended(study).values()) == {"running"} and len(study.trials()) <= 2
    study = searched(tmp_path, trials=2)
    assert set(ended(study).values()) <= {"finished", "pruned"} and len(study.trials()) == 2


@pytest.fixture
def room_for_one(driver):
    """Leaves free in the cluster what one worker and one evaluation actor take."""
    taken = placement_group([{"CPU": CPUS - 2}])
    ray.get(taken.ready())
    yield
    remove_placement_group(taken)


@pytest.mark.slow
def test_a_stopped_trial_gives_back_its_resources_at_once(room_for_one, shards, tmp_path, monkeypatch):
    """Each trial takes all that is free, validation included, so that one that kept anything would block the next."""
    monkeypatch.setattr(trials, "should_prune", lambda study, number: number == 0)
    changes = {"--data.url": shards, "--run.root": str(tmp_path), "--run.name": "all", "--search.trials": "2"}
    changes |= {"--train.steps": "400", "--train.log-every": "50", "--checkpoint.every": "200"}
    config, _ = parse_config(argument_parser(""), SearchConfig, options(**changes))
    manifests = preflight.check_data(config)
    (tmp_path / "all-search").mkdir()
    study = Study(config, [manifest.checksum for manifest in manifests])
    config, concurrent = capacity.fit_to_cluster(config, manifests)
    assert concurrent == 1
    training = concurrent_runs.Training(collect_provenance(manifests), ray.put("no LPIPS in this test"))
    trials.run(config, study, training, concurrent)
    assert ended(study) == {0: "pruned", 1: "finished"}
    assert list(study.trial(0).scores) == [200]
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU") != 2 and time.monotonic() < deadline:
        time.sleep(0.5)
    assert ray.available_resources()["CPU"] == 2

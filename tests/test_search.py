"""The search's command, end to end: killed and continued, submitted as a job, and what it leaves behind."""

import os
import re
import signal
from pathlib import Path

import optuna
import pytest
import yaml
from commands import ROOT, copy_code, options
from datasets import packed

from pipeline.packing.shard_writer import pack
from pipeline.settings.packing import PackSettings
from tune import search

REAL_PAIRS = ROOT.parent / "shared/data/lol-v1-part"
SMALL_SEARCH = {"--config": "demo", "--run.name": "small", "--search.top": "1", "--search.seeds": "2"}


def arguments_of(shards: str, storage: Path, **changes: str) -> list[str]:
    return options(**SMALL_SEARCH | {"--data.url": shards, "--run.root": str(storage)} | changes)


def study_of(folder: Path) -> optuna.Study:
    return optuna.load_study(study_name=folder.name.removesuffix("-search"), storage=f"sqlite:///{folder}/study.db")


@pytest.mark.slow
def test_a_killed_search_ends_with_the_trials_asked_for_as_a_job(command, shards, tmp_path):
    arguments = arguments_of(
        shards, tmp_path, **{"--search.trials": "2", "--search.concurrent": "2", "--search.reduction": "null"}
    )
    folder = tmp_path / "small-search"
    (folder / "ray-tune-notes").mkdir(parents=True)  # a user's, beside what Ray Tune leaves when it is killed
    process = command.start("tune/search.py", *arguments)
    for line in process.stdout:
        if re.search(r"trial 1: step 2 ", line):
            os.kill(process.pid, signal.SIGKILL)
            break
    process.wait()
    before = study_of(folder).trials
    scored = folder / "trial-0001/checkpoint-00000002/state.json"
    written = scored.stat().st_mtime_ns
    assert len(before) == 2 and any(trial.state.name == "RUNNING" for trial in before)

    copy_code(tmp_path / "clone")
    output = command.submit(tmp_path / "clone", "tune/search.py", *arguments)
    trials = study_of(folder).trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "COMPLETE"]
    for old, new in zip(before, trials, strict=False):
        assert old.params == new.params and old.datetime_start == new.datetime_start
    assert scored.stat().st_mtime_ns == written, "the trial that was running began anew"
    assert {path.name for path in folder.glob("trial-????")} == {"trial-0000", "trial-0001"}
    assert re.search(r"^2 trials: ", output, re.MULTILINE)
    assert re.search(r"^the paper's setting +2 +\d+\.\d\d ± ", output, re.MULTILINE)
    assert re.search(r"psnr of the chosen checkpoints on the development split, over 2 seeds that", output)
    assert f"report: {folder}/report.html" in output
    assert "<h2>Results</h2>" in (folder / "report.html").read_text()
    best = yaml.safe_load((folder / "best.yaml").read_text())
    assert best["run"]["name"] == "small-best" and best["run"]["root"] == str(tmp_path)
    assert [path.name for path in folder.glob("ray-tune*")] == ["ray-tune-notes"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--search.trials": "0"}, "search.trials: Input should be greater than or equal to 1"),
        ({"--search.gamma": "[2, 4]"}, "search.gamma: the range [2.0, 4.0] must contain 1"),
        ({"--search.objectives": "lpips"}, "search.objectives need lpips, which evaluation.lpips: none turns off"),
        ({"--search.database": "postgresql://me:secret@host/db"}, "must not bear a password"),
        ({"--search.database": "nonsense://host/db"}, "search.database: nonsense://host/db can't be opened"),
        ({"--run.root": "s3://no-such-bucket/runs"}, "no-such-bucket"),
        ({"--data.url": "/no/such/data"}, "/no/such/data/manifest.parquet: there is no manifest; check the path"),
    ],
)
def test_mistakes_end_before_ray_starts(refusal, s3, shards, tmp_path, changes, message):
    shown = refusal(search, *arguments_of(shards, tmp_path, **changes))
    assert message in shown and "secret" not in shown


@pytest.fixture(scope="module")
def real_shards(tmp_path_factory) -> str:
    """Real pairs where they are at hand, else made ones."""
    folder = tmp_path_factory.mktemp("real")
    if not REAL_PAIRS.exists():
        return packed(folder, count=40)
    pack(PackSettings(source=REAL_PAIRS, out=str(folder / "shards"), dev_fraction=0.15))
    return str(folder / "shards")


@pytest.mark.slow
def test_eight_trials_over_real_pairs_stop_some_early_and_the_best_settings_train(command, real_shards, tmp_path):
    changes = {"--search.trials": "8", "--search.concurrent": "2", "--network.width": "0.125", "--train.steps": "180"}
    changes |= {"--checkpoint.every": "20", "--train.log-every": "20"}
    arguments = arguments_of(real_shards, tmp_path, **changes)
    (tmp_path / "small-search/dry-run").mkdir(parents=True)  # a user's own
    plan = command("tune/search.py", *arguments, "--search.dry-run")
    assert re.search(r"^gamma +0\.25 to 4 +log +1$", plan, re.MULTILINE)
    assert "trials at the same time: 2" in plan and re.search(r"8 trials: about .* at each of the steps 20, 60", plan)
    assert [path.name for path in (tmp_path / "small-search").iterdir()] == ["dry-run"]
    output = command("tune/search.py", *arguments, timeout_s=600)
    states = [trial.state.name for trial in study_of(tmp_path / "small-search").trials]
    assert len(states) == 8 and states[0] == "COMPLETE" and "PRUNED" in states and "FAIL" not in states
    assert re.search(r"trial \d: pruned at step (20|60): psnr", output)
    trained = command("pipeline/train.py", "--config", str(tmp_path / "small-search/best.yaml"))
    assert re.search(r"^student +\d+\.\d\d", trained, re.MULTILINE)
    assert (tmp_path / "small-best/checkpoint-00000180/student.safetensors").exists()
    again = command("tune/search.py", *arguments, timeout_s=120)
    assert output.endswith(again[again.index("over seeds") :].split("\n", 1)[1])

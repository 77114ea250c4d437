"""The commands of the README, end to end, on small pairs: train, continue, refuse, evaluate, submit as a job."""

import json
import re
import shutil
import subprocess
import sys
import tempfile

import pytest
import yaml
from commands import ROOT, without_colours
from datasets import packed, write_pairs
from PIL import Image

from pipeline import storage

CACHE = tempfile.TemporaryDirectory()
SMALL = {
    "--config": "demo",
    "--data.crop": "32",
    "--data.cache": CACHE.name,
    "--network.width": "0.0625",
    "--run.workers": "1",
    "--train.steps": "4",
    "--train.log-every": "1",
    "--checkpoint.every": "2",
    "--optimizer.warmup-steps": "0",
    "--evaluation.grid-images": "2",
    "--evaluation.lpips": "none",
}


def options(**changes):
    return [part for item in (SMALL | changes).items() for part in item]


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    return packed(tmp_path_factory.mktemp("pairs"), test=2)


@pytest.fixture(scope="session")
def trained(command, shards, tmp_path_factory):
    """A finished run: its folder, its options and what the command printed."""
    storage = tmp_path_factory.mktemp("runs")
    changes = {"--data.url": shards, "--run.storage": str(storage), "--run.name": "small", "--evaluation.lpips": "alex"}
    changes["--run.workers"] = "2"
    arguments = options(**changes)
    return storage / "small", arguments, command("pipeline/train.py", *arguments)


def test_training_ends_in_a_table_and_a_report(trained):
    run, _, output = trained
    assert re.search(r"step 3/4  loss [\d.]+  reconstruction [\d.]+  ssim [\d.]+  mirror [\d.]+  learning_rate", output)
    assert re.search(r"grad_norm [\d.]+  ema_rate [\d.]+  images_per_s [\d.]+  ETA", output)
    for method in ("input", "gamma", "student", "averaged"):
        assert re.search(rf"^{method} +\d+\.\d\d +\d\.\d{{4}}", output, re.MULTILINE)
    assert f"report: {run}/report.html" in output
    assert "<img" in (run / "report.html").read_text()


def test_settings_are_printed_resolved_and_stored(trained):
    run, _, output = trained
    stored = (run / "settings.yaml").read_text()
    assert stored in output
    assert yaml.safe_load(stored)["objective"]["mirror_weight"] == 0.8
    provenance = json.loads((run / "provenance.json").read_text())
    assert [len(checksum) for checksum in provenance["manifest_sha256"]] == [64] and provenance["libraries"]["torch"]
    for step in (2, 4):
        assert (run / f"checkpoint-{step:08d}/settings.yaml").read_text() == stored


def test_every_checkpoint_is_scored_while_training_goes_on(trained):
    run, _, _ = trained
    for step in (2, 4):
        scores = json.loads((run / f"checkpoint-{step:08d}/scores-dev.json").read_text())
        assert (scores["step"], scores["split"], scores["protocol"]) == (step, "dev", "rgb_u8")
        assert scores["methods"].keys() == {"input", "gamma", "student", "averaged"}
        picture = Image.open(run / f"checkpoint-{step:08d}/grid-dev.png")
        assert picture.width > picture.height / 2


def test_metrics_go_to_the_file_and_to_tensorboard(trained):
    run, _, _ = trained
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    terms = {"loss", "reconstruction", "ssim", "mirror", "learning_rate", "grad_norm", "images_per_s", "ema_rate"}
    assert all(terms < record.keys() for record in records)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("mirror")] == [1, 2, 3, 4]


def test_the_same_command_again_has_nothing_left_to_do(trained, command):
    run, arguments, before = trained
    weights = (run / "checkpoint-00000004/student.safetensors").read_bytes()
    output = command("pipeline/train.py", *arguments)
    assert "step 1/4" not in output
    assert (
        re.search(r"^student .*", output, re.MULTILINE).group()
        == re.search(r"^student .*", before, re.MULTILINE).group()
    )
    assert (run / "checkpoint-00000004/student.safetensors").read_bytes() == weights


def test_other_settings_under_the_same_name_are_refused(trained, command):
    run, arguments, _ = trained
    output = command("pipeline/train.py", *arguments, "--objective.beta", "0.3", status=2)
    assert f"{run}: a run of this name exists with other settings or data" in output
    assert "objective.beta: 0.6 before, 0.3 now" in output


def test_other_data_under_the_same_name_is_refused(trained, command, tmp_path):
    _, arguments, _ = trained
    other = packed(tmp_path, count=16)
    output = command("pipeline/train.py", *arguments, "--data.url", other, status=2)
    assert re.search(r"data: manifest \w{12} before, \w{12} now", output)


def test_evaluate_scores_the_best_checkpoint_on_the_test_split(trained, command, shards, tmp_path):
    run = tmp_path / "moved"
    shutil.copytree(trained[0], run)
    output = command("pipeline/evaluate.py", "--checkpoint", str(run), "--data.url", shards, "--split", "test")
    assert f"report: {run}/report.html" in output
    assert re.search(r"split: test, protocol: rgb_u8.* 2 images", output)
    assert re.search(r"^student +\d", output, re.MULTILINE)
    (scores,) = run.glob("checkpoint-*/scores-test.json")
    assert {row["key"] for row in json.loads(scores.read_text())["images"]} == {"test-0", "test-1"}


def test_dry_run_checks_everything_and_leaves_nothing(command, shards, tmp_path):
    arguments = options(**{"--data.url": shards, "--run.storage": str(tmp_path), "--run.name": "dry"})
    output = command("pipeline/train.py", *arguments, "--dry-run")
    assert "step 2/2" in output and "dry run passed" in output
    assert "name: dry-run-dry" in output
    assert list(tmp_path.iterdir()) == []


def test_training_from_s3_to_s3_gives_the_bits_of_training_on_disk(trained, command, shards, s3, tmp_path):
    run, arguments, _ = trained
    bucket = s3.make_bucket()
    packing = ["--shard-pairs", "4", "--dev-fraction", "0.25"]
    command("pipeline/pack.py", "--source", f"{shards}/../source", "--out", f"{bucket}/set", *packing)
    changes = ["--data.url", f"{bucket}/set", "--run.storage", f"{bucket}/runs", "--data.cache", str(tmp_path)]
    output = command("pipeline/train.py", *arguments, *changes)
    assert f"report: {bucket}/runs/small/report.html" in output
    assert list(tmp_path.rglob("*.tar")) and list(tmp_path.rglob("*.pixels"))
    for step in (2, 4):
        for name in ("student.safetensors", "teacher.safetensors", "optimizer.safetensors", "state.json"):
            path = f"checkpoint-{step:08d}/{name}"
            assert storage.read_bytes(f"{bucket}/runs/small/{path}") == (run / path).read_bytes(), path


def test_a_damaged_shard_stops_the_run_with_its_name_and_reason(command, shards, tmp_path):
    damaged = tmp_path / "shards"
    shutil.copytree(shards, damaged)
    with (damaged / "train-000001.tar").open("r+b") as file:
        file.truncate(5000)
    changes = {"--data.url": str(damaged), "--run.storage": str(tmp_path), "--run.name": "bad", "--data.cache-gib": "0"}
    changes["--run.max-failures"] = "1"
    output = command("pipeline/train.py", *options(**changes), status=1)
    assert re.search(rf"^training stopped: {damaged}: train-000001.tar: has not the \d+ bytes", output, re.MULTILINE)
    assert "image is cut off (the shard ends after 5000 bytes)" in output
    assert "step 1/4" not in output.split("train-000001.tar")[-1], "it was started again in vain"


def test_a_loss_that_stays_not_finite_stops_the_run_with_the_reason(command, shards, tmp_path):
    changes = {"--data.url": shards, "--run.storage": str(tmp_path), "--run.name": "nan", "--train.steps": "20"}
    changes |= {"--optimizer.learning-rate": "1e30", "--train.nonfinite-limit": "3"}
    output = command("pipeline/train.py", *options(**changes), status=1)
    assert output.count("left out: the loss or its gradient is not finite") == 3
    assert "training stopped: 3 steps in a row (train.nonfinite_limit)" in output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--data.url": "/no/such/data"}, "/no/such/data/manifest.parquet: there is no manifest; check the path"),
        ({"--run.workers": "64", "--train.global-batch": "64"}, "the run needs 65 CPUs, the Ray cluster has 8"),
        ({"--data.url": "s3://no-such-bucket/set"}, "no-such-bucket/set/manifest.parquet: there is no such bucket"),
        ({"--data.weights": "[1, 2]"}, "data: weights have no effect without extra_urls"),
        ({"--evaluation.lpips": "alex", "--evaluation.lpips-weights": "/no/such/file.pth"}, "/no/such/file.pth"),
    ],
)
def test_mistakes_end_before_workers_start(command, shards, tmp_path, changes, message):
    arguments = options(**{"--data.url": shards, "--run.storage": str(tmp_path), "--run.name": "bad"} | changes)
    output = command("pipeline/train.py", *arguments, status=2, timeout_s=60)
    assert message in output
    assert "RayTrainWorker" not in output


def test_held_out_images_among_the_training_ones_are_refused(command, tmp_path):
    url = packed(tmp_path / "clean", count=12)
    shutil.copytree(tmp_path / "clean/source/train", tmp_path / "leak/source/train")
    for side in ("low", "high"):
        (tmp_path / "leak/source/test" / side).mkdir(parents=True)
        shutil.copy(tmp_path / f"clean/source/train/{side}/0.png", tmp_path / f"leak/source/test/{side}/9.png")
    leak = str(tmp_path / "leak/shards")
    packing = command("pipeline/pack.py", "--source", str(tmp_path / "leak/source"), "--out", leak)
    assert "training pairs show a scene of the test split" in packing
    arguments = options(**{"--data.url": leak, "--run.storage": str(tmp_path), "--run.name": "leak"})
    assert "test-9 (test) is train-0" in command("pipeline/train.py", *arguments, status=2)
    assert url


def test_pack_refuses_bad_pairs_by_name(command, tmp_path):
    write_pairs(tmp_path / "source", 3)
    (tmp_path / "source/high/1.png").unlink()
    output = command("pipeline/pack.py", "--source", str(tmp_path / "source"), "--out", str(tmp_path / "out"), status=2)
    assert "low/1.png" in output
    assert not (tmp_path / "out").exists()


def test_ray_job_submit_runs_a_clone_that_is_not_installed(command, shards, tmp_path):
    """The clone differs from what may be installed, so that the test sees whose code ran on driver and workers."""
    clone = tmp_path / "clone"
    for package in ("iaml", "pipeline"):
        shutil.copytree(ROOT / package, clone / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(clone / "pipeline/presets/demo.yaml", clone / "pipeline/presets/of_the_clone.yaml")
    with (clone / "pipeline/training/monitor.py").open("a") as file:
        file.write('\nMETRICS = "metrics-of-the-clone.jsonl"\n')
    changes = {"--config": "of_the_clone", "--data.url": shards, "--run.storage": str(tmp_path), "--run.name": "job"}
    submit = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", command.head.dashboard]
    done = subprocess.run(
        [*submit, "--working-dir", ".", "--", "python", "pipeline/train.py", *options(**changes)],
        cwd=clone,
        env=command.environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    output = without_colours(done.stdout + done.stderr)
    assert done.returncode == 0, output
    assert re.search(r"Job '\w+' succeeded", output)
    assert re.search(r"^student +\d", output, re.MULTILINE)
    assert (tmp_path / "job/metrics-of-the-clone.jsonl").exists()

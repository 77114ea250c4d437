"""The commands of the README, end to end, on small pairs: train, continue, refuse, evaluate, submit as a job."""

import json
import re
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml
from commands import copy_code, options
from datasets import packed, write_pairs
from PIL import Image
from transcripts import not_meant

from pipeline import pack, storage, train
from pipeline.packing.pairing import find_pairs


def test_training_ends_in_a_table_and_a_report(trained):
    run, _, output = trained
    assert re.search(
        r"step 3/48  loss [\d.]+  reconstruction [\d.]+  ssim [\d.]+  mirror [\d.]+  learning_rate", output
    )
    assert re.search(r"grad_norm [\d.]+  ema_rate [\d.]+  images_per_s [\d.]+  ETA", output)
    for method in ("input", "gamma", "student", "averaged"):
        assert re.search(rf"^{method} +\d+\.\d\d +\d\.\d{{4}}", output, re.MULTILINE)
    assert f"report: {run}/report.html" in output
    assert re.search(r"^  mean of last 4 +\d", output, re.MULTILINE)
    assert re.search(r"^LPIPS alex from .*alexnet.* \(sha256 \w{64}\)$", output, re.MULTILINE)
    assert "<img" in (run / "report.html").read_text()


def test_nothing_but_what_is_meant_comes_to_the_terminal_and_all_else_to_the_log(trained):
    run, _, output = trained
    assert not_meant(output, (run / "settings.yaml").read_text()) == []
    assert "\x1b" not in output and len(re.findall("^step ", output, re.MULTILINE)) == 48
    assert len(re.findall("^checkpoint-.* scored", output, re.MULTILINE)) == 4
    log = (run / "log.txt").read_text()
    assert re.search(r"\(RayTrainWorker pid=\d+ ip=[\d.]+\) step 48/48", log) and "real_accelerator.py" in log
    assert "\x1e" not in log


def test_settings_are_printed_resolved_and_stored(trained):
    run, _, output = trained
    stored = (run / "settings.yaml").read_text()
    assert stored in output
    assert yaml.safe_load(stored)["objective"]["mirror_weight"] == 0.8
    provenance = json.loads((run / "provenance.json").read_text())
    assert [len(checksum) for checksum in provenance["manifest_sha256"]] == [64] and provenance["libraries"]["torch"]
    for step in (24, 36, 48):
        assert (run / f"checkpoint-{step:08d}/settings.yaml").read_text() == stored


def test_every_checkpoint_is_scored_while_training_goes_on(trained):
    run, _, _ = trained
    table = pd.read_parquet(run / "scores.parquet")
    assert set(table["step"]) == {12, 24, 36, 48} and set(table["split"]) == {"dev"}
    assert set(table["method"]) == {"input", "gamma", "student", "averaged"}
    assert set(zip(table["protocol"], table["metric"], strict=True)) == {
        ("rgb_u8", "psnr"), ("rgb_u8", "ssim"), ("alex", "lpips"),
    }  # fmt: skip
    assert table.groupby(["step", "method", "metric"])["key"].nunique().eq(3).all() and table["value"].notna().all()
    (manifest,) = json.loads((run / "provenance.json").read_text())["manifest_sha256"]
    assert set(table["data"]) == {manifest} and table["libraries"].str.contains("torch").all()
    for step in (12, 24, 36, 48):
        picture = Image.open(run / f"checkpoint-{step:08d}/grid-dev.png")
        assert picture.width > picture.height / 2


def test_metrics_go_to_the_file_and_to_tensorboard(trained):
    run, _, _ = trained
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 49))
    terms = {"loss", "reconstruction", "ssim", "mirror", "learning_rate", "grad_norm", "images_per_s", "ema_rate"}
    assert all(terms < record.keys() for record in records)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("mirror")] == list(range(1, 49))


def test_the_same_command_again_has_nothing_left_to_do(trained, command):
    run, arguments, before = trained
    output = command("pipeline/train.py", *arguments)
    assert output.startswith(f"{run}: all 48 steps are done and every checkpoint is scored\n\ncheckpoint")
    assert before.endswith(output.split("\n", 1)[1])


def test_other_settings_or_data_under_the_same_name_are_refused(trained, refusal, tmp_path):
    run, arguments, _ = trained
    message = refusal(train, *arguments, "--objective.beta", "0.3", "--data.url", packed(tmp_path, count=16))
    assert f"{run}: a run of this name exists with other settings or data" in message
    assert "objective.beta: 0.6 before, 0.3 now" in message
    assert re.search(r"data: manifest \w{12} before, \w{12} now", message)


@pytest.fixture(scope="module")
def scored_on_test(trained, command, shards, tmp_path_factory):
    """A copy of the finished run, moved and renamed, whose test split has been scored, and what that printed."""
    run = tmp_path_factory.mktemp("moved") / "checkpoint-moved"
    shutil.copytree(trained[0], run)
    arguments = ["--checkpoint", str(run), "--data.url", shards, "--split", "test"]
    return run, arguments, command("pipeline/evaluate.py", *arguments)


def test_evaluate_scores_the_chosen_checkpoint_and_the_last_ones_on_the_test_split(scored_on_test):
    run, _, output = scored_on_test
    assert f"report: {run}/report.html" in output
    assert re.search(r"split: test, protocol: rgb_u8.* 2 images", output)
    assert re.search(r"^student +\d.*\n  mean of last \d +\d", output, re.MULTILINE)
    scored = pd.read_parquet(run / "scores.parquet").query("split == 'test'")
    assert {"test-0", "test-1"} == set(scored["key"])
    assert set(scored["step"]) >= {24, 36, 48}
    assert "On the test split" in (run / "report.html").read_text()


def test_the_test_split_is_scored_once(scored_on_test, command):
    _, arguments, before = scored_on_test
    output = command("pipeline/evaluate.py", *arguments, timeout_s=120)
    assert "scoring" not in output
    assert before.endswith(output.partition("\n\n")[2])


@pytest.mark.slow
def test_evaluate_refuses_actors_that_the_cluster_has_no_room_for(scored_on_test, command):
    arguments = ["--evaluation.protocols", "cidnet", "--evaluation.gpus-per-actor", "1"]
    output = command("pipeline/evaluate.py", *scored_on_test[1], *arguments, status=2)
    assert "needs 1 GPUs, the Ray cluster has 0" in output


def test_evaluate_compares_runs_checkpoints_and_pictures(scored_on_test, command, shards, tmp_path):
    run = scored_on_test[0]
    for pair in find_pairs(Path(shards).parent / "source"):
        if pair.split == "test":
            shutil.copy(pair.high, tmp_path / pair.low.name)
    bare = tmp_path / "best"  # a checkpoint under another name, reduced to what is needed to use it
    bare.mkdir()
    for name in ("student.safetensors", "settings.yaml"):
        shutil.copy(run / "checkpoint-00000036" / name, bare)
    compared = [str(run), str(run / "checkpoint-00000036"), str(tmp_path), str(bare)]
    out = tmp_path / "scores.parquet"
    arguments = ["--compare", *compared, "--data.url", shards, "--split", "test", "--out", str(out)]
    arguments += ["--json", str(tmp_path / "scores.json")]
    output = command("pipeline/evaluate.py", *arguments)
    number = r"[+-]\d+\.\d+"
    named = f"{run.name}/checkpoint-00000036", f"{tmp_path.name}/best"
    shown = [re.search(rf"^{name} - reference +({number} \[{number}, {number}\])", output, re.M) for name in named]
    assert shown[0] and shown[1] and shown[0][1] == shown[1][1]
    assert re.search(rf"^{tmp_path.name} +inf +1\.0000 +0\.0000$", output, re.MULTILINE)
    assert set(pd.read_parquet(out)["method"]) == {"input", "gamma", "student", "averaged", "images"}
    document = json.loads((tmp_path / "scores.json").read_text())
    assert (document["split"], document["images"], len(document["numbers"])) == ("test", 2, 7 * 3)
    assert document["checkpoints"][tmp_path.name] == tmp_path.name
    for number in document["numbers"]:
        shown = (
            number["mean"] is None or format(number["mean"], ".2f" if number["metric"] == "psnr" else ".4f") in output
        )
        assert shown and ("reason" in number) == (None in number.values())


@pytest.mark.slow
def test_ablations_end_in_a_table_of_arms_over_seeds(command, shards, tmp_path):
    changes = {"--data.url": shards, "--run.root": str(tmp_path), "--run.name": "arms"}
    arguments = [*options(**changes), "--arms", "no-mirror", "--seeds", "7", "--at-once", "2"]
    output = command("pipeline/ablate.py", *arguments)
    for arm in ("reference", "mirror_weight 0.0"):
        assert re.search(rf"^{arm} +1 +\d+\.\d\d ", output, re.MULTILINE)
    assert "runs, 2 at a time" in output
    assert (tmp_path / "arms/no-mirror-seed7/checkpoint-00000004/student.safetensors").exists()
    assert f"report: {tmp_path}/arms/report.html" in output
    again = command("pipeline/ablate.py", *arguments, timeout_s=120)
    assert output.endswith(again)
    runs = [str(tmp_path / f"arms/{arm}-seed7") for arm in ("reference", "no-mirror")]
    page = tmp_path / "page.html"
    assert command("pipeline/report.py", *runs, "--out", str(page), timeout_s=120) == f"report: {page}\n"
    assert "mirror_weight" in page.read_text()


def test_dry_run_checks_everything_and_leaves_nothing(command, shards, tmp_path):
    """On a Ray of its own, beside the session's: processes that looked for one would find several."""
    arguments = options(**{"--data.url": shards, "--run.root": str(tmp_path), "--run.name": "dry"})
    storage.write_text(str(tmp_path / "dry-run-dry/notes"), "a run of the user's")
    output = command.without_cluster()("pipeline/train.py", *arguments, "--dry-run")
    assert "step 2/2" in output and "dry run passed" in output
    settings = re.search(r"^run:\n  name: dry-run-dry-\w+\n(.+\n)+", output, re.MULTILINE)
    assert not_meant(output, settings[0]) == []
    assert storage.listdir(str(tmp_path)) == ["dry-run-dry"]
    assert storage.listdir(str(tmp_path / "dry-run-dry")) == ["notes"]


@pytest.mark.slow
def test_a_damaged_shard_stops_the_run_with_its_name_and_reason(command, shards, tmp_path):
    damaged = tmp_path / "shards"
    shutil.copytree(shards, damaged)
    with (damaged / "train-000001.tar").open("r+b") as file:
        file.truncate(5000)
    changes = {"--data.url": str(damaged), "--run.root": str(tmp_path), "--run.name": "bad"}
    changes["--run.max-failures"] = "1"
    output = command("pipeline/train.py", *options(**changes), status=1)
    assert re.search(rf"^training stopped: {damaged}: train-000001.tar: has not the \d+ bytes", output, re.MULTILINE)
    assert "image is cut off (the shard ends after 5000 bytes)" in output
    assert "step 1/4" not in output.split("train-000001.tar")[-1], "it was started again in vain"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--data.url": "/no/such/data"}, "/no/such/data/manifest.parquet: there is no manifest; check the path"),
        ({"--data.url": "s3://no-such-bucket/set"}, "no-such-bucket/set/manifest.parquet: there is no such bucket"),
        ({"--data.weights": "[1, 2]"}, "data: weights have no effect without extra_urls"),
        ({"--checkpoint.split": "test"}, "checkpoint.split: checkpoints are not chosen by the test split"),
        ({"--evaluation.lpips": "alex", "--evaluation.lpips-weights": "/no/such/file.pth"}, "/no/such/file.pth"),
    ],
)
def test_mistakes_end_before_ray_starts(refusal, s3, shards, tmp_path, changes, message):
    arguments = options(**{"--data.url": shards, "--run.root": str(tmp_path), "--run.name": "bad"} | changes)
    assert message in refusal(train, *arguments)


def test_a_run_too_large_for_the_cluster_ends_before_workers_start(command, shards, tmp_path):
    changes = {"--run.workers": "64", "--train.global-batch": "64", "--run.root": str(tmp_path)}
    output = command("pipeline/train.py", *options(**{"--data.url": shards} | changes), status=2, timeout_s=120)
    assert "the run needs 65 CPUs, the Ray cluster has 8" in output
    assert "RayTrainWorker" not in output


def test_held_out_images_among_the_training_ones_are_refused(refusal, command, tmp_path):
    packed(tmp_path / "clean", count=12)
    shutil.copytree(tmp_path / "clean/source/train", tmp_path / "leak/source/train")
    for side in ("low", "high"):
        (tmp_path / "leak/source/test" / side).mkdir(parents=True)
        shutil.copy(tmp_path / f"clean/source/train/{side}/0.png", tmp_path / f"leak/source/test/{side}/9.png")
    leak = str(tmp_path / "leak/shards")
    packing = command("pipeline/pack.py", "--source", str(tmp_path / "leak/source"), "--out", leak)
    assert "training pairs show a scene of the test split" in packing
    arguments = options(**{"--data.url": leak, "--run.root": str(tmp_path), "--run.name": "leak"})
    assert "test-9 (test) is train-0" in refusal(train, *arguments)


def test_pack_refuses_bad_pairs_by_name(refusal, tmp_path):
    write_pairs(tmp_path / "source", 3)
    (tmp_path / "source/high/1.png").unlink()
    assert "low/1.png" in refusal(pack, "--source", str(tmp_path / "source"), "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_ray_job_submit_runs_a_clone_that_is_not_installed(command, shards, tmp_path):
    """The clone differs from what may be installed, so that the test sees whose code ran on driver and workers."""
    clone = tmp_path / "clone"
    copy_code(clone)
    shutil.copy(clone / "pipeline/settings/presets/demo.yaml", clone / "pipeline/settings/presets/of_the_clone.yaml")
    with (clone / "pipeline/training/monitor.py").open("a") as file:
        file.write('\nMETRICS = "metrics-of-the-clone.jsonl"\n')
    changes = {"--config": "of_the_clone", "--data.url": shards, "--run.root": str(tmp_path), "--run.name": "job"}
    output = command.submit(clone, "pipeline/train.py", *options(**changes))
    assert re.search(r"Job '\w+' succeeded", output)
    assert re.search(r"^student +\d", output, re.MULTILINE)
    assert (tmp_path / "job/metrics-of-the-clone.jsonl").exists()

"""The training loop on one worker, without a cluster."""

import json
import os
import signal
from contextlib import contextmanager
from threading import Event
from unittest.mock import patch

import pytest
from datasets import packed
from local_training import same, train, train_in_new_process

from pipeline import storage
from pipeline.run.checkpoint import OPTIMIZER, STATE
from pipeline.settings.config import Config
from pipeline.training.monitor import Monitor

STEPS = 20


def settings_of(folder, data, learning_rate=1e30, **train):
    settings = {
        "run": {"name": "run", "root": str(folder)},
        "data": {"url": data, "crop": 32, "cache_gib": 0},
        "network": {"width": 1 / 16},
        "optimizer": {"learning_rate": learning_rate, "warmup_steps": 0},
        "train": {"steps": STEPS, "nonfinite_limit": 3, "log_every": 1} | train,
        "checkpoint": {"every": 4},
    }
    return Config.model_validate(settings)


def test_what_the_user_must_change_ends_the_run_with_the_reason_in_one_line(tmp_path):
    settings = settings_of(tmp_path, "/data")
    older = tmp_path / "run/checkpoint-00000002"
    older.mkdir(parents=True)
    for name in ("student.safetensors", "teacher.safetensors", "optimizer.safetensors"):
        (older / name).touch()
    (older / "state.json").write_text('{"step": 2}')
    train(settings)
    assert (tmp_path / "run/stopped.txt").read_text() == (
        f"{older}: state.json has no checksums, as an older version of this program wrote it; resume the run with "
        "that version"
    )
    (older / "state.json").unlink()  # whatever the next workers would find, they leave it at that
    assert train(settings).printed == ""


def test_a_loss_that_stays_not_finite_stops_the_run_with_the_reason(tmp_path):
    printed = train(settings_of(tmp_path, packed(tmp_path / "pairs"))).printed
    assert printed.count("skipped: the loss or its gradient is not finite") == 3
    assert (tmp_path / "run/stopped.txt").read_text().startswith("3 steps in a row (train.nonfinite_limit)")
    assert f"step {STEPS}/" not in printed


@contextmanager
def upload_after_step_six():
    """Uploads wait for the step after next."""
    reached, record, upload = Event(), Monitor.record, storage.upload_folder

    def record_and_tell(monitor, step, metrics):
        record(monitor, step, metrics)
        if step == 6:
            reached.set()

    def upload_late(*arguments, **options):
        assert reached.wait(60), "no step while a checkpoint is written"
        upload(*arguments, **options)

    with patch.object(Monitor, "record", record_and_tell), patch.object(storage, "upload_folder", upload_late):
        yield


def test_steps_go_on_while_a_checkpoint_is_uploaded_and_the_end_waits(tmp_path):
    run = train(settings_of(tmp_path, packed(tmp_path / "pairs"), 1e-3, steps=8), upload_after_step_six)
    lines = [line.split("  ")[0] for line in run.printed.splitlines() if line.startswith(("step ", "checkpoint "))]
    first = lines.index(f"checkpoint {run.folder}/checkpoint-00000004")
    assert lines.index("step 6/8") < first
    assert lines[-1] == f"checkpoint {run.folder}/checkpoint-00000008"
    assert [record["step"] for record in run.records] == [*range(1, 9)]


@contextmanager
def killed_in_the_middle_of_the_second_checkpoint():
    """Ends the process once a weight file of the second checkpoint is there, before its last file."""
    write = storage.write_bytes

    def write_and_die(url, data):
        write(url, data)
        if url.endswith(f"checkpoint-00000008/{OPTIMIZER}"):
            os.kill(os.getpid(), signal.SIGKILL)

    with patch.object(storage, "write_bytes", write_and_die):
        yield


def test_a_process_killed_while_it_writes_a_checkpoint_leaves_no_trace(tmp_path):
    data = packed(tmp_path / "pairs")
    whole = train(settings_of(tmp_path / "whole", data, 1e-3, steps=12))
    config = settings_of(tmp_path / "torn", data, 1e-3, steps=12)
    second = tmp_path / "torn/run/checkpoint-00000008"
    second.mkdir(parents=True)  # file by file into a folder that is there, as into every one on S3
    with pytest.raises(AssertionError, match="died with status -9"):
        train_in_new_process(config, killed_in_the_middle_of_the_second_checkpoint)
    assert (second / OPTIMIZER).exists() and not (second / STATE).exists()
    torn = train(config)
    assert f"resuming from {torn.folder}/checkpoint-00000004 at step 4" in torn.printed
    for step in (8, 12):
        assert all(same(whole.tensors(file, step), torn.tensors(file, step)) for file in ("student", "teacher"))
        assert same(whole.tensors("optimizer", step), torn.tensors("optimizer", step))
    strip = [[json.dumps(record | {"images_per_s": 0}) for record in run.records] for run in (whole, torn)]
    assert strip[0] == strip[1]

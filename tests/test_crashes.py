"""A run whose worker and then whose driver are killed ends with the bits of one that nothing disturbed."""

import os
import re
import signal
import time

import pytest
from commands import without_colours
from datasets import packed

STEPS, EVERY = 90, 30
WEIGHTS = ("student.safetensors", "teacher.safetensors", "optimizer.safetensors", "state.json")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """Options of a run of a few seconds, with checkpoints far enough apart to be killed between them."""
    url = packed(tmp_path_factory.mktemp("pairs"))
    storage = tmp_path_factory.mktemp("runs")
    changes = {
        "--config": "demo",
        "--data.url": url,
        "--data.crop": "32",
        "--data.cache": str(tmp_path_factory.mktemp("cache")),
        "--network.width": "0.125",
        "--teacher.norm": "separate",
        "--optimizer.zero-stage": "2",
        "--train.steps": str(STEPS),
        "--train.global-batch": "16",
        "--train.log-every": "1",
        "--checkpoint.every": str(EVERY),
        "--evaluation.lpips": "none",
        "--run.storage": str(storage),
    }
    return storage, [part for item in changes.items() for part in item]


def kill_after(process, step, find_victim):
    """Read the run's output until ``step`` is done, kill what ``find_victim`` makes of that line, return the output."""
    output = ""
    for line in process.stdout:
        output += line
        found = re.search(r"\(RayTrainWorker pid=(\d+)\) step (\d+)/", without_colours(line))
        if found and int(found[2]) >= step:
            assert int(found[2]) % EVERY, "the kill must fall between checkpoints"
            os.kill(find_victim(int(found[1])), signal.SIGKILL)
            return output
    raise AssertionError(f"the run ended before step {step}:\n{output}")


def test_killed_worker_and_driver_leave_no_trace(arguments, command):
    storage, options = arguments
    whole, torn = storage / "whole", storage / "torn"
    command("pipeline/train.py", *options, "--run.name", "whole")
    process = command.start("pipeline/train.py", *options, "--run.name", "torn")
    kill_after(process, EVERY + 3, lambda worker: worker)
    output = kill_after(process, 2 * EVERY + 3, lambda worker: process.pid)
    process.wait(30)
    assert re.search(rf"continuing from {torn}/checkpoint-000000{EVERY} at step {EVERY}", without_colours(output))
    assert not (torn / f"checkpoint-000000{STEPS}").exists()
    time.sleep(2)  # Ray notices that the driver is gone and ends its workers
    # Ray writes its list of checkpoints in place, so that a driver may die half way through
    (torn / "checkpoint_manager_snapshot.json").write_text('{"ray_version": "2.')
    output = command("pipeline/train.py", *options, "--run.name", "torn")
    assert f"continuing from {torn}/checkpoint-000000{2 * EVERY} at step {2 * EVERY}" in output
    for name in WEIGHTS:
        checkpoint = f"checkpoint-000000{STEPS}/{name}"
        assert (torn / checkpoint).read_bytes() == (whole / checkpoint).read_bytes(), name
    lines = [(run / "metrics.jsonl").read_text().splitlines() for run in (whole, torn)]
    without_rate = [[re.sub(r'"images_per_s": [\d.]+', "", line) for line in run] for run in lines]
    assert without_rate[0] == without_rate[1]

"""Runs that are killed, asked to stop, or lose a node go on where they were."""

import os
import re
import shutil
import signal
import time
from pathlib import Path
from threading import Thread

import pandas as pd
import psutil
import pytest
import ray
from commands import CPUS, WEIGHTS, options
from terminals import Terminal, press_ctrl_c

from pipeline import interruption, storage
from pipeline.run import history, scores


def at_step(process, step, act):
    """Read what the run shows until ``step`` is done, then ``act``."""
    output = ""
    for line in process.stdout:
        output += line
        found = re.match(r"step (\d+)/", line)
        if found and int(found[1]) >= step:
            act()
            return output
    raise AssertionError(f"the run ended before step {step}:\n{output}")


def training_worker(head):
    """A worker of the run that the head's cluster trains."""
    ours = head.processes()
    named = psutil.process_iter(["cmdline"])  # unlike a process, it has no error for one that has just ended
    return next(each for each in named if each in ours and "RayTrainWorker" in "".join(each.info["cmdline"] or ()))


def ask_to_stop(process, worker):
    """Ask the driver, and hold a worker until all can know, lest the last poll comes first."""
    worker.suspend()
    press_ctrl_c(process)
    time.sleep(1)
    worker.resume()


def assert_no_trace(torn, whole):
    """That weights, metrics and scores of a run of 48 steps are those of one that nothing happened to."""
    for step in (24, 36, 48):
        for name in WEIGHTS:
            path = f"checkpoint-{step:08d}/{name}"
            assert storage.read_bytes(f"{torn}/{path}") == (whole / path).read_bytes(), path
    lines = [storage.read_text(f"{run}/metrics.jsonl").splitlines() for run in (whole, torn)]
    without_rate = [[re.sub(r'"images_per_s": [\d.]+', "", line) for line in run] for run in lines]
    assert without_rate[0] == without_rate[1]
    assert history.unscored_checkpoints(torn) == []
    tables = [scores.read_run(run).query("metric != 'lpips' and step == 48") for run in (str(whole), torn)]
    pd.testing.assert_frame_equal(*(table.reset_index(drop=True) for table in tables))


def test_a_killed_worker_leaves_no_trace_nor_does_s3(trained, command, shards, s3, tmp_path):
    whole, arguments, _ = trained
    bucket = s3.make_bucket()
    torn = f"{bucket}/runs/small"
    storage.upload_folder(Path(shards), f"{bucket}/set")
    arguments = [*arguments, "--data.url", f"{bucket}/set", "--run.root", f"{bucket}/runs"]
    arguments += ["--data.cache", str(tmp_path), "--evaluation.lpips", "none"]
    process = command.start("pipeline/train.py", *arguments)
    at_step(process, 25, lambda: training_worker(command.head).kill())  # the second checkpoint may be half written
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 0, output
    assert re.search(rf"resuming from {torn}/checkpoint-000000(12|24|36) at step \1", output)
    assert f"report: {torn}/report.html" in output
    assert list(tmp_path.rglob("*.tar")) and list(tmp_path.rglob("*.pixels"))
    assert_no_trace(torn, whole)


@pytest.mark.slow
def test_ctrl_c_and_a_killed_driver_and_lost_and_damaged_checkpoints_leave_no_trace(trained, command):
    whole, arguments, _ = trained
    torn = whole.with_name("torn")
    arguments = [*arguments, "--run.name", "torn", "--evaluation.lpips", "none"]
    process = command.start("pipeline/train.py", *arguments)
    at_step(process, 13, lambda: ask_to_stop(process, training_worker(command.head)))
    assert "interrupted; run the same command again to resume" in process.communicate(timeout=60)[0]
    assert process.returncode == interruption.STATUS

    shutil.rmtree(torn / "checkpoint-00000012")  # which Ray's own list, read again, would insist on
    process = command.start("pipeline/train.py", *arguments)
    output = at_step(process, 37, process.kill)
    process.wait(30)
    kept = re.search(rf"resuming from {torn}/interim-000000(\d\d) at step \1", output)
    assert kept and int(kept[1]) > 12
    assert not (torn / "checkpoint-00000048").exists()
    time.sleep(2)  # Ray notices that the driver is gone and ends its workers
    damaged = torn / "checkpoint-00000036/optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    output = command("pipeline/train.py", *arguments)
    assert f"{damaged}: is damaged, its SHA-256 is not that of state.json; this checkpoint is skipped" in output
    assert f"resuming from {torn}/checkpoint-00000024 at step 24" in output
    assert_no_trace(str(torn), whole)
    # the drivers ended with checkpoints that were not scored yet; what was written out of turn is not scored at all
    assert sorted(scores.read_run(str(torn))["step"].unique()) == [24, 36, 48]


def own_ray(command, shards, folder, name, **changes):
    """A training of half a minute at a terminal, whose command starts Ray by itself."""
    environment = command.without_cluster().environment
    changes = {
        "--data.url": shards,
        "--run.root": str(folder),
        "--run.name": name,
        "--train.steps": "2000",
    } | changes
    changes |= {"--train.log-every": "10", "--checkpoint.every": "2000"}
    return Terminal(environment, "pipeline/train.py", *options(**changes))


@pytest.mark.slow
def test_ctrl_c_at_a_terminal_reaches_all_processes_of_a_ray_of_ones_own_and_the_place_is_kept(
    command, shards, tmp_path
):
    user = own_ray(command, shards, tmp_path, "run")
    user.wait_for(r"step 10/2000")
    user.press_ctrl_c()
    assert user.end() == interruption.STATUS, user.shown
    assert user.left.endswith("\ninterrupted; run the same command again to resume\n")
    (interim,) = tmp_path.glob("run/interim-*")
    # the session's Ray runs as well; processes that look for one find two
    log = (tmp_path / "run/log.txt").read_text()
    assert "real_accelerator.py" in log and "multiple active Ray instances" not in log
    again = own_ray(command, shards, tmp_path, "run")
    again.wait_for(rf"resuming from {interim} at step {int(interim.name[-8:])}")
    again.press_ctrl_c()
    again.wait_for("Ctrl-C again ends at once")
    began = time.monotonic()
    again.press_ctrl_c()
    assert again.end() == interruption.KEYBOARD_STATUS and time.monotonic() - began < 10
    wait_until(lambda: not members(again.process.pid))


def members(group):
    """Processes of a group that still run."""
    found = [process for process in psutil.process_iter() if process.status() != psutil.STATUS_ZOMBIE]
    return [process for process in found if os.getpgid(process.pid) == group]


@pytest.mark.slow
def test_ctrl_c_before_ray_runs_ends_with_one_line(command, shards, tmp_path):
    user = own_ray(command, shards, tmp_path, "run")
    user.wait_for("no LPIPS")
    user.press_ctrl_c()
    assert user.end() == interruption.KEYBOARD_STATUS
    assert user.left.splitlines()[1:] == ["interrupted"]


@pytest.mark.slow
def test_a_node_that_says_it_will_go_has_a_checkpoint_written_first(command, driver, shards, tmp_path, monkeypatch):
    monkeypatch.setitem(command.environment, "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1")
    monkeypatch.setitem(command.environment, "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    node = command.head.add_node()
    wait_until(lambda: ray.cluster_resources()["CPU"] == 2 * CPUS)
    changes = {"--data.url": shards, "--run.root": str(tmp_path), "--run.name": "moved", "--train.steps": "1500"}
    changes |= {"--train.log-every": "50", "--checkpoint.every": "1500", "--evaluation.actors": "1"}
    changes |= {"--run.workers": "2", "--run.cpus-per-worker": str(CPUS - 1)}  # one on each node
    process = command.start("pipeline/train.py", *options(**changes))
    lines: list[str] = []
    Thread(target=lambda: lines.extend(process.stdout)).start()
    wait_until(lambda: any("step 50/" in line for line in lines))
    node.terminate()  # Ray says of a node that is told to end that it will go, and has it stay a while
    wait_until(lambda: list(tmp_path.glob("moved/interim-*/state.json")))
    os.killpg(node.pid, signal.SIGKILL)
    node = command.head.add_node()
    assert process.wait(200) == 0, "".join(lines)
    (interim,) = tmp_path.glob("moved/interim-*")
    assert f"resuming from {interim} at step {int(interim.name[-8:])}" in "".join(lines)
    assert (tmp_path / "moved/checkpoint-00001500/scores-dev.parquet").exists()
    os.killpg(node.pid, signal.SIGKILL)


def wait_until(condition, limit_s=120):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)

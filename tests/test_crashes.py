"""Runs that are killed, asked to make way, or lose a node go on where they were."""

import os
import re
import shutil
import signal
import time
from threading import Thread

import pandas as pd
import pytest
import ray
from commands import CPUS, WEIGHTS, options, without_colours

from pipeline import interruption
from pipeline.evaluation import results, scores
from pipeline.training import notices


def at_step(process, step, act):
    """Read the run's output until ``step`` is done, then ``act`` on the process id of the worker that says so."""
    output = ""
    for line in process.stdout:
        output += without_colours(line)
        found = re.search(r"\(RayTrainWorker pid=(\d+)\) step (\d+)/", without_colours(line))
        if found and int(found[2]) >= step:
            act(int(found[1]))
            return output
    raise AssertionError(f"the run ended before step {step}:\n{output}")


def ask_to_make_way(process, worker):
    """Ask the driver, and hold the worker until it is due to look, lest the last step comes first."""
    os.kill(worker, signal.SIGSTOP)
    process.terminate()
    time.sleep(notices.LOOK_S)
    os.kill(worker, signal.SIGCONT)


def test_killed_worker_and_driver_and_a_signal_leave_no_trace(trained, command):
    whole, arguments, _ = trained
    torn = whole.with_name("torn")
    arguments = [*arguments, "--run.name", "torn", "--evaluation.lpips", "none"]
    process = command.start("pipeline/train.py", *arguments)
    at_step(process, 13, lambda worker: os.kill(worker, signal.SIGKILL))
    output = at_step(process, 25, lambda worker: ask_to_make_way(process, worker))
    assert re.search(rf"continuing from {torn}/checkpoint-000000(12|24) at step \1", output)
    assert "interrupted: the same command continues" in process.communicate(timeout=60)[0]
    assert process.returncode == interruption.STATUS

    process = command.start("pipeline/train.py", *arguments)
    output = at_step(process, 37, lambda worker: process.kill())
    process.wait(30)
    kept = re.search(rf"continuing from {torn}/interim-000000(\d\d) at step \1", output)
    assert kept and int(kept[1]) > 24
    assert not (torn / "checkpoint-00000048").exists()
    time.sleep(2)  # Ray notices that the driver is gone and ends its workers
    shutil.rmtree(torn / "checkpoint-00000012")  # which Ray's own list, read again, would insist on
    damaged = torn / "checkpoint-00000036/optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    output = command("pipeline/train.py", *arguments)
    assert f"{damaged}: is damaged, its SHA-256 is not that of state.json; this checkpoint is passed over" in output
    assert f"continuing from {torn}/checkpoint-00000024 at step 24" in output

    for name in WEIGHTS:
        assert (torn / "checkpoint-00000048" / name).read_bytes() == (whole / "checkpoint-00000048" / name).read_bytes()
    lines = [(run / "metrics.jsonl").read_text().splitlines() for run in (whole, torn)]
    without_rate = [[re.sub(r'"images_per_s": [\d.]+', "", line) for line in run] for run in lines]
    assert without_rate[0] == without_rate[1]
    # the drivers ended with checkpoints that were not scored yet; what was written out of turn is not scored at all
    assert results.unscored(str(torn)) == []
    assert sorted(scores.read_run(str(torn))["step"].unique()) == [24, 36, 48]
    tables = [scores.read_run(str(run)).query("metric != 'lpips' and step == 48") for run in (whole, torn)]
    pd.testing.assert_frame_equal(*(table.reset_index(drop=True) for table in tables))


@pytest.mark.slow
def test_a_node_that_says_it_will_go_has_a_checkpoint_written_first(command, driver, shards, tmp_path, monkeypatch):
    monkeypatch.setitem(command.environment, "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1")
    monkeypatch.setitem(command.environment, "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    node = command.head.add_node()
    wait_until(lambda: ray.cluster_resources()["CPU"] == 2 * CPUS)
    changes = {"--data.url": shards, "--run.storage": str(tmp_path), "--run.name": "moved", "--train.steps": "1500"}
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
    assert f"continuing from {interim} at step {int(interim.name[-8:])}" in "".join(lines)
    assert (tmp_path / "moved/checkpoint-00001500/scores-dev.parquet").exists()
    os.killpg(node.pid, signal.SIGKILL)


def wait_until(condition, limit_s=120):
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)

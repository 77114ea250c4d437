"""A run whose worker and then whose driver are killed ends with the bits of one that nothing disturbed."""

import os
import re
import signal
import time

import pandas as pd
from commands import WEIGHTS, without_colours

from pipeline.evaluation import results, scores


def kill_after(process, step, find_victim):
    """Read the run's output until ``step`` is done, kill what ``find_victim`` makes of that line, return the output."""
    output = ""
    for line in process.stdout:
        output += without_colours(line)
        found = re.search(r"\(RayTrainWorker pid=(\d+)\) step (\d+)/", without_colours(line))
        if found and int(found[2]) >= step:
            os.kill(find_victim(int(found[1])), signal.SIGKILL)
            return output
    raise AssertionError(f"the run ended before step {step}:\n{output}")


def test_killed_worker_and_driver_leave_no_trace(trained, command):
    whole, arguments, _ = trained
    torn = whole.with_name("torn")
    arguments = [*arguments, "--run.name", "torn", "--evaluation.lpips", "none"]
    process = command.start("pipeline/train.py", *arguments)
    kill_after(process, 13, lambda worker: worker)
    output = kill_after(process, 25, lambda worker: process.pid)
    process.wait(30)
    assert re.search(rf"continuing from {torn}/checkpoint-000000(12|24) at step \1", output)
    assert not (torn / "checkpoint-00000048").exists()
    time.sleep(2)  # Ray notices that the driver is gone and ends its workers
    # Ray writes its list of checkpoints in place, so that a driver may die half way through
    (torn / "checkpoint_manager_snapshot.json").write_text('{"ray_version": "2.')
    output = command("pipeline/train.py", *arguments)
    assert re.search(rf"continuing from {torn}/checkpoint-000000(24|36) at step \1", output)
    for name in WEIGHTS:
        assert (torn / "checkpoint-00000048" / name).read_bytes() == (whole / "checkpoint-00000048" / name).read_bytes()
    lines = [(run / "metrics.jsonl").read_text().splitlines() for run in (whole, torn)]
    without_rate = [[re.sub(r'"images_per_s": [\d.]+', "", line) for line in run] for run in lines]
    assert without_rate[0] == without_rate[1]
    # the driver died with a checkpoint that was not scored yet, of which Ray knows nothing any more
    assert results.unscored(str(torn)) == []
    tables = [scores.read_run(str(run)).query("metric != 'lpips' and step == 48") for run in (whole, torn)]
    pd.testing.assert_frame_equal(*(table.reset_index(drop=True) for table in tables))

"""Groups of processes joined by gloo, as training workers are; they live as long as the tests."""

import atexit
import functools
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import cloudpickle

WORKER = """
import pickle, sys, traceback
import torch
torch.set_num_threads(1)
store, rank, workers = sys.argv[1:]
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(workers))
for line in sys.stdin:
    payload, result = line.split()
    try:
        function, arguments = pickle.load(open(payload, "rb"))
        outcome = (function(*arguments), None)
    except Exception:
        outcome = (None, traceback.format_exc())
    pickle.dump(outcome, open(result, "wb"))
    sys.__stdout__.write("DONE\\n")
    sys.__stdout__.flush()
"""


class WorkerGroup:
    """``workers`` processes that run the same function together."""

    def __init__(self, workers: int) -> None:
        self._folder = Path(tempfile.mkdtemp())
        self._jobs = 0
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-c", WORKER, str(self._folder / "store"), str(rank), str(workers)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, "LOCAL_RANK": str(rank)},
            )
            for rank in range(workers)
        ]
        atexit.register(self._stop)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What the function returns, by rank; a failure on any worker fails the test with its traceback."""
        self._jobs += 1
        payload = self._folder / f"job-{self._jobs}"
        payload.write_bytes(cloudpickle.dumps((function, arguments)))
        results = [self._folder / f"result-{self._jobs}-{rank}" for rank in range(len(self._processes))]
        for process, result in zip(self._processes, results, strict=True):
            process.stdin.write(f"{payload} {result}\n")
            process.stdin.flush()
        for process in self._processes:
            while (line := process.stdout.readline()) != "DONE\n":
                assert line, f"a worker died with status {process.wait()}"
        outcomes = [pickle.loads(result.read_bytes()) for result in results]
        failures = [failure for _, failure in outcomes if failure]
        assert not failures, "\n".join(failures)
        return [value for value, _ in outcomes]

    def _stop(self) -> None:
        for process in self._processes:
            process.kill()


@functools.cache
def _group(workers: int) -> WorkerGroup:
    return WorkerGroup(workers)


def run_workers(workers: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``function(*arguments)`` returns on each of ``workers`` processes, by rank."""
    cloudpickle.register_pickle_by_value(sys.modules[function.__module__])
    return _group(workers).run(function, *arguments)

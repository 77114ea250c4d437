"""Runs a function in several processes that form a gloo group, as training workers do."""

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
import pickle, sys
import torch
torch.set_num_threads(1)
store, payload, result, rank, workers = sys.argv[1:]
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(workers))
function, arguments = pickle.load(open(payload, "rb"))
value = function(*arguments)
torch.distributed.barrier()
pickle.dump(value, open(result, "wb"))
"""


def run_workers(workers: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``function(*arguments)`` returns on each of ``workers`` processes, by rank."""
    cloudpickle.register_pickle_by_value(sys.modules[function.__module__])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "payload").write_bytes(cloudpickle.dumps((function, arguments)))
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", WORKER, *map(str, [folder / "store", folder / "payload"])]
                + [str(folder / f"result-{rank}"), str(rank), str(workers)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, "LOCAL_RANK": str(rank)},
            )
            for rank in range(workers)
        ]
        outputs = [process.communicate(timeout=300)[0] for process in processes]
        for process, output in zip(processes, outputs, strict=True):
            assert process.returncode == 0, output
        return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(workers)]

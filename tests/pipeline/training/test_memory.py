"""Freed memory is kept: steps that free and take the same blocks bring no page faults."""

import platform
import subprocess
import sys

import pytest

# in a thread, as Ray's workers train; the blocks are of sizes that glibc maps anew, and that it trims a heap by
PROGRAM = """
import resource, sys, threading
import torch
from pipeline.training.memory import keep_freed_memory

def step():
    blocks = [torch.ones(megabytes << 18) for megabytes in (1, 3, 20, 40)]

def count():
    if "keep" in sys.argv:
        keep_freed_memory()
    for _ in range(10):  # after which the blocks' places repeat
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=count)
thread.start()
thread.join()
"""


def count_faults(*arguments: str) -> int:
    run = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_steps_bring_no_page_faults():
    assert count_faults() > 10_000
    assert count_faults("keep") < 100

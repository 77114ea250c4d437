"""Processes to measure in, the machine in words, and tables in Markdown."""

import os
import platform
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class Process:
    """A fresh Python process that is kept on some of the machine's cores and does one thing after the other."""

    def __init__(self, cores: Iterable[int]) -> None:
        self._executor = ProcessPoolExecutor(1, get_context("spawn"), stay_on, (set(cores),))

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown(cancel_futures=True)

    def start(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> Future[R]:
        """What the function will return, or raise, in the process."""
        return self._executor.submit(function, *args, **kwargs)

    def call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """What the function returns, or raises, in the process."""
        return self.start(function, *args, **kwargs).result()


def memory(field: str) -> float:
    """A figure of this process in MB, such as ``VmRSS``, its peak ``VmHWM``, or ``RssAnon``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{field}:"))


def machine() -> str:
    """The processor and the number of its cores."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(models, platform.machine())}, {len(os.sched_getaffinity(0))} cores"


def spread(values: Sequence[float], digits: int = 0) -> str:
    """The median, and in brackets the lowest and the highest value."""
    middle, least, most = (f"{value:,.{digits}f}" for value in (median(values), min(values), max(values)))
    return f"{middle} ({least} to {most})"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)


def stay_on(cores: Collection[int]) -> None:
    """Keep this process on some of the machine's cores."""
    # Libraries start threads when they are imported, before this is called.
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), cores)

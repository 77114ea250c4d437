"""Graceful shutdown: a job that is asked to stop writes a checkpoint, and ends soon, with a status of its own.

SIGTERM or Ctrl-C to the driver -> a mark in Ray's key-value store, which all processes of the job can see
    -> workers write a checkpoint and return; scoring is left for later; no further run begins
    -> the driver exits with STATUS, and the same command resumes
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Thread
from types import FrameType
from typing import TypeVar

import ray

from pipeline import ray_internals, terminal

STATUS = 75  # EX_TEMPFAIL of sysexits.h: try again later
KEYBOARD_STATUS = 128 + signal.SIGINT  # what shells say of a command that Ctrl-C has ended
PARTING_S = 0.5

Result = TypeVar("Result")
_listens = False  # whether this process is a driver that shuts down gracefully


class JobInterruptedError(Exception):
    """The job was asked to stop; the same command resumes it."""


@contextmanager
def graceful_shutdown() -> Iterator[None]:
    """Within, on a driver that Ray knows, SIGTERM and Ctrl-C ask the job to stop; Ctrl-C again ends it at once.

    Exits with ``STATUS`` when the body gave up for it.
    """
    global _listens
    is_asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal is_asked
        by_hand = number == signal.SIGINT
        if by_hand and is_asked:
            parting = Thread(target=terminal.hang_up, daemon=True)
            parting.start()
            parting.join(PARTING_S)  # this thread may be in the middle of a line, and hold what it needs
            os._exit(KEYBOARD_STATUS)  # what this process has started ends with it
        is_asked = is_asked or by_hand
        # in a thread, for this one may be in the middle of a call of Ray, or of writing a line
        Thread(target=_begin_shutdown, args=[by_hand]).start()

    # a command in a shell's background ignores Ctrl-C, which is meant for another
    numbers = [each for each in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(each) is not signal.SIG_IGN]
    before = {number: signal.signal(number, ask) for number in numbers}
    _listens = True
    try:
        yield
    except JobInterruptedError:
        terminal.log("interrupted; run the same command again to resume")
        sys.exit(STATUS)
    finally:
        _listens = False
        for number, handler in before.items():
            signal.signal(number, handler)


def run_shielded(call: Callable[[], Result]) -> Result:
    """Call what would take Ctrl-C for itself in a driver's main thread, as Ray Train does, and return what it returns.

    In a Ray task, whose cancelling comes to Ray Train in the same way, it is left as it is.
    """
    if not _listens:
        return call()
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(call).result()


def request() -> None:
    """Ask this process's job to stop."""
    ray_internals.set_mark(_key())


def requested() -> bool:
    """Whether this process's job is asked to stop; costs a call to Ray's head."""
    return ray.is_initialized() and ray_internals.has_mark(_key())


def check() -> None:
    """``JobInterruptedError`` when this process's job is asked to stop."""
    if requested():
        raise JobInterruptedError


def _begin_shutdown(by_hand: bool) -> None:
    if by_hand:
        terminal.log("stopping after the next checkpoint; Ctrl-C again ends at once")
    request()


def _key() -> str:
    return f"iaml-interruption-{ray.get_runtime_context().get_job_id()}"

"""A job that is asked to make way ends soon, keeps its place, and says so by a status of its own.

SIGTERM to the driver -> a mark in Ray's key-value store, which all processes of the job can see
    -> workers write a checkpoint and return; scoring is left for later; no further run begins
    -> the driver exits with STATUS, and the same command continues
"""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from types import FrameType

import ray
from ray.experimental.internal_kv import _internal_kv_exists, _internal_kv_initialized, _internal_kv_put

STATUS = 75  # EX_TEMPFAIL of sysexits.h: try again later


class JobInterruptedError(Exception):
    """The job was asked to make way; the same command continues."""


@contextmanager
def made_way_for() -> Iterator[None]:
    """Within, on a driver that Ray knows, SIGTERM asks the job to make way.

    Exits with ``STATUS`` when the body gave up for it.
    """

    def ask(number: int, frame: FrameType | None) -> None:
        Thread(target=request).start()  # Ray may be in the middle of a call in this one

    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    except JobInterruptedError:
        print("interrupted: the same command continues", flush=True)
        sys.exit(STATUS)
    finally:
        signal.signal(signal.SIGTERM, before)


def request() -> None:
    """Ask this process's job to make way."""
    _internal_kv_put(_key(), b"")


def requested() -> bool:
    """Whether this process's job is asked to make way; costs a call to Ray's head."""
    return _internal_kv_initialized() and bool(_internal_kv_exists(_key()))


def check() -> None:
    """``JobInterruptedError`` when this process's job is asked to make way."""
    if requested():
        raise JobInterruptedError


def _key() -> bytes:
    return f"iaml-interruption-{ray.get_runtime_context().get_job_id()}".encode()

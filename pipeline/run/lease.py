"""The lease of a run: one process at a time trains it, whatever else is started, on this machine or another.

<run>/lease.json    who trains the run, and a count that moves every ``HEARTBEAT_S``; gone when nobody does

Clocks of two machines are never compared: a newcomer watches whether the count moves. Where it stands still for
``BEATS`` beats, or where the process is known to have ended, the newcomer takes the lease over. Workers look whose
it is before they write, so that one who lost it without noticing harms nothing. Writes are conditional (``storage
.write_if``); where storage does not hold to the condition, the last of two who take it at the same moment keeps it,
and the other one finds out at its next beat.
"""

import getpass
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path

from pipeline import storage, terminal

LEASE = "lease.json"
HEARTBEAT_S = 10.0
BEATS = 3  # without any the holder is taken for lost
POLL_S = 1.0


class LeaseLostError(RuntimeError):
    """Another process has taken the run over."""


@dataclass(frozen=True)
class Holder:
    """A process that trains a run.

    Attributes:
        id: of the lease, drawn when it was taken.
        host, user, pid, since: who it is and when it began, to be shown.
        machine: the boot and the process namespace in which ``pid`` has a meaning.
        started: when the process began, in ticks since the boot; with ``pid`` it names one process.
        beat: moves as long as the process lives.
    """

    id: str
    host: str
    user: str
    pid: int
    since: str
    machine: str
    started: str
    beat: int = 0

    @classmethod
    def this_process(cls) -> "Holder":
        """This process, under a new id."""
        since = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        pid = os.getpid()
        return cls(uuid.uuid4().hex, socket.gethostname(), _user(), pid, since, _machine(), _start_of(pid) or "")

    @classmethod
    def parse(cls, data: bytes) -> "Holder | None":
        """The holder in a lease's file; none where it holds something else, such as half of one."""
        try:
            return cls(**json.loads(data))
        except (ValueError, TypeError):
            return None

    def is_gone(self) -> bool:
        """Whether the process is known to have ended, which can be said of this machine's alone."""
        return self.machine == _machine() and _start_of(self.pid) != self.started

    def __str__(self) -> str:
        return f"process {self.pid} of {self.user} on {self.host} has trained this run since {self.since}"


@contextmanager
def hold(run: str) -> Iterator[str]:
    """Within, this process trains the run, and no other; gives the id by which workers ``check`` that it still does.

    Should another process take the run over all the same, this one's main thread is interrupted.

    Raises:
        ValueError: another process trains the run, or has taken it over.
    """
    lease = _Lease(run)
    lease.acquire()
    lease.start()
    try:
        yield lease.holder.id
    except BaseException as error:
        if lease.lost_to:
            raise ValueError(lease.loss) from error
        raise
    finally:
        lease.release()
    if lease.lost_to:
        raise ValueError(lease.loss)


def check(run: str, id: str) -> None:
    """``LeaseLostError`` when the lease of ``run`` is another's than that of ``id``."""
    other = _other_holder(run, id)
    if other:
        raise LeaseLostError(f"{run}: {other}; what this process was about to write there is dropped")


def is_lost(run: str, id: str) -> bool:
    """Whether the lease of ``run`` is another's than that of ``id``."""
    return _other_holder(run, id) is not None


class _Lease(threading.Thread):
    """A lease as its holder has it, and the thread that keeps it."""

    def __init__(self, run: str) -> None:
        super().__init__(name="lease", daemon=True)
        self.holder = Holder.this_process()
        self.lost_to: Holder | None = None
        self._run_url, self._url = run, storage.join(run, LEASE)
        self._version: str | None = None
        self._end = threading.Event()

    @property
    def loss(self) -> str:
        """What happened when it was lost."""
        return f"{self._run_url}: {self.lost_to} and took it over from this process, which missed its heartbeats"

    def acquire(self) -> None:
        """Take the lease; ``ValueError`` when its holder lives."""
        seen: Holder | None = None
        until = 0.0
        while True:
            found = storage.read_version(self._url)
            holder = Holder.parse(found[0]) if found else None
            if holder and not holder.is_gone():
                if not seen or seen.id != holder.id:
                    seen, until = holder, time.monotonic() + BEATS * HEARTBEAT_S
                    terminal.log(
                        f"{self._run_url}: {holder}; waiting up to {BEATS * HEARTBEAT_S:.0f} s for a sign of it"
                    )
                if holder.beat != seen.beat:
                    raise ValueError(f"{self._run_url}: {holder}; wait for it, stop it, or choose another run.name")
                if time.monotonic() < until:
                    time.sleep(POLL_S)
                    continue
            if self._write(found[1] if found else None):
                return

    def run(self) -> None:
        """Beat until the end; when the lease turns out to be another's, interrupt the main thread."""
        while not self._end.wait(HEARTBEAT_S):
            try:
                self._heartbeat()
            except OSError:  # storage is out of reach: for others too, or they take over and the next beat tells
                continue
            if self.lost_to:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                return

    def release(self) -> None:
        """Let another process train the run."""
        self._end.set()
        if self.is_alive():
            self.join()
        with suppress(OSError):  # out of reach it grows stale
            found = storage.read_version(self._url)
            if found and self._is_ours(found[0]):
                storage.delete(self._url)

    def _write(self, version: str | None) -> bool:
        """Write the lease in the place of ``version``; whether it is ours then."""
        self._version = storage.write_if(self._url, json.dumps(asdict(self.holder), indent=2).encode(), version)
        if self._version is None or version is None:
            return self._version is not None
        time.sleep(POLL_S)  # another newcomer may have written at the same moment
        found = storage.read_version(self._url)
        return found is not None and self._is_ours(found[0])

    def _heartbeat(self) -> None:
        self.holder = replace(self.holder, beat=self.holder.beat + 1)
        data = json.dumps(asdict(self.holder), indent=2).encode()
        version = storage.write_if(self._url, data, self._version)
        if version is None:
            found = storage.read_version(self._url)
            if found is None:  # deleted by hand
                version = storage.write_if(self._url, data, None)
            elif self._is_ours(found[0]):  # written all the same, only the answer was lost
                version = found[1]
            else:
                version, self.lost_to = found[1], Holder.parse(found[0])  # none where it is no lease any more
        self._version = version

    def _is_ours(self, data: bytes) -> bool:
        holder = Holder.parse(data)
        return holder is not None and holder.id == self.holder.id


def _other_holder(run: str, id: str) -> Holder | None:
    found = storage.read_version(storage.join(run, LEASE))
    holder = Holder.parse(found[0]) if found else None
    return holder if holder and holder.id != id else None


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid())


def _machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()}"


def _start_of(pid: int) -> str | None:
    """When a process of this machine began, in ticks since the boot; none where it has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else fields[18]

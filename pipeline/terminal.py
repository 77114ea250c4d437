"""How a command speaks to its user, wherever in its job the words arise.

``log`` in a worker -> a marked line of its output -> Ray's log monitor -> the driver -> terminal and log file
what else any process of the job prints, libraries in the driver included ------------> log file

On a terminal, progress is one line at the bottom that is drawn anew; elsewhere each line follows the last.
"""

import functools
import json
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from pipeline import ray_internals, storage

LOG = "log.txt"
MARK = "\x1e"  # between a worker's words to the user and what else they say
UPLOAD_S = 60.0
QUIET_S, LONGEST_S = 0.3, 3.0  # without a line, and in all, until it is taken that no more will come
PLAIN_S = 30.0  # between two lines of a bar in a log
NAMES_SHOWN = 20
COLUMNS = 80  # of a terminal that does not say


def log(text: str, *, live: str | None = None, score: str | None = None) -> None:
    """Show lines at once: in a worker, on its driver's terminal.

    Args:
        text: the lines.
        live: shorter words on how far the run is, which a terminal shows in their stead, in its line at the bottom.
        score: what that line calls the last score from now on.
    """
    if _screen:
        _screen.log(text, live, score)
        return
    extra = json.dumps({"live": live, "score": score}) if ray_internals.is_worker() else ""
    for line in text.split("\n"):
        # Ray Train's own `print` would show it twice
        sys.stdout.write(f"{line}{MARK}{extra}\n" if extra else f"{line}\n")
    sys.stdout.flush()


@functools.cache
def log_once(text: str) -> None:
    """``log`` what a process would otherwise log each time that it comes upon it."""
    log(text)


def bar(iterable: Iterable[Any] | None = None, *, title: str, total: int, unit: str, hidden: bool = False) -> Any:
    """A ``tqdm`` bar over ``iterable``, or to be moved by hand; where nobody watches, a line now and then."""
    stream = _screen.errors if _screen else sys.stderr
    if stream.isatty() or hidden:
        return tqdm(iterable, title, total, unit=unit, file=stream, disable=hidden)
    form = "{desc}: {n_fmt}/{total_fmt} {unit}"
    return tqdm(iterable, title, total, unit=unit, file=_Lines(stream), mininterval=PLAIN_S, bar_format=form)


@contextmanager
def session(url: str | None) -> Iterator[None]:
    """Within, only what is said or drawn as a bar comes to the terminal; all that is printed goes to a log file.

    What fails within is in the log as well, with its traceback, and its message names the log.

    Args:
        url: of the log file, which is continued; without one it is a temporary file, kept where something fails.
    """
    global _screen
    log = _Log(url)
    kept = [os.dup(1), os.dup(2)]
    _screen = screen = _Screen(_text(kept[0]), _text(kept[1]), log)
    _turn_output([log.number, log.number])

    def end(failed: bool) -> str:
        global _screen
        if failed:
            traceback.print_exc()
        _turn_output(kept)
        _screen = None
        screen.close()
        return log.close(keep=failed)

    try:
        yield
    except Exception as error:
        error.add_note(f"details: {end(failed=True)}")
        raise
    except SystemExit as error:
        failed = isinstance(error.code, str)  # a message, and no status of an end that was asked for
        place = end(failed)
        if failed:
            error.code = f"{error.code}\ndetails: {place}"
        raise
    except BaseException:
        end(failed=False)
        raise
    else:
        end(failed=False)


@contextmanager
def relay(*, shown: bool = True) -> Iterator[None]:
    """Within a session, once Ray runs: what its processes print comes to the log, and what they say to the terminal.

    Args:
        shown: whether what they say is shown; of many runs at a time it is not, since nobody could tell whose it is.
    """
    screen = _screen
    assert screen is not None
    newest = time.monotonic()

    def receive(source: str, line: str) -> None:
        nonlocal newest
        newest = time.monotonic()
        text, _, extra = line.partition(MARK)
        screen.file.write(f"({source}) {text}")
        if extra and shown:
            with suppress(ValueError):  # Ray may have read half a line
                screen.show(text, **json.loads(extra))

    with ray_internals.redirect_worker_output(receive):
        try:
            yield
        finally:
            deadline = time.monotonic() + LONGEST_S
            while time.monotonic() < min(deadline, max(newest, deadline - LONGEST_S) + QUIET_S):
                time.sleep(QUIET_S / 10)


def bullet_list(names: Iterable[str]) -> str:
    """The first names, one indented line each, and how many more there are."""
    lines = [f"  {name}" for name in names]
    more = len(lines) - NAMES_SHOWN
    return "\n".join(lines[:NAMES_SHOWN] + ([f"  ... and {more} more"] if more > 0 else []))


def hang_up() -> None:
    """Leave a terminal whose process is about to end without further ado as a shell wants to find it."""
    if _screen:
        _screen.close()


class _Screen:
    """The user's terminal, or the pipe or file in its place, while what is printed goes to the log."""

    def __init__(self, out: TextIO, errors: TextIO, log: "_Log") -> None:
        self.errors = errors
        self.file = log
        self._out = out
        self._is_live = out.isatty() and os.environ.get("TERM") != "dumb"
        self._live = self._score = ""
        self._lock = threading.RLock()  # of a signal's handler as well

    def log(self, text: str, live: str | None, score: str | None) -> None:
        for line in text.split("\n"):
            self.file.write(line)
        self.show(text, live, score)

    def show(self, text: str, live: str | None, score: str | None) -> None:
        with self._lock, suppress(OSError), tqdm.external_write_mode(file=self.errors):  # nobody may be there any more
            if self._is_live:
                self._out.write("\r\x1b[2K")
            if not (live and self._is_live):
                self._out.write(f"{text}\n")
            self._live, self._score = live or self._live, score or self._score
            self._draw()
            self._out.flush()

    def close(self) -> None:
        self._live = ""
        with self._lock, suppress(OSError):
            if self._is_live:
                self._out.write("\r\x1b[2K")
            self._out.close()
        with suppress(OSError):
            self.errors.close()

    def _draw(self) -> None:
        if self._is_live and self._live:
            words = self._live + (f"  last score: {self._score}" if self._score else "")
            columns = os.get_terminal_size(self._out.fileno()).columns or COLUMNS
            self._out.write(words[: columns - 1])


class _Log:
    """A log file, which several processes and threads may write lines to; one on S3 is a local file until uploaded."""

    def __init__(self, url: str | None) -> None:
        self._url = url if url and not storage.is_local(url) else None
        if url and not self._url:
            self._path = Path(storage.absolute(url))
            self._path.parent.mkdir(parents=True, exist_ok=True)
        else:
            handle, name = tempfile.mkstemp(prefix="iaml-", suffix=f"-{LOG}")
            os.close(handle)
            self._path = Path(name)
        self._is_temporary = url is None
        if self._url and storage.exists(self._url):
            self._path.write_bytes(storage.read_bytes(self._url))
        self.number = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._ended = threading.Event()
        if self._url:
            threading.Thread(target=self._upload_now_and_then, name="log", daemon=True).start()

    def write(self, line: str) -> None:
        with suppress(OSError):  # a disk may be full
            os.write(self.number, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n".encode(errors="replace"))

    def close(self, *, keep: bool) -> str:
        """Returns where the log is."""
        self._ended.set()
        os.close(self.number)
        if self._is_temporary and not keep:
            self._path.unlink()
        if self._url:
            try:
                self._upload()
            except OSError as error:
                return f"{self._path} ({self._url} could not be written: {error})"
            self._path.unlink()
            return self._url
        return str(self._path)

    def _upload(self) -> None:
        assert self._url is not None
        storage.write_bytes(self._url, self._path.read_bytes())

    def _upload_now_and_then(self) -> None:
        while not self._ended.wait(UPLOAD_S):
            with suppress(OSError):
                self._upload()


class _Lines:
    """Writes what a bar would draw over itself as lines."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if text.strip():
            self._stream.write(f"{text.strip()}\n")

    def flush(self) -> None:
        self._stream.flush()


_screen: _Screen | None = None  # while a session lasts


def _turn_output(descriptors: Sequence[int]) -> None:
    """Let what this process prints, its libraries in other languages included, go elsewhere."""
    for stream, number, descriptor in zip((sys.stdout, sys.stderr), (1, 2), descriptors, strict=True):
        stream.flush()
        os.dup2(descriptor, number)


def _text(descriptor: int) -> TextIO:
    return os.fdopen(descriptor, "w", encoding=sys.stdout.encoding, errors="replace", buffering=1)

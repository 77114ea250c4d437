"""A node's cache: shards from S3 and decoded images on a local disk, shared by all processes of the node.

<folder>/lock                         held while space is shared out
<folder>/<data set>/in-use            locked by each process that reads the data set
<folder>/<data set>/reserved          how many bytes the data set may take
<folder>/<data set>/<sha256>.tar      a shard as it was packed
<folder>/<data set>/<sha256>.pixels   its images, as far as they were decoded
<folder>/<data set>/*.partial         being written, and locked by its writer

Nothing is believed for its name: each process compares a shard with its checksum when it opens it first, and each
decoded pair bears a checksum of its own. So a process may be killed, and a machine may fail, at any point.
A disk that is full or can't be written to is said once; reading goes on without it.
"""

import fcntl
import logging
import mmap
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Lock, Semaphore
from typing import BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from pipeline.data.manifest import ShardRecord
from pipeline.data.pairs import Pair

logger = logging.getLogger(__name__)

LOCK, IN_USE, RESERVED = "lock", "in-use", "reserved"
MOST_WAITING = 4  # decoded pairs that wait to be written
DISK_SHARE = 0.9  # of the free space, so that a node's disk is never filled up on purpose
HEADER = np.dtype([("magic", "<i8"), ("pairs", "<i8")])
SLOT = np.dtype([("offset", "<i8"), ("room", "<i8"), ("height", "<i4"), ("width", "<i4"), ("check", "<i8")])
MAGIC = int.from_bytes(b"pixels\0\1", "little")  # with the layout's version
PAIR_CHANNELS = 6  # bytes of a pixel of both images


class Cache:
    """One data set's part of a node's cache.

    Args:
        folder: the node's cache; made if it is not there.
        limit: most bytes that all data sets in it may take.
        name: of the data set; the same name means the same bytes.
        shards: bytes of its shards; 0 if they lie on a disk already.
        pixels: bytes of its decoded images.

    Attributes:
        keeps_pixels: whether there is room for all decoded images.
        written_bytes: that this process put there.
    """

    def __init__(self, folder: Path, limit: int, name: str, shards: int, pixels: int) -> None:
        self.keeps_pixels = False
        self.written_bytes = 0
        self._count_lock = Lock()
        self._root = folder.expanduser()
        self._folder = self._root / name
        self._room = 0
        self._all_fits = False
        self._broken = False
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="cache")
        self._waiting = Semaphore(MOST_WAITING)
        with self._or_without():
            self._root.mkdir(parents=True, exist_ok=True)
            with _locked(self._root / LOCK):
                self._folder.mkdir(exist_ok=True)
                self._in_use = (self._folder / IN_USE).open("w")
                fcntl.flock(self._in_use, fcntl.LOCK_SH)
                os.utime(self._in_use.fileno())
                self._reserve(limit, shards, pixels)

    def __str__(self) -> str:
        """What is kept, for the log."""
        if not self.room_bytes:
            return f"cache {self._root}: no room for this data set; it is read and decoded anew in each epoch"
        kept = "decoded images" if self.keeps_pixels else "shards (decoded images do not fit)"
        return f"cache {self._root}: keeps {kept}, up to {self.room_bytes / 2**30:.2f} GiB"

    @property
    def room_bytes(self) -> int:
        """How much of the data set may be kept; 0 once the disk has failed."""
        return 0 if self._broken else self._room

    def shard(self, record: ShardRecord) -> mmap.mmap | None:
        """The bytes of a shard, if it is there."""
        with self._or_without():
            return map_file(self._folder / f"{record.sha256}.tar", record.size)
        return None

    def new_shard(self, record: ShardRecord) -> AbstractContextManager["NewFile | None"]:
        """A file for the bytes of a shard, which other processes wait for while the block lasts.

        ``None`` if there is no room or another process, for which this one waited, has put the shard there.
        """
        return self._new_file(self._folder / f"{record.sha256}.tar", record.size)

    def drop_shard(self, record: ShardRecord) -> None:
        """Forget a shard whose bytes are no longer those that were put there."""
        with self._or_without():
            (self._folder / f"{record.sha256}.tar").unlink(missing_ok=True)

    def pixels(self, record: ShardRecord) -> "PixelFile | None":
        """The decoded images of a shard, if there are any."""
        with self._or_without():
            return PixelFile.open(self._folder / f"{record.sha256}.pixels", record.pairs)
        return None

    def new_pixels(self, record: ShardRecord, areas: Sequence[int]) -> "PixelFile | None":
        """Slots for the decoded images of a shard, of ``areas`` in pixels; ``None`` if there is no room."""
        with self._new_file(self._folder / f"{record.sha256}.pixels", PixelFile.size(areas)) as file:
            if file:
                file.write(PixelFile.header(areas), 0)
                file.finish()
        return self.pixels(record)

    def keep(self, pixels: "PixelFile", sample: int, pair: Pair) -> None:
        """Put a decoded pair into its slot: in the background, unless ``MOST_WAITING`` wait already."""
        if self._waiting.acquire(blocking=False):
            self._writer.submit(self._put, pixels, sample, pair).add_done_callback(lambda _: self._waiting.release())
        else:
            self._put(pixels, sample, pair)

    def _put(self, pixels: "PixelFile", sample: int, pair: Pair) -> None:
        if not self._broken:
            with self._or_without():
                self._count(pixels.put(sample, pair))

    def _count(self, size: int) -> None:
        with self._count_lock:
            self.written_bytes += size

    def _reserve(self, limit: int, shards: int, pixels: int) -> None:
        """Share out the space: all decoded images if they fit, otherwise as many of the shards as fit."""
        disk = int(DISK_SHARE * shutil.disk_usage(self._root).free) + _size(self._folder)
        most = min(limit, disk)
        wanted = shards + pixels if shards + pixels <= most else min(shards, most)
        room = min(wanted, max(0, limit - self._make_room(limit - wanted)))
        self.keeps_pixels = 0 < shards + pixels <= room
        self._room = room if self.keeps_pixels else min(room, shards)
        self._all_fits = self._room >= shards
        (self._folder / RESERVED).write_text(str(self._room))

    def _make_room(self, most: int) -> int:
        """Delete idle data sets, the least recently used first, until they take ``most`` bytes; what they take."""
        others = [path for path in self._root.iterdir() if path.is_dir() and path != self._folder]
        idle = [path for path in others if not _is_in_use(path)]
        taken = {path: _size(path) if path in idle else max(_size(path), _reserved(path)) for path in others}
        for path in sorted(idle, key=_last_used):
            if sum(taken.values()) > most:
                shutil.rmtree(path)
                del taken[path]
        return sum(taken.values())

    @contextmanager
    def _new_file(self, path: Path, size: int) -> Iterator["NewFile | None"]:
        """A file of ``size`` bytes that appears at ``path`` when it is finished; ``None`` if it can't be new."""
        partial = path.with_name(f"{path.name}.partial")
        with ExitStack() as stack:
            is_new = False
            with self._or_without():
                file = stack.enter_context(os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b"))
                stack.enter_context(_flock(file.fileno()))  # waits for another writer; a killed one has let go
                is_ours = _is_at(file.fileno(), partial)
                is_new = is_ours and _size_of(path) != size and self._take_room(file, size)
                if is_ours and not is_new:
                    partial.unlink()
            made = NewFile(file, partial, path, self._or_without) if is_new else None
            if made is None:
                stack.close()
            yield made
            if made:
                self._count(made.written_bytes)

    def _take_room(self, file: BinaryIO, size: int) -> bool:
        """Give the file its size, by which others see its room taken, if there is so much."""
        with _locked(self._root / LOCK):
            file.truncate(0)
            if self._broken or not self._room or (not self._all_fits and _size(self._folder) + size > self._room):
                return False
            file.truncate(size)
        return True

    @contextmanager
    def _or_without(self) -> Iterator[None]:
        """Go on without the cache when its disk is full or can't be used."""
        try:
            yield
        except OSError as error:
            if not self._broken:
                logger.warning("cache %s: %s; going on without it", self._root, error)
            self._broken, self.keeps_pixels = True, False


class NewFile:
    """A file in the making, of which ``written_bytes`` are there. Where its disk fails, it is never finished."""

    def __init__(
        self, file: BinaryIO, partial: Path, path: Path, or_without: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._file = file
        self._partial = partial
        self._path = path
        self._or_without = or_without
        self._is_whole = True
        self.written_bytes = 0

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Put bytes at their place."""
        written = 0
        with self._or_without():
            self._file.seek(offset)
            written = self._file.write(data)
            self._file.flush()
        self.written_bytes += written
        self._is_whole &= written == len(data)

    def finish(self) -> None:
        """Let the file appear."""
        if self._is_whole:
            with self._or_without():
                self._partial.rename(self._path)


class PixelFile:
    """The decoded pairs of one shard: RGB, uint8, (H, W, 3), in slots of a file that all processes map.

    A slot holds the low-light image, then the clean one. Its checksum is written last; a slot whose checksum is not
    that of its bytes is empty. Files are written by calls and read by maps: writing to a map costs far more.
    """

    def __init__(self, file: BinaryIO, data: mmap.mmap, slots: np.ndarray) -> None:
        self._file = file
        self._data = data
        self._slots = slots
        self._known: dict[int, Pair] = {}  # compared with their checksums by this process, or written by it

    @staticmethod
    def size(areas: Sequence[int]) -> int:
        """Bytes of a file for pairs of ``areas`` in pixels."""
        return HEADER.itemsize + len(areas) * SLOT.itemsize + PAIR_CHANNELS * sum(areas)

    @staticmethod
    def header(areas: Sequence[int]) -> bytes:
        """What an empty file begins with; the rest of it is zeros."""
        slots = np.zeros(len(areas), SLOT)
        slots["room"] = PAIR_CHANNELS * np.asarray(areas)
        slots["offset"] = _offsets(slots)
        return np.array((MAGIC, len(areas)), HEADER).tobytes() + slots.tobytes()

    @classmethod
    def open(cls, path: Path, pairs: int) -> "PixelFile | None":
        """The file at ``path``, if it is there; one that is not whole is deleted."""
        data = map_file(path)
        if data is None:
            return None
        least = HEADER.itemsize + pairs * SLOT.itemsize
        if len(data) >= least and np.frombuffer(data, HEADER, count=1)[0].item() == (MAGIC, pairs):
            slots = np.frombuffer(data, SLOT, count=pairs, offset=HEADER.itemsize)
            if np.array_equal(slots["offset"], _offsets(slots)) and len(data) == least + slots["room"].sum():
                return cls(path.open("r+b", buffering=0), data, slots)
        path.unlink(missing_ok=True)
        return None

    @property
    def complete(self) -> bool:
        """Whether all pairs are there."""
        return bool(self._slots["check"].all())

    def get(self, sample: int) -> Pair | None:
        """A pair, mapped, if it is there."""
        known = self._known.get(sample)
        if known is None and (slot := self._slots[sample])["check"]:
            pair = self._view(slot)
            if pair and slot["check"] == _checksum(pair):
                self._known[sample] = known = pair
        return known

    def put(self, sample: int, pair: Pair) -> int:
        """Keep a pair, of so many bytes; one that is larger than its slot is not kept."""
        slot = self._slots[sample].copy()
        slot["height"], slot["width"], _ = pair.low.shape
        slot["check"] = _checksum(pair)
        view = self._view(slot)
        if view is None:
            return 0
        written = os.pwritev(self._file.fileno(), [pair.low.data, pair.clean.data], int(slot["offset"]))
        os.pwrite(self._file.fileno(), slot.tobytes(), HEADER.itemsize + sample * SLOT.itemsize)
        self._known[sample] = view
        return written

    def _view(self, slot: np.void) -> Pair | None:
        height, width = int(slot["height"]), int(slot["width"])
        size = PAIR_CHANNELS * height * width
        if not 0 < size <= slot["room"]:
            return None
        images = np.frombuffer(self._data, np.uint8, count=size, offset=int(slot["offset"]))
        return Pair(*images.reshape(2, height, width, 3))


def map_file(path: Path, size: int | None = None) -> mmap.mmap | None:
    """The bytes of a file, mapped; ``None`` if it is not there, is empty, or has not the ``size`` asked for."""
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno()).st_size
            return mmap.mmap(file.fileno(), found, access=mmap.ACCESS_READ) if found and size in (None, found) else None
    except FileNotFoundError:
        return None


def _size_of(path: Path) -> int:
    """Bytes of a file; 0 if it is not there."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _offsets(slots: np.ndarray) -> NDArray[np.int64]:
    room: NDArray[np.int64] = slots["room"]
    return HEADER.itemsize + len(slots) * SLOT.itemsize + np.cumsum(room) - room


def _checksum(pair: Pair) -> int:
    digest = xxhash.xxh3_64(pair.low.data)
    digest.update(pair.clean.data)
    return digest.intdigest() >> 1 | 1  # 63 bits for an int64, and never 0, which means an empty slot


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file, _flock(file.fileno()):
        yield


@contextmanager
def _flock(file: int) -> Iterator[None]:
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)  # a map of the file would hold the lock on


def _is_at(file: int, path: Path) -> bool:
    """Whether the open file is still the one at ``path``, which another process may have renamed."""
    return path.exists() and os.path.samestat(os.fstat(file), path.stat())


def _is_in_use(data_set: Path) -> bool:
    with (data_set / IN_USE).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _last_used(data_set: Path) -> float:
    with suppress(FileNotFoundError):
        return (data_set / IN_USE).stat().st_mtime
    return 0.0


def _reserved(data_set: Path) -> int:
    with suppress(OSError, ValueError):
        return int((data_set / RESERVED).read_text())
    return 0


def _size(folder: Path) -> int:
    total = 0
    for entry in os.scandir(folder):
        with suppress(FileNotFoundError):  # a file may be renamed or deleted meanwhile
            total += entry.stat().st_size
    return total

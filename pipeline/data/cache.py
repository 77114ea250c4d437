"""A node's cache: shards from S3 and decoded images on a local disk, shared by all processes of the node.

<data.cache>/iaml-cache/         all that is ever written, deleted or counted lies below
CACHEDIR.TAG                     says that the folder is the cache's; backups pass it over
lock                             held while space is shared out
<data set>/in-use                locked by each process that reads the data set
<data set>/reserved              how many bytes the data set may take
<data set>/<sha256>.tar          a shard as it was packed
<data set>/<sha256>.pixels       its images, as far as they were decoded
<data set>/*.partial             being written, and locked by its writer

A data set is named by its manifest's checksum and its split. Whatever has another name is somebody else's and stays.

Nothing is believed for its name: each process compares a shard with its checksum when it opens it first, and each
decoded pair bears a checksum of its own. So a process may be killed, and a machine may fail, at any point.
A disk that is full or can't be written to is said once; reading goes on without it.
"""

import fcntl
import logging
import mmap
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from threading import Lock, Semaphore
from typing import BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from pipeline.data.local_disk import find_place
from pipeline.data.manifest import SPLITS, ShardRecord
from pipeline.data.pairs import PairPixels

logger = logging.getLogger(__name__)

OWN_FOLDER, TAG, LOCK = "iaml-cache", "CACHEDIR.TAG", "lock"
TAG_TEXT = """Signature: 8a477f597d28d172789f06886806bc55
# Shards and decoded images that iaml's data loader keeps; see https://bford.info/cachedir/
# It deletes what it put here itself. The folder may be deleted whole while nothing trains.
"""
IN_USE, RESERVED = "in-use", "reserved"
DATA_SET = re.compile(rf"[0-9a-f]{{16}}-({'|'.join(SPLITS)})")
KEPT = re.compile(r"[0-9a-f]{64}\.(tar|pixels)(\.partial)?")
MOST_WAITING = 4  # decoded pairs that wait to be written
DISK_SHARE = 0.9  # of the free space, so that a node's disk is never filled up on purpose
HEADER = np.dtype([("magic", "<i8"), ("pairs", "<i8")])
SLOT = np.dtype([("offset", "<i8"), ("room", "<i8"), ("height", "<i4"), ("width", "<i4"), ("check", "<i8")])
MAGIC = int.from_bytes(b"pixels\0\1", "little")  # with the layout's version
PAIR_CHANNELS = 6  # bytes of a pixel of both images


class Cache:
    """One data set's part of a node's cache.

    Args:
        folder: in which the node's cache lies; a local disk is found where it is ``None``.
        limit: most bytes that all data sets in it may take.
        name: of the data set, as ``DATA_SET``; the same name means the same bytes.
        shards: bytes of its shards; 0 if they lie on a disk already.
        pixels: bytes of its decoded images.

    Attributes:
        keeps_pixels: whether there is room for all decoded images.
        written_bytes: that this process put there.
    """

    def __init__(self, folder: Path | None, limit: int, name: str, shards: int, pixels: int) -> None:
        assert DATA_SET.fullmatch(name), name
        self.keeps_pixels = False
        self.written_bytes = 0
        self._count_lock = Lock()
        self._root, self._remark = Path(folder or "", OWN_FOLDER), ""
        self._folder = Path(os.devnull, name)  # where nothing can be, until there is a folder of our own
        self._room = 0
        self._all_fits = False
        self._broken = False
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="cache")
        self._waiting = Semaphore(MOST_WAITING)
        with self._or_without():
            place = find_place(folder)
            self._root, self._remark = own_folder(place.folder), f" ({place.remark})" if place.remark else ""
            self._folder = self._root / name
            with _locked(self._root / LOCK):
                self._folder.mkdir(exist_ok=True)
                self._in_use = (self._folder / IN_USE).open("a")
                fcntl.flock(self._in_use, fcntl.LOCK_SH)
                os.utime(self._in_use.fileno())
                self._reserve(limit, shards, pixels)

    def __str__(self) -> str:
        """What is kept, for the log."""
        if not self.room_bytes:
            reason = "not used" if self._broken else "no room for this data set"
            return f"cache {self._root}{self._remark}: {reason}; it is read and decoded anew in each epoch"
        kept = "decoded images" if self.keeps_pixels else "shards (decoded images do not fit)"
        return f"cache {self._root}{self._remark}: keeps {kept}, up to {self.room_bytes / 2**30:.2f} GiB"

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

    def keep(self, pixels: "PixelFile", sample: int, pair: PairPixels) -> None:
        """Put a decoded pair into its slot: in the background, unless ``MOST_WAITING`` wait already."""
        if self._waiting.acquire(blocking=False):
            self._writer.submit(self._put, pixels, sample, pair).add_done_callback(lambda _: self._waiting.release())
        else:
            self._put(pixels, sample, pair)

    def _put(self, pixels: "PixelFile", sample: int, pair: PairPixels) -> None:
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
        taken: dict[Path, int] = {}
        idle: dict[Path, float] = {}
        for path in _data_sets(self._root):
            with suppress(OSError):  # not ours, or out of reach: it stays, and what it takes is not known
                if path != self._folder:
                    in_use = _is_in_use(path)
                    taken[path] = max(_size(path), _reserved(path)) if in_use else _size(path)
                    if not in_use:
                        idle[path] = (path / IN_USE).stat().st_mtime
        for path in sorted(idle, key=idle.__getitem__):
            if sum(taken.values()) > most:
                with suppress(OSError):
                    _delete(path)
                    del taken[path]
        return sum(taken.values())

    @contextmanager
    def _new_file(self, path: Path, size: int) -> Iterator["NewFile | None"]:
        """A file of ``size`` bytes that appears at ``path`` when it is finished; ``None`` if it can't be new."""
        partial = path.with_name(f"{path.name}.partial")
        with ExitStack() as stack:
            is_new = False
            with self._or_without():
                handle = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
                file = stack.enter_context(os.fdopen(handle, "r+b"))
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
        self._known: dict[int, PairPixels] = {}  # compared with their checksums by this process, or written by it

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

    def get(self, sample: int) -> PairPixels | None:
        """A pair, mapped, if it is there."""
        known = self._known.get(sample)
        if known is None and (slot := self._slots[sample])["check"]:
            pair = self._view(slot)
            if pair and slot["check"] == _checksum(pair):
                self._known[sample] = known = pair
        return known

    def put(self, sample: int, pair: PairPixels) -> int:
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

    def _view(self, slot: np.void) -> PairPixels | None:
        height, width = int(slot["height"]), int(slot["width"])
        size = PAIR_CHANNELS * height * width
        if not 0 < size <= slot["room"]:
            return None
        images = np.frombuffer(self._data, np.uint8, count=size, offset=int(slot["offset"]))
        return PairPixels(*images.reshape(2, height, width, 3))


def own_folder(folder: Path) -> Path:
    """The cache's own folder below ``folder``, made with its tag if it is not there.

    Raises:
        OSError: it can't be made, or what has its name is not the cache's.
    """
    own = folder / OWN_FOLDER
    if not own.exists() or not any(own.iterdir()):
        folder.mkdir(parents=True, exist_ok=True)
        made = folder / f".{OWN_FOLDER}.{uuid.uuid4().hex}.tmp"  # so that the folder is never there without its tag
        made.mkdir()
        (made / TAG).write_text(TAG_TEXT)
        try:
            made.rename(own)
        except OSError:  # another process was faster, or a stranger's file is in the way
            (made / TAG).unlink()
            made.rmdir()
    with suppress(FileNotFoundError):
        if (own / TAG).read_bytes() == TAG_TEXT.encode():
            return own
    raise OSError(f"{own} holds somebody else's files; move them away")


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


def _checksum(pair: PairPixels) -> int:
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


def _data_sets(root: Path) -> list[Path]:
    entries = [entry for entry in os.scandir(root) if DATA_SET.fullmatch(entry.name)]
    return [Path(entry) for entry in entries if entry.is_dir(follow_symlinks=False)]


def _is_in_use(data_set: Path) -> bool:
    """Whether a process reads it; a folder without the file that shows it is not ours: ``FileNotFoundError``."""
    with (data_set / IN_USE).open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _reserved(data_set: Path) -> int:
    with suppress(OSError, ValueError):
        return int((data_set / RESERVED).read_text())
    return 0


def _size(data_set: Path) -> int:
    total = 0
    for path in _kept(data_set):
        with suppress(FileNotFoundError):  # a file may be renamed or deleted meanwhile
            total += path.stat().st_size
    return total


def _kept(data_set: Path) -> list[Path]:
    """The shards and images that were put into the folder, apart from whatever else lies there."""
    entries = [entry for entry in os.scandir(data_set) if KEPT.fullmatch(entry.name)]
    return [Path(entry) for entry in entries if entry.is_file(follow_symlinks=False)]


def _delete(data_set: Path) -> None:
    """Delete what was put into the folder, and the folder unless something else lies there."""
    for path in [*_kept(data_set), data_set / RESERVED, data_set / IN_USE]:  # the last one tells that it is ours
        path.unlink(missing_ok=True)
    with suppress(OSError):
        data_set.rmdir()

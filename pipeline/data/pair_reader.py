"""Decoded pairs of a packed data set, wherever its shards lie: fetched, verified, cached, decoded.

storage -> verified shard (in the node's cache, else in memory) -> decoded pair (kept in the cache where all fit)
"""

import hashlib
import logging
import mmap
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from threading import Lock

from pipeline import storage
from pipeline.data.cache import Cache, PixelFile, map_file
from pipeline.data.manifest import Manifest, PairRecord, ShardRecord
from pipeline.data.pairs import PairPixels
from pipeline.data.shard import BadDataError, Member, PairMembers, Shard, find_pairs
from pipeline.settings.data import DataSettings

logger = logging.getLogger(__name__)

PART = 8 << 20  # bytes of a shard asked for at a time, so that large shards need no large memory
TRIES = 3  # to fetch a shard whose bytes arrive changed
NAMED = 5  # damaged pairs of a shard that a message names


class PairReader:
    """The pairs of one split of a data set by shard and place in it. All its methods may be called from many threads.

    Args:
        manifest: of the data set.
        split: to read.
        settings: the cache, and what to do about bad data.

    Attributes:
        shards: the split's shards.
        cache: the node's cache; ``None`` when it is turned off.
        skipped: visits of bad pairs that got the next good pair instead.
        decoded: pairs that were decoded, since the cache did not hold them.
        fetched_bytes: of shards, as they came from S3; ``retries`` of the requests had to be made again.
    """

    def __init__(self, manifest: Manifest, split: str, settings: DataSettings) -> None:
        self.shards = manifest.split(split)
        self.cache: Cache | None = None
        self.skipped = self.decoded = self.fetched_bytes = self.retries = 0
        self._manifest = manifest
        self._split = split
        self._skips = settings.on_bad_data == "skip"
        self._is_local = storage.is_local(manifest.url)
        self._most_open = 2 * settings.shuffle_shards + settings.fetches  # a window, and the next one ahead of it
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._salvaged: dict[int, Shard] = {}
        self._bad: set[tuple[int, int]] = set()
        self._lock = Lock()
        self._verified: set[int] = set()
        if settings.cache_gib:
            sizes = 0 if self._is_local else int(self.shards.sizes.sum())
            name = f"{manifest.checksum[:16]}-{split}"
            limit = int(settings.cache_gib * 2**30)
            self.cache = Cache(settings.cache, limit, name, sizes, int(self.shards.pixels.sum()))

    def fetch(self, shard: int) -> None:
        """Have a shard ready before its pairs are asked for."""
        with suppress(BadDataError, OSError):  # said when a pair of it is asked for
            self._opened(shard).prepare()

    def pair(self, shard: int, sample: int) -> PairPixels:
        """The decoded pair at place ``sample`` of a shard; where bad data are skipped, the next good one.

        Raises:
            BadDataError: it is not what was packed or can't be decoded; shard, key and reason are named.
            OSError: the shard is out of reach.
        """
        try:
            return self._opened(shard).pair(sample)
        except BadDataError as error:
            if not self._skips:
                raise BadDataError(
                    f"{self._manifest.url}: {error}; repack the data set, or set data.on_bad_data: skip"
                ) from error
            self._note(shard, sample, error)
        return self._next_good(shard, sample)

    def read_shard(self, index: int) -> Shard:
        """A shard's bytes, verified, with its pairs found; of a damaged one, what is left of it, if that may be.

        Raises:
            BadDataError: it is damaged.
        """
        if index in self._salvaged:
            return self._salvaged[index]
        record = self.shards[index]
        try:
            data = self._bytes(index, record)
            pairs = find_pairs(record.name, data)
            if len(pairs) != record.pairs:
                raise BadDataError(f"{record.name}: holds {len(pairs)} pairs, its manifest says {record.pairs}")
            _let_go(data)
            return Shard(record.name, data, pairs)
        except BadDataError as error:
            rest = self._salvage(record)
            if self._skips:
                self._salvaged[index] = rest
                return rest
            damage = [f"{rest.pairs[sample].key}: {reason}" for sample, reason in rest.damage.items()]
            raise BadDataError(
                "\n  ".join([str(error), *damage[:NAMED], *(["..."] if damage[NAMED:] else [])])
            ) from error

    def count_decoded(self) -> None:
        """A pair was decoded."""
        with self._lock:
            self.decoded += 1

    def _opened(self, index: int) -> "_OpenShard":
        with self._lock:
            found = self._open.get(index)
            if found is None:
                self._open[index] = found = _OpenShard(self, index)
                if len(self._open) > self._most_open:
                    self._open.popitem(last=False)
            else:
                self._open.move_to_end(index)
        return found

    def _bytes(self, index: int, record: ShardRecord) -> mmap.mmap:
        if self._is_local:
            path = Path(self._manifest.url, record.name)
            data = map_file(path, record.size)
            if data is None:
                fault = f"has not the {record.size} bytes that were packed" if path.exists() else "is missing"
                raise BadDataError(f"{record.name}: {fault}")
            if not self._is_sound(index, record, data):
                raise BadDataError(f"{record.name}: differs from the shard that was packed (SHA-256)")
            return data
        return (self.cache and self._cached(index, record)) or self._in_memory(index, record)

    def _cached(self, index: int, record: ShardRecord) -> mmap.mmap | None:
        """The bytes of a shard in the cache, fetched if there is room; ``None`` if there is none."""
        assert self.cache is not None
        data = self.cache.shard(record)
        if data is not None and not self._is_sound(index, record, data):
            self.cache.drop_shard(record)
            data = None
        if data is None:
            with self.cache.new_shard(record) as file:
                if file:
                    space = memoryview(bytearray(min(PART, record.size)))
                    self._download(index, record, lambda start, stop: space[: stop - start], file.write)
                    file.finish()
            data = self.cache.shard(record)
        return data

    def _in_memory(self, index: int, record: ShardRecord) -> mmap.mmap:
        data = mmap.mmap(-1, record.size)
        self._download(index, record, lambda start, stop: memoryview(data)[start:stop], lambda part, offset: None)
        return data

    def _download(
        self,
        index: int,
        record: ShardRecord,
        space: Callable[[int, int], memoryview],
        use: Callable[[memoryview, int], None],
    ) -> None:
        """Fetch a shard part by part, each into the ``space`` for its bytes, until its checksum is right."""
        url = storage.join(self._manifest.url, record.name)
        for attempt in range(1, TRIES + 1):
            digest = hashlib.sha256()
            for start in range(0, record.size, PART):
                part = space(start, min(start + PART, record.size))
                try:
                    retries = storage.read_into(url, part, start) + (attempt > 1)
                except FileNotFoundError as error:
                    raise BadDataError(f"{record.name}: is missing") from error
                except ValueError as error:
                    raise BadDataError(f"{record.name}: has not the {record.size} bytes that were packed") from error
                self._count_fetched(len(part), retries)
                digest.update(part)
                use(part, start)
            if digest.hexdigest() == record.sha256:
                self._verified.add(index)
                return
            logger.warning("%s arrived changed (SHA-256), attempt %d of %d", url, attempt, TRIES)
        raise BadDataError(f"{record.name}: differs from the shard that was packed (SHA-256)")

    def _count_fetched(self, size: int, retries: int) -> None:
        with self._lock:
            self.fetched_bytes += size
            self.retries += retries

    def _is_sound(self, index: int, record: ShardRecord, data: mmap.mmap) -> bool:
        """Whether the bytes of a file are those that were packed; each process compares them once."""
        if index not in self._verified:
            digest = hashlib.sha256()
            with memoryview(data) as view:
                for start in range(0, record.size, PART):
                    digest.update(view[start : start + PART])
                    _let_go(data)
            if digest.hexdigest() != record.sha256:
                return False
            self._verified.add(index)
        return True

    def _salvage(self, record: ShardRecord) -> Shard:
        """What there is of a damaged shard, each pair checked by itself."""
        try:
            data = storage.read_bytes(storage.join(self._manifest.url, record.name))
        except FileNotFoundError:
            data = b""
        packed = [pair for pair in self._manifest.pairs(self._split) if pair.shard == record.name]
        damage = {sample: reason for sample, pair in enumerate(packed) if (reason := _damage(pair, data))}
        return Shard(record.name, data, [_members(pair) for pair in packed], damage)

    def _note(self, shard: int, sample: int, error: BadDataError) -> None:
        with self._lock:
            self.skipped += 1
            known = (shard, sample) in self._bad
            self._bad.add((shard, sample))
        if not known:
            logger.warning("%s: %s; the next good pair is taken instead", self._manifest.url, error)

    def _next_good(self, shard: int, sample: int) -> PairPixels:
        for other, place in self._after(shard, sample):
            if (other, place) not in self._bad:
                try:
                    return self._opened(other).pair(place)
                except BadDataError as error:
                    self._bad.add((other, place))
                    logger.warning("%s: %s", self._manifest.url, error)
        raise BadDataError(f"{self._manifest.url}: none of its {self._split} pairs can be read")

    def _after(self, shard: int, sample: int) -> Iterator[tuple[int, int]]:
        """All other places, in the order of the shards, round from this one."""
        for turn in range(len(self.shards) + 1):
            other = (shard + turn) % len(self.shards)
            first = sample + 1 if turn == 0 else 0
            last = sample if turn == len(self.shards) else int(self.shards.pairs[other])
            yield from ((other, place) for place in range(first, last))


class _OpenShard:
    """A shard in use: its decoded pairs as far as they are kept, and its bytes from when they are first needed."""

    def __init__(self, reader: PairReader, index: int) -> None:
        self._reader = reader
        self._index = index
        self._record = reader.shards[index]
        self._cache = reader.cache if reader.cache and reader.cache.keeps_pixels else None
        self._pixels: PixelFile | None = self._cache.pixels(self._record) if self._cache else None
        self._shard: Shard | None = None
        self._lock = Lock()

    def prepare(self) -> None:
        if self._pixels is None or not self._pixels.complete:
            self._bytes()

    def pair(self, sample: int) -> PairPixels:
        if self._pixels and (known := self._pixels.get(sample)):
            return known
        pair = self._bytes().decode(sample)
        self._reader.count_decoded()
        if self._cache and self._pixels:
            self._cache.keep(self._pixels, sample, pair)
        return pair

    def _bytes(self) -> Shard:
        with self._lock:
            if self._shard is None:
                self._shard = self._reader.read_shard(self._index)
                if self._cache and self._pixels is None:
                    self._pixels = self._cache.new_pixels(self._record, self._shard.areas())
        return self._shard


def _let_go(data: mmap.mmap) -> None:
    """Have pages that were read once not count as the worker's memory; the map is shared, so its bytes stay."""
    data.madvise(mmap.MADV_DONTNEED)


def _damage(pair: PairRecord, data: bytes) -> str | None:
    images = (
        ("low", pair.low_offset, pair.low_size, pair.low_sha256),
        ("high", pair.high_offset, pair.high_size, pair.high_sha256),
    )
    for side, offset, size, sha256 in images:
        if offset + size > len(data):
            return f"its {side} image is cut off (the shard ends after {len(data)} bytes)" if data else "is missing"
        if hashlib.sha256(data[offset : offset + size]).hexdigest() != sha256:
            return f"its {side} image differs from the one that was packed (SHA-256)"
    return None


def _members(pair: PairRecord) -> PairMembers:
    return PairMembers(
        pair.key,
        Member(f"{pair.key}.low.png", pair.low_offset, pair.low_size),
        Member(f"{pair.key}.high.png", pair.high_offset, pair.high_size),
    )

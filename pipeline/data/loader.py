"""Batches of crops for training, made ahead of it by a few threads.

plan    the refs of the steps to come, about a window of shards ahead; their shards are fetched
cut     crops of the next few steps, decoded or from the cache, copied straight into their batches
"""

import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.augmentation import TURNS, copy_turned, reflect_pad, uniform_draws
from pipeline.data.manifest import Manifest
from pipeline.data.order import WorkerShare, order_of
from pipeline.data.pair_reader import PairReader
from pipeline.data.pairs import PairPixels
from pipeline.settings.data import DataSettings

SPLIT = "train"
MOST_PLANNED = 256  # steps
PLANNED_AT_ONCE = 16  # steps, since arithmetic on long arrays costs less for each sample
CHUNK = 8  # crops that a thread cuts at a time


class Batch(NamedTuple):
    """Pairs of crops: RGB, uint8, both of shape (B, 3, crop, crop), channels last in memory."""

    low: Tensor
    clean: Tensor


class LoaderState(NamedTuple):
    """How a worker's data flow: what waits ahead of training, and totals since the loader was made.

    ``planned_steps`` have their shards fetched, ``ready_steps`` have their crops cut. Steps have waited ``wait_s``
    seconds for their crops, and were given ``pairs``; ``decoded_pairs`` were decoded, since no cache held them.
    Of shards, ``fetched_bytes`` came from S3, after as many ``retries``. The data sets have ``cache_bytes`` of room
    in the node's cache, in which this worker put ``cached_bytes``.
    """

    planned_steps: int
    ready_steps: int
    wait_s: float
    pairs: int
    decoded_pairs: int
    fetched_bytes: int
    retries: int
    cache_bytes: int
    cached_bytes: int


class Loader:
    """The batches of one worker: a pure function of the data, the settings, the worker's share and the step.

    Args:
        manifests: of the data sets, in the settings' order.
        settings: how they are read.
        share: this worker's part of each global batch.
        seed: fixes the order and the augmentation.
        pinned: whether the crops lie in page-locked memory, from which a GPU copies while the processor goes on.

    Attributes:
        readers: the data sets' pairs.
    """

    def __init__(
        self,
        manifests: Sequence[Manifest],
        settings: DataSettings,
        share: WorkerShare,
        seed: int,
        *,
        pinned: bool = False,
    ) -> None:
        self.readers = [PairReader(manifest, SPLIT, settings) for manifest in manifests]
        self._settings = settings
        self._share = share
        self._seed = seed
        self._order = order_of([reader.shards.pairs for reader in self.readers], settings, share.global_batch, seed)
        self._plan_ahead = self._steps_of_window()
        self._memory = _Memory((2, share.micro_batch, settings.crop, settings.crop, 3), pinned)
        self._fetched: OrderedDict[tuple[int, int], None] = OrderedDict()
        self._planned: deque[list[_Plan]] = deque()
        self._being_cut: deque[list[_Cut]] = deque()
        self._wait_s = 0.0
        self._pairs = 0

    @property
    def skipped(self) -> int:
        """How many references to bad pairs so far got another pair instead."""
        return sum(reader.skipped for reader in self.readers)

    def state(self) -> LoaderState:
        """How the data flow; to be asked by the thread that takes the steps."""
        caches = [reader.cache for reader in self.readers if reader.cache]
        return LoaderState(
            planned_steps=len(self._planned),
            ready_steps=sum(all(one.is_ready() for one in step) for step in self._being_cut),
            wait_s=self._wait_s,
            pairs=self._pairs,
            decoded_pairs=sum(reader.decoded for reader in self.readers),
            fetched_bytes=sum(reader.fetched_bytes for reader in self.readers),
            retries=sum(reader.retries for reader in self.readers),
            cache_bytes=sum(cache.room_bytes for cache in caches),
            cached_bytes=sum(cache.written_bytes for cache in caches),
        )

    def steps(self, start: int, stop: int) -> Iterator[tuple[int, list[Batch]]]:
        """The steps ``start`` to ``stop`` (excluded), each with its micro-batches.

        Raises:
            BadDataError: a pair can't be read, and the settings don't skip it.
            OSError: a shard stayed out of reach.
        """
        planned = self._planned = deque()
        being_cut = self._being_cut = deque()
        with ExitStack() as stack:
            fetchers = _pool(stack, self._settings.fetches, "fetch")
            cutters = _pool(stack, self._settings.threads, "cut")
            plans = self._plan(start, stop, fetchers)
            for step in range(start, stop):
                asked = time.perf_counter()
                planned.extend(islice(plans, self._plan_ahead - len(planned)))
                while planned and len(being_cut) <= self._settings.ahead:
                    being_cut.append([self._cut(plan, cutters) for plan in planned.popleft()])
                batches = [one.batch() for one in being_cut.popleft()]
                self._pairs += self._share.micro_batch * self._share.accumulation
                self._wait_s += time.perf_counter() - asked
                yield step, batches

    def _steps_of_window(self) -> int:
        """For how many steps the samples of a window last, about."""
        pairs = max(float(reader.shards.pairs.mean()) for reader in self.readers) * self._settings.shuffle_shards
        return int(np.clip(pairs / self._share.global_batch, self._settings.ahead + 1, MOST_PLANNED))

    def _plan(self, start: int, stop: int, fetchers: ThreadPoolExecutor) -> Iterator[list["_Plan"]]:
        """The micro-batches of each step; the fetching of the shards that they need begins."""
        for first in range(start, stop, PLANNED_AT_ONCE):
            refs = self._share.of(self._order, first, min(stop, first + PLANNED_AT_ONCE))
            numbers = uniform_draws(self._seed, refs, 3)
            places = np.stack([refs.dataset, refs.shard, refs.sample], axis=-1)
            for step_places, step_numbers in zip(places.tolist(), numbers, strict=True):
                for dataset, shard, _ in chain.from_iterable(step_places):
                    self._fetch(fetchers, dataset, shard)
                yield [_Plan(*micro_batch) for micro_batch in zip(step_places, step_numbers, strict=True)]

    def _fetch(self, fetchers: ThreadPoolExecutor, dataset: int, shard: int) -> None:
        """Begin to fetch a shard, unless it was needed lately."""
        if (dataset, shard) in self._fetched:
            self._fetched.move_to_end((dataset, shard))
            return
        self._fetched[dataset, shard] = None
        if len(self._fetched) > 2 * self._settings.shuffle_shards * len(self.readers):
            self._fetched.popitem(last=False)
        fetchers.submit(self.readers[dataset].fetch, shard)

    def _cut(self, plan: "_Plan", cutters: ThreadPoolExecutor) -> "_Cut":
        places, numbers = plan
        crops = self._memory.take()
        chunks = [slice(first, first + CHUNK) for first in range(0, len(places), CHUNK)]
        futures = [
            cutters.submit(self._cut_chunk, crops.numpy(), rows.start, places[rows], numbers[rows].tolist())
            for rows in chunks
        ]
        return _Cut(futures, crops)

    def _cut_chunk(
        self, crops: NDArray[np.uint8], first: int, places: list[list[int]], numbers: list[list[float]]
    ) -> None:
        """Fill the rows from ``first`` on."""
        side = self._settings.crop
        rows = enumerate(zip(places, numbers, strict=True), start=first)
        for row, ((dataset, shard, sample), (down, right, turn)) in rows:
            pair = self.readers[dataset].pair(shard, sample)
            if min(pair.low.shape[:2]) < side:
                pair = PairPixels(*(reflect_pad(image, side) for image in pair))
            height, width, _ = pair.low.shape
            top, left = int(down * (height - side + 1)), int(right * (width - side + 1))
            for place, image in zip(crops[:, row], pair, strict=True):
                crop = image[top : top + side, left : left + side]
                copy_turned(crop, int(turn * TURNS) * self._settings.flips, place)


class _Plan(NamedTuple):
    """A micro-batch to come: (data set, shard, place in it) of its pairs, and three random numbers for each."""

    places: list[list[int]]
    numbers: NDArray[np.float64]


class _Cut(NamedTuple):
    """A batch in the making: low-light and clean crops, (2, B, crop, crop, 3), and the work that fills them."""

    futures: list[Future[None]]
    crops: Tensor

    def is_ready(self) -> bool:
        return all(future.done() for future in self.futures)

    def batch(self) -> Batch:
        for future in self.futures:
            future.result()
        return Batch(*self.crops.permute(0, 1, 4, 2, 3))


class _Memory:
    """Tensors of one shape, used again once nobody holds them: memory new from the system costs as much as the crops.

    Torch does so by itself with pinned ones, and waits for the copies that a GPU makes of them.
    """

    def __init__(self, shape: tuple[int, ...], pinned: bool) -> None:
        self._shape = shape
        self._pinned = pinned
        self._free: list[NDArray[np.uint8]] = []

    def take(self) -> Tensor:
        if self._pinned:
            return torch.empty(self._shape, dtype=torch.uint8, pin_memory=True)
        kept = self._free.pop() if self._free else np.empty(self._shape, dtype=np.uint8)
        array = kept[:]  # tensors made of it hold it, and it tells when they are gone
        weakref.finalize(array, self._free.append, kept).atexit = False
        return torch.from_numpy(array)


def _pool(stack: ExitStack, threads: int, name: str) -> ThreadPoolExecutor:
    """A pool that drops what it has not begun when the stack is left."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
    stack.callback(pool.shutdown, wait=False, cancel_futures=True)
    return pool

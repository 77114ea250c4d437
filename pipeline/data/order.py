"""The order of the samples: a pure function of (pairs in each shard, seed, position).

Training reads one endless stream of samples, epoch after epoch:

    epoch   the shards, permuted by (seed, epoch)
    window  the next few of them; their samples, permuted by (seed, epoch, window)

So a worker needs few shards at a time, and a run resumes at any position, on any number of workers, by
arithmetic. The permutations come from numpy's bit generators, whose streams are the same in all its versions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pipeline.settings.data import DataSettings

Integers = NDArray[np.int64]
BLOCK = 1024  # positions after which a mixture has read its data sets by their exact shares


class SampleRefs(NamedTuple):
    """References to samples in the order of the stream: arrays of one shape, an element for each.

    ``sample`` is the pair's place in its ``shard``, ``shard`` the shard's place in the data set's split, and
    ``epoch`` counts the passes over that data set.
    """

    dataset: Integers
    epoch: Integers
    shard: Integers
    sample: Integers

    def take(self, rows: Integers | slice) -> "SampleRefs":
        """Some of the references."""
        return SampleRefs(*(column[rows] for column in self))


NO_VISITS = SampleRefs(*np.empty((4, 0), dtype=np.int64))


class Order(Protocol):
    """An endless stream of samples."""

    def refs(self, start: int, stop: int) -> SampleRefs:
        """The references at positions ``start`` to ``stop`` (excluded) of the stream."""


class SampleOrder:
    """The stream over one data set; each epoch visits each sample once.

    Args:
        pairs: pairs in each shard.
        seed: fixes the order.
        window: shards among whose samples the order is shuffled.
        batch: where given, an epoch ends with its last whole batch of so many samples, and what is left over
            (other samples in each epoch) is dropped; otherwise it carries on into the next epoch.
        dataset: the number that its references bear.

    Raises:
        ValueError: there are fewer pairs than fill a batch.
    """

    def __init__(self, pairs: Integers, seed: int, window: int, batch: int | None = None, dataset: int = 0) -> None:
        self._pairs = np.asarray(pairs, dtype=np.int64)
        self._seed = seed
        self._size = int(self._pairs.sum())
        self._epoch_size = self._size - self._size % batch if batch else self._size
        if self._epoch_size == 0:
            raise ValueError(
                f"{self._size} training pairs do not fill one global batch of {batch}: set data.drop_last: false, or "
                f"train.global_batch to {self._size} at most"
            )
        self._window = window
        self._dataset = dataset
        self._epoch_of = lru_cache(maxsize=2)(self._lay_out_epoch)
        self._latest = self._lay_out_window_at(0)

    def refs(self, start: int, stop: int) -> SampleRefs:
        """The references at positions ``start`` to ``stop`` (excluded) of the stream."""
        parts = []
        while start < stop:
            if not self._latest.start <= start < self._latest.stop:
                self._latest = self._lay_out_window_at(start)
            first, last, columns = self._latest
            end = min(stop, last)
            parts.append(SampleRefs(*columns[:, start - first : end - first]))
            start = end
        return _join(parts)

    def _lay_out_epoch(self, epoch: int) -> tuple[Integers, Integers]:
        """The shards in the epoch's order, and the positions at which its windows begin and the last one ends."""
        shards = _permutation(len(self._pairs), self._seed, epoch)
        ends = np.cumsum(self._pairs[shards])
        last_of_window = np.append(np.arange(self._window - 1, len(shards) - 1, self._window), len(shards) - 1)
        return shards, np.concatenate([[0], ends[last_of_window]])

    def _lay_out_window_at(self, position: int) -> "_Window":
        epoch, within = divmod(position, self._epoch_size)
        order, edges = self._epoch_of(epoch)
        window = int(edges.searchsorted(within, side="right")) - 1
        shards = order[window * self._window : (window + 1) * self._window]
        counts = self._pairs[shards]
        shard = np.repeat(shards, counts)
        sample = np.arange(len(shard)) - np.repeat(np.cumsum(counts) - counts, counts)
        shuffled = _permutation(len(shard), self._seed, epoch, window)
        same = np.ones_like(shard)
        columns = np.stack([self._dataset * same, epoch * same, shard[shuffled], sample[shuffled]])
        first, last = int(edges[window]), min(int(edges[window + 1]), self._epoch_size)
        return _Window(position - within + first, position - within + last, columns)


class _Window(NamedTuple):
    """The references at positions ``start`` to ``stop`` (excluded), one in each column."""

    start: int
    stop: int
    columns: Integers


class MixedOrder:
    """Several data sets in one stream, each in its own order and by its own epochs.

    Every 1024 positions hold the data sets by their shares, rounded to whole samples and shuffled.

    Args:
        orders: the data sets'.
        weights: their shares, in any unit.
        seed: fixes which position reads which data set.

    Raises:
        ValueError: a share is too small to be met.
    """

    def __init__(self, orders: Sequence[SampleOrder], weights: Sequence[float], seed: int) -> None:
        self._orders = orders
        self._counts = _shares(weights)
        self._seed = seed

    def refs(self, start: int, stop: int) -> SampleRefs:
        """The references at positions ``start`` to ``stop`` (excluded) of the stream."""
        parts = []
        while start < stop:
            block, first = divmod(start, BLOCK)
            last = min(BLOCK, first + stop - start)
            chosen = np.repeat(np.arange(len(self._counts)), self._counts)[_permutation(BLOCK, self._seed, block)]
            parts.append(self._refs_of_block(block, chosen, first, last))
            start += last - first
        return _join(parts)

    def _refs_of_block(self, block: int, chosen: Integers, first: int, last: int) -> SampleRefs:
        places, parts = [], []
        for dataset, order in enumerate(self._orders):
            before = block * int(self._counts[dataset]) + int(np.count_nonzero(chosen[:first] == dataset))
            mine = np.flatnonzero(chosen[first:last] == dataset)
            places.append(mine)
            parts.append(order.refs(before, before + len(mine)))
        return _join(parts).take(np.argsort(np.concatenate(places), kind="stable"))


def order_of(pairs: Sequence[Integers], settings: DataSettings, global_batch: int, seed: int) -> Order:
    """The order in which a run reads its data sets.

    Args:
        pairs: of each data set, the pairs in each of its shards.
        settings: window, shares and the end of epochs.
        global_batch: samples in one step.
        seed: fixes the order.

    Raises:
        ValueError: the data sets don't allow what the settings ask for.
    """
    batch = global_batch if settings.drop_last else None
    orders = [SampleOrder(each, seed, settings.shuffle_shards, batch, number) for number, each in enumerate(pairs)]
    weights = settings.weights or [float(each.sum()) for each in pairs]
    return orders[0] if len(orders) == 1 else MixedOrder(orders, weights, seed)


@dataclass(frozen=True)
class WorkerShare:
    """Which part of each global batch a worker takes.

    A global batch is cut into ``accumulation`` rounds of ``workers`` micro-batches. The samples of a round are
    the same for every number of workers; they are assigned out by shard, so that each worker reads few shards.
    """

    rank: int
    workers: int
    micro_batch: int
    accumulation: int

    @property
    def global_batch(self) -> int:
        """Samples in a global batch."""
        return self.workers * self.micro_batch * self.accumulation

    def of(self, order: Order, start: int, stop: int) -> SampleRefs:
        """This worker's references in the steps ``start`` to ``stop`` (excluded) [steps, accumulation, micro-batch]."""
        refs = order.refs(start * self.global_batch, stop * self.global_batch)
        round_ = np.arange(len(refs.sample)) // (self.workers * self.micro_batch)
        assigned = np.lexsort((refs.shard, refs.dataset, round_))
        shape = (stop - start, self.accumulation, self.workers, self.micro_batch)
        return refs.take(assigned.reshape(shape)[:, :, self.rank])


def _permutation(size: int, seed: int, *path: int) -> Integers:
    bits = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=path))
    return np.argsort(bits.random_raw(size), kind="stable")


def _shares(weights: Sequence[float]) -> Integers:
    """Whole numbers in the proportion of ``weights`` whose sum is ``BLOCK``."""
    exact = np.asarray(weights, dtype=np.float64) / sum(weights) * BLOCK
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: BLOCK - int(counts.sum())]] += 1
    if not counts.all():
        given = ", ".join(f"{weight:g}" for weight in weights)
        raise ValueError(f"data.weights ({given}): a data set gets less than one sample in {BLOCK}; raise its weight")
    return counts


def _join(parts: Sequence[SampleRefs]) -> SampleRefs:
    if len(parts) == 1:
        return parts[0]
    return SampleRefs(*np.concatenate([NO_VISITS, *parts], axis=1))

"""The order of the samples: a pure function of (number of samples, seed, position).

Training reads one endless stream of samples, epoch after epoch. Position ``p`` of the stream lies in
epoch ``p // size``; the samples of an epoch are permuted by the seed and the epoch alone. So a run
resumes at any position, on any number of workers, by arithmetic.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class Visit:
    """One visit of a sample: which sample, in which epoch."""

    epoch: int
    index: int


@dataclass(frozen=True)
class SampleOrder:
    """The stream over ``size`` samples that ``seed`` gives; each epoch visits each sample once."""

    size: int
    seed: int

    def visits(self, start: int, stop: int) -> Iterator[Visit]:
        """The visits at positions ``start`` to ``stop`` (excluded) of the stream."""
        for position in range(start, stop):
            epoch, within = divmod(position, self.size)
            yield Visit(epoch, int(_permutation(self.size, self.seed, epoch)[within]))


@dataclass(frozen=True)
class Share:
    """Which part of each global batch a worker takes.

    A global batch is cut into ``accumulation`` rounds of ``workers`` micro-batches, so the samples of a
    global batch are the same for every number of workers.
    """

    rank: int
    workers: int
    micro_batch: int
    accumulation: int

    @property
    def global_batch(self) -> int:
        """Samples in a global batch."""
        return self.workers * self.micro_batch * self.accumulation

    def spans(self, step: int) -> list[tuple[int, int]]:
        """Start and stop in the stream of this worker's micro-batches in step ``step`` (from 0)."""
        first = step * self.global_batch + self.rank * self.micro_batch
        starts = [first + round_ * self.workers * self.micro_batch for round_ in range(self.accumulation)]
        return [(start, start + self.micro_batch) for start in starts]


@lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(size)

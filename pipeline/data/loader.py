"""Batches of crops for training, read ahead from the shards by a few threads."""

import hashlib
import io
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field
from torch import Tensor

from iaml import Settings
from iaml.network import STRIDE
from pipeline import storage
from pipeline.data.manifest import PairRecord
from pipeline.data.order import SampleOrder, Share, Visit


class DataSettings(Settings):
    """The data: packed shards, and how crops are cut from them."""

    url: storage.Url = Field(
        description="folder or s3://bucket/prefix that pipeline/pack.py wrote (it holds manifest.parquet)"
    )
    crop: int = Field(256, ge=STRIDE, multiple_of=STRIDE, description="side of the square crops, pixels")
    flips: bool = Field(True, description="mirror crops and turn them by quarters at random, both images alike")
    cache_gib: float = Field(
        2.0, ge=0, description="memory for decoded images on each worker, GiB; 0 decodes each time"
    )
    threads: int = Field(2, ge=1, description="threads on each worker that read and decode ahead of training")
    ahead: int = Field(4, ge=1, description="steps whose samples are read ahead")


class Pair(NamedTuple):
    """A decoded pair: RGB, uint8, both of shape (H, W, 3)."""

    low: NDArray[np.uint8]
    clean: NDArray[np.uint8]


class Batch(NamedTuple):
    """Pairs of crops: RGB, uint8, both of shape (B, 3, crop, crop)."""

    low: Tensor
    clean: Tensor


class PairReader:
    """Reads pairs by their place in the shards and keeps decoded ones in memory while they fit.

    Args:
        url: the data set's folder or prefix.
        cache_bytes: memory for decoded pairs.
    """

    def __init__(self, url: str, cache_bytes: int = 0) -> None:
        self._url = url
        self._room = cache_bytes
        self._decoded: dict[str, Pair] = {}
        self._lock = Lock()

    def read(self, record: PairRecord) -> Pair:
        """The decoded pair.

        Raises:
            ValueError: the bytes are not those that were packed, with shard and key.
        """
        if (known := self._decoded.get(record.key)) is not None:
            return known
        pair = Pair(
            self._image(record, "low", record.low_offset, record.low_size, record.low_sha256),
            self._image(record, "high", record.high_offset, record.high_size, record.high_sha256),
        )
        size = pair.low.nbytes + pair.clean.nbytes
        with self._lock:
            if size <= self._room and record.key not in self._decoded:
                self._room -= size
                self._decoded[record.key] = pair
        return pair

    def _image(self, record: PairRecord, side: str, offset: int, size: int, sha256: str) -> NDArray[np.uint8]:
        data = storage.read_bytes(storage.join(self._url, record.shard), offset, size)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ValueError(
                f"{self._url}: {record.shard}: {record.key}.{side}.png differs from the image that was packed "
                "(its SHA-256 is not the manifest's); copy the shard again or pack the data set again"
            )
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image.convert("RGB"))


class Loader:
    """The batches of one worker: a pure function of the order, this worker's share and the step.

    Args:
        records: the training pairs.
        settings: where they are and how crops are cut.
        share: this worker's part of each global batch.
        seed: fixes the order and the augmentation.
    """

    def __init__(self, records: Sequence[PairRecord], settings: DataSettings, share: Share, seed: int) -> None:
        self._records = records
        self._settings = settings
        self._share = share
        self._seed = seed
        self._order = SampleOrder(len(records), seed)
        self._reader = PairReader(settings.url, int(settings.cache_gib * 2**30))

    def steps(self, start: int, stop: int) -> Iterator[tuple[int, list[Batch]]]:
        """The steps ``start`` to ``stop`` (excluded), each with its micro-batches."""
        pending: deque[tuple[int, list[list[Future[Pair]]]]] = deque()
        with ThreadPoolExecutor(self._settings.threads, thread_name_prefix="loader") as pool:
            try:
                for step in range(start, stop):
                    pending.append((step, self._submit(pool, step)))
                    if len(pending) > self._settings.ahead:
                        yield self._collect(*pending.popleft())
                while pending:
                    yield self._collect(*pending.popleft())
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _submit(self, pool: ThreadPoolExecutor, step: int) -> list[list[Future[Pair]]]:
        return [
            [pool.submit(self._crop, visit) for visit in self._order.visits(*span)] for span in self._share.spans(step)
        ]

    def _collect(self, step: int, rounds: list[list[Future[Pair]]]) -> tuple[int, list[Batch]]:
        return step, [_stack([future.result() for future in futures]) for futures in rounds]

    def _crop(self, visit: Visit) -> Pair:
        """A crop of the visited pair, chosen by (seed, epoch, sample) alone."""
        pair = self._reader.read(self._records[visit.index])
        draw = np.random.default_rng([self._seed, visit.epoch, visit.index])
        side = self._settings.crop
        top, left = (int(draw.integers(0, length - side + 1)) for length in pair.low.shape[:2])
        crops = Pair(*(image[top : top + side, left : left + side] for image in pair))
        if not self._settings.flips:
            return crops
        mirrored, turns = bool(draw.integers(2)), int(draw.integers(4))
        return Pair(*(np.rot90(image[:, ::-1] if mirrored else image, turns) for image in crops))


def check_crops_fit(records: Sequence[PairRecord], crop: int) -> None:
    """Refuse pairs that are smaller than a crop, by name."""
    small = [record for record in records if min(record.width, record.height) < crop]
    if small:
        names = ", ".join(f"{record.key} ({record.width}x{record.height})" for record in small[:5])
        raise ValueError(
            f"data.crop: {len(small)} training pairs are smaller than {crop} pixels: {names}; lower data.crop"
        )


def _stack(pairs: list[Pair]) -> Batch:
    low, clean = (np.stack(images).transpose(0, 3, 1, 2) for images in zip(*pairs, strict=True))
    return Batch(torch.from_numpy(np.ascontiguousarray(low)), torch.from_numpy(np.ascontiguousarray(clean)))

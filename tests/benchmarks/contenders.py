"""The loaders that are compared: each gives endless batches of random crops, in a process of its own.

What is the same for all: the PNG files, the size of the crops and of the batches, and that a batch is new memory. The
peers decode by one function, the least work that Pillow allows. Flips and turns are nobody's: here they are
the training device's work.
"""

import io
import random
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import webdataset
from mosaic import SIDES, streaming
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from workspace import Workspace

from pipeline.data.loader import Loader
from pipeline.data.manifest import load_manifest
from pipeline.data.order import WorkerShare
from pipeline.settings.data import DataSettings

CROP = 256
BATCH = 8
CHECKED = 2  # batches that are compared with the source images before anything is timed
MADE_AHEAD = 6  # batches, at most, that a loader may have made while it was another's turn
FOREVER = 10**9  # steps

Crops = NDArray[np.uint8]
Batches = Iterator[tuple[Any, Any]]  # low and clean crops, arrays or tensors, uint8


class Contender(NamedTuple):
    """A loader: its name in the table, the package whose version counts, and what makes it in a workspace."""

    title: str
    package: str | None
    batches: Callable[[Workspace, int], Batches]
    workers: tuple[int, ...] = (0,)  # numbers of loader processes that are tried; the best one counts


def ours(workspace: Workspace, workers: int) -> Batches:
    """This project's loader as it is set by default, apart from flips and the place of its cache."""
    settings = loader_settings(str(workspace.shards), workspace.root / "cache")
    loader = Loader([load_manifest(settings.url)], settings, WorkerShare(0, 1, BATCH, 1), seed=0)
    for _, (batch,) in loader.steps(0, FOREVER):
        yield batch.low, batch.clean


def bare(workspace: Workspace, workers: int) -> Batches:
    """Crops copied out of decoded images that lie in memory: what no loader can beat."""
    pairs = [workspace.images(key) for key in workspace.sources]
    copies = workspace.pairs // len(pairs)
    pairs = [(low.copy(), clean.copy()) for low, clean in pairs for _ in range(copies)]
    order = random.sample(range(len(pairs)), len(pairs))
    while True:
        for first in range(0, len(order) - BATCH + 1, BATCH):
            low, clean = (np.empty((BATCH, CROP, CROP, 3), dtype=np.uint8) for _ in SIDES)
            for row, index in enumerate(order[first : first + BATCH]):
                low_image, clean_image = pairs[index]
                height, width, _ = low_image.shape
                top, left = random.randrange(height - CROP + 1), random.randrange(width - CROP + 1)
                low[row] = low_image[top : top + CROP, left : left + CROP]
                clean[row] = clean_image[top : top + CROP, left : left + CROP]
            yield low, clean


def torch_folder(workspace: Workspace, workers: int) -> Batches:
    """PyTorch's DataLoader over the folder of PNG files."""
    dataset = FolderOfPairs(workspace.folder)
    return endless(DataLoader(dataset, shuffle=True, **options(workers)))


def mosaic(workspace: Workspace, workers: int) -> Batches:
    """MosaicML Streaming with its local cache."""

    class Pairs(streaming().StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, at: int) -> tuple[Crops, Crops]:
            sample = super().__getitem__(at)
            return cropped(*(sample[side] for side in SIDES))

    cache = workspace.new_folder(f"mds-cache-{workers}")
    dataset = Pairs(remote=str(workspace.mds), local=str(cache), shuffle=True, batch_size=BATCH)
    return endless(streaming().StreamingDataLoader(dataset, **options(workers)))


def plain_webdataset(workspace: Workspace, workers: int) -> Batches:
    """WebDataset over the tars on the local disk."""
    tars = sorted(str(path) for path in workspace.shards.glob("*.tar"))
    samples = webdataset.WebDataset(tars, shardshuffle=len(tars)).shuffle(100)
    dataset = samples.to_tuple("low.png", "high.png").map(lambda pair: cropped(*pair))
    return endless(DataLoader(dataset, **options(workers)))


class FolderOfPairs(Dataset[tuple[Crops, Crops]]):
    """Random crops of the PNG files in ``folder/low`` and ``folder/high``."""

    def __init__(self, folder: Path) -> None:
        self._paths = [(low, folder / "high" / low.name) for low in sorted((folder / "low").iterdir())]

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> tuple[Crops, Crops]:
        low, high = self._paths[index]
        return cropped(low.read_bytes(), high.read_bytes())


def cropped(low_file: bytes, clean_file: bytes) -> tuple[Crops, Crops]:
    """The same random crop of both images of a pair."""
    low, clean = (Image.open(io.BytesIO(data)) for data in (low_file, clean_file))
    width, height = low.size
    left, top = random.randrange(width - CROP + 1), random.randrange(height - CROP + 1)
    box = (left, top, left + CROP, top + CROP)
    return np.array(low.crop(box)), np.array(clean.crop(box))


def options(workers: int) -> dict[str, Any]:
    """What all of PyTorch's data loaders are given."""
    in_processes = {"persistent_workers": True, "multiprocessing_context": "fork"} if workers else {}
    return {"batch_size": BATCH, "num_workers": workers, "drop_last": True, **in_processes}


def endless(loader: Iterable[Any]) -> Iterator[Any]:
    """The batches of epoch after epoch."""
    while True:
        yield from loader


def loader_settings(url: str, cache: Path, **others: Any) -> DataSettings:
    """The loader's settings in all measurements: the defaults, but without flips, and with a cache for this run."""
    return DataSettings(url=url, cache=cache, crop=CROP, flips=False, **others)


CONTENDERS = {
    "ours": Contender("this loader, warm", None, ours),
    "bare": Contender("bare copy of the crops in memory", "numpy", bare),
    "torch": Contender("torch DataLoader, folder of PNG", "torch", torch_folder, (0, 1)),
    "mosaic": Contender("MosaicML Streaming, local cache", "mosaicml-streaming", mosaic, (0, 1)),
    "webdataset": Contender("WebDataset, local tars", "webdataset", plain_webdataset, (0, 1)),
}

_running: Batches


def begin(name: str, workspace: Workspace, workers: int) -> None:
    """Start a contender in this process, compare its first batches with their sources, and run an epoch to warm it.

    Raises:
        ValueError: a crop is not in any of the source images.
    """
    global _running
    torch.set_num_threads(1)
    _running = CONTENDERS[name].batches(workspace, workers)
    sources = [workspace.images(key) for key in workspace.sources]
    for _ in range(CHECKED):
        for low, clean in zip(*map(_channels_last, next(_running)), strict=True):
            if not any(_is_part(low, clean, *source) for source in sources):
                raise ValueError(f"{CONTENDERS[name].title}: a crop differs from the source images")
    for _ in range(workspace.pairs // BATCH):
        next(_running)


def pairs_per_second(seconds: float) -> float:
    """The speed of the contender in this process over so long."""
    for _ in range(MADE_AHEAD):
        next(_running)
    batches, begun = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - begun) < seconds:
        next(_running)
        batches += 1
    return batches * BATCH / elapsed


def _channels_last(batch: Any) -> Crops:
    images = np.asarray(batch)
    assert images.dtype == np.uint8 and len(images) == BATCH, f"{images.shape} {images.dtype}"
    return images.transpose(0, 2, 3, 1) if images.shape[1] == 3 else images


def _is_part(low: Crops, clean: Crops, low_image: Crops, clean_image: Crops) -> bool:
    """Whether both crops are cut from the same place of the pair's images; all are [height, width, 3]."""
    row = int(clean.std(axis=(1, 2)).argmax())  # the most telling one
    pattern, data = clean[row].tobytes(), clean_image.tobytes()
    width = clean_image.shape[1]
    at = data.find(pattern)
    while at >= 0:
        top, left = at // 3 // width - row, at // 3 % width
        place = np.s_[max(top, 0) : top + CROP, left : left + CROP]
        if np.array_equal(clean_image[place], clean) and np.array_equal(low_image[place], low):
            return True
        at = data.find(pattern, at + 1)
    return False

"""What is measured of this project's loader alone: cold reading, the first batch, the order, resident memory."""

import functools
import os
import shutil
import time
import tracemalloc
from pathlib import Path
from typing import NamedTuple

import numpy as np
import webdataset
from contenders import BATCH, FOREVER, loader_settings
from measure import memory
from workspace import Workspace

from pipeline.data.loader import Loader
from pipeline.data.manifest import ShardRecord, load_manifest, write_manifest
from pipeline.data.order import SampleOrder, WorkerShare
from pipeline.images.codecs import decode_rgb

MANY_SHARDS, SHARD_PAIRS = 100_000, 32
ORDER_PAIRS = 1000  # in each of as many shards: 100 million samples
ORDER_SAMPLES = 1_000_000  # asked for when the order is timed
SHARE = WorkerShare(0, 1, BATCH, 1)


class FirstBatch(NamedTuple):
    """Seconds from reading the manifest to the first batch, and memory in MB.

    The peaks count what is mapped of files too, as the kernel does; ``of_its_own`` does not.
    """

    seconds: float
    peak_beyond_imports: float
    of_its_own: float
    peak: float


class FirstPass(NamedTuple):
    """Pairs/s of a first pass, start-up included, and from its first batch on."""

    with_start: float
    from_first_batch: float


class Memory(NamedTuple):
    """Memory of a process in MB: its own pages, and all that are resident, files mapped included."""

    of_its_own: float
    resident: float


def cold_pairs_per_second(url: str, cache: Path) -> FirstPass:
    """The loader's first pass over a data set, with one decoding thread and an empty cache."""
    shutil.rmtree(cache, ignore_errors=True)
    os.sync()  # writing out what others wrote is not its work
    begun = time.perf_counter()
    loader = Loader([load_manifest(url)], loader_settings(url, cache, threads=1), SHARE, seed=0)
    count = int(loader.readers[0].shards.pairs.sum()) // BATCH
    steps = loader.steps(0, count)
    next(steps)
    first = time.perf_counter()
    for _ in steps:
        pass
    end = time.perf_counter()
    return FirstPass(count * BATCH / (end - begun), (count - 1) * BATCH / (end - first))


def decoded_pairs_per_second(shards: Path) -> float:
    """One thread that decodes the images of the shards, which lie in memory, and does nothing else."""
    files = _image_files(shards)
    os.sync()
    begun = time.perf_counter()
    for data in files:
        decode_rgb(data)
    return len(files) / 2 / (time.perf_counter() - begun)


def write_many_shards(workspace: Workspace, out: Path) -> None:
    """A data set of 100,000 shards of which those exist that the first window needs."""
    shards = load_manifest(str(workspace.shards)).split("train")
    window = loader_settings(str(out), out).shuffle_shards
    order = SampleOrder(np.full(MANY_SHARDS, SHARD_PAIRS), seed=0, window=window)
    needed = np.unique(order.refs(0, window * SHARD_PAIRS).shard).tolist()
    records = [_absent(number) for number in range(MANY_SHARDS)]
    for place, number in enumerate(needed):
        real = shards[place % len(shards)]
        records[number] = ShardRecord(records[number].name, "train", real.pairs, real.size, real.sha256, real.pixels)
        os.link(workspace.shards / real.name, out / records[number].name)
    write_manifest(str(out), records, [])


def first_batch(url: str, cache: Path) -> FirstBatch:
    """One of 2 workers starts on a data set that no cache holds; to be called in a fresh process."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    resident, own, begun = memory("VmRSS"), memory("RssAnon"), time.perf_counter()
    loader = Loader([load_manifest(url)], loader_settings(url, cache), WorkerShare(0, 2, BATCH, 1), seed=0)
    next(loader.steps(0, FOREVER))
    seconds, peak = time.perf_counter() - begun, memory("VmHWM")
    return FirstBatch(seconds, peak - resident, memory("RssAnon") - own, peak)


def order_microseconds(block: int) -> float:
    """Time for each sample of an order over 100 million, asked for in blocks from the middle of an epoch on."""
    order, start = _order(), MANY_SHARDS * ORDER_PAIRS // 2
    begun = time.perf_counter()
    for first in range(start, start + ORDER_SAMPLES, block):
        order.refs(first, first + block)
    return (time.perf_counter() - begun) / ORDER_SAMPLES * 1e6


def order_memory(block: int) -> float:
    """Most memory in MB that such an order takes over an epoch's end, itself included."""
    tracemalloc.start()
    order, end = _order(), MANY_SHARDS * ORDER_PAIRS
    for first in range(end - 1000 * block, end + 1000 * block, block):
        order.refs(first, first + block)
    return tracemalloc.get_traced_memory()[1] / 1e6


def memory_by_epoch(workspace: Workspace, epochs: int) -> list[Memory]:
    """A worker's memory at the end of each epoch, the first of which fills the cache."""
    settings = loader_settings(str(workspace.shards), workspace.new_folder("memory-cache"))
    loader = Loader([load_manifest(settings.url)], settings, SHARE, seed=0)
    steps = workspace.pairs // BATCH
    found = []
    for step, _ in loader.steps(0, epochs * steps):
        if (step + 1) % steps == 0:
            found.append(Memory(memory("RssAnon"), memory("VmRSS")))
    return found


def _order() -> SampleOrder:
    return SampleOrder(np.full(MANY_SHARDS, ORDER_PAIRS), seed=0, window=16)


def _absent(number: int) -> ShardRecord:
    pixels = SHARD_PAIRS * 6 * 600 * 400
    return ShardRecord(f"train-{number:06d}.tar", "train", SHARD_PAIRS, 24_000_000, f"{number:064x}", pixels)


@functools.cache
def _image_files(shards: Path) -> list[bytes]:
    tars = sorted(str(path) for path in shards.glob("*.tar"))
    samples = webdataset.WebDataset(tars, shardshuffle=False)
    return [sample[side] for sample in samples for side in ("low.png", "high.png")]

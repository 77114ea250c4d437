"""The loader: right pixels, both images cut alike, the same samples on every layout and after every restart."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import packed
from PIL import Image

from pipeline.data.loader import DataSettings, Loader, PairReader, check_crops_fit
from pipeline.data.manifest import load_manifest
from pipeline.data.order import Share

BATCH = 4


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    return packed(tmp_path_factory.mktemp("data"))


def batches(url, workers=1, start=0, stop=6, accumulation=1, seed=0, **settings):
    """The batches of all workers by step, each a list of (low, clean) in the order of the stream."""
    records = load_manifest(url).split("train")
    data = DataSettings(url=url, crop=32, **settings)
    shares = [Share(rank, workers, BATCH // workers // accumulation, accumulation) for rank in range(workers)]
    streams = [Loader(records, data, share, seed).steps(start, stop) for share in shares]
    steps = []
    for parts in zip(*streams, strict=True):
        rounds = zip(*(rounds for _, rounds in parts), strict=True)
        flat = [batch for round_ in rounds for batch in round_]
        steps.append((parts[0][0], torch.cat([b.low for b in flat]), torch.cat([b.clean for b in flat])))
    return steps


def same(one, other):
    return len(one) == len(other) and all(
        a[0] == b[0] and torch.equal(a[1], b[1]) and torch.equal(a[2], b[2]) for a, b in zip(one, other, strict=True)
    )


def test_reader_gives_the_packed_pixels(url, tmp_path):
    record = load_manifest(url).split("train")[0]
    pair = PairReader(url).read(record)
    source = f"{url}/../source/train"
    number = record.key.removeprefix("train-")
    assert np.array_equal(pair.low, np.asarray(Image.open(f"{source}/low/{number}.png")))
    assert np.array_equal(pair.clean, np.asarray(Image.open(f"{source}/high/{number}.png")))


def test_both_images_are_cut_and_turned_alike(url):
    for _, low, clean in batches(url):
        assert low.shape == clean.shape == (BATCH, 3, 32, 32)
        assert low.dtype == clean.dtype == torch.uint8
        assert torch.equal(low, (clean.double() * 0.15).to(torch.uint8))


def test_augmentation_turns_and_mirrors(url):
    plain, turned = batches(url, flips=False), batches(url)
    assert not same(plain, turned)
    assert len({tuple(sorted(low.flatten().tolist())) for _, low, _ in turned}) > 1


@pytest.mark.parametrize(
    "layout", [{"workers": 2}, {"workers": 4}, {"workers": 2, "accumulation": 2}, {"threads": 1}, {"cache_gib": 0}]
)
def test_same_samples_on_every_layout(url, layout):
    assert same(batches(url), batches(url, **layout))


def test_continues_at_the_exact_next_sample(url):
    assert same(batches(url)[4:], batches(url, start=4))


def test_seeds_differ(url):
    assert not same(batches(url), batches(url, seed=1))


def test_changed_bytes_are_refused_by_shard_and_key(tmp_path):
    url = packed(tmp_path)
    record = load_manifest(url).split("train")[0]
    with Path(url, record.shard).open("r+b") as file:
        file.seek(record.high_offset + record.high_size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(ValueError, match=rf"{record.shard}: {record.key}.high.png differs"):
        PairReader(url).read(record)


def test_a_worker_that_stops_early_leaves_no_threads_waiting(url):
    records = load_manifest(url).split("train")
    stream = Loader(records, DataSettings(url=url, crop=32), Share(0, 1, BATCH, 1), 0).steps(0, 1000)
    next(stream)
    stream.close()
    deadline = time.monotonic() + 10
    while any(thread.name.startswith("loader") for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "the loader's threads outlive it"
        time.sleep(0.05)


def test_small_images_are_refused_by_name(url):
    with pytest.raises(
        ValueError, match=r"data.crop: 9 training pairs are smaller than 64 pixels: train-\d+ \(72x48\)"
    ):
        check_crops_fit(load_manifest(url).split("train"), 64)

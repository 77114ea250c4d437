"""The loader: right crops, the same samples on every layout and after every restart, any shape of data."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import packed, write_pairs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.data.loader import Loader
from pipeline.data.manifest import load_manifest
from pipeline.data.order import WorkerShare
from pipeline.packing.shard_writer import pack
from pipeline.settings.data import DataSettings
from pipeline.settings.packing import PackSettings

BATCH = 4
CACHE = Path()  # set by the fixture


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    return packed(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    global CACHE
    CACHE = tmp_path_factory.mktemp("cache")


def loader(url, share, seed=0, **changes):
    data = DataSettings(**({"url": url, "crop": 32, "cache": CACHE} | changes))
    return Loader([load_manifest(url) for url in data.urls], data, share, seed)


def batches(url, workers=1, start=0, stop=6, accumulation=1, seed=0, **changes):
    """Each step's crops of all workers as bytes, sorted, so that the order within a global batch does not matter."""
    shares = [WorkerShare(rank, workers, BATCH // workers // accumulation, accumulation) for rank in range(workers)]
    streams = [loader(url, share, seed, **changes).steps(start, stop) for share in shares]
    steps = []
    for number, parts in enumerate(zip(*streams, strict=True), start=start):
        assert {step for step, _ in parts} == {number}
        pairs = [pair for _, rounds in parts for batch in rounds for pair in zip(*batch, strict=True)]
        steps.append(sorted(low.numpy().tobytes() + clean.numpy().tobytes() for low, clean in pairs))
    return steps


def test_both_images_are_cut_and_turned_alike(url):
    for _, (batch,) in loader(url, WorkerShare(0, 1, BATCH, 1)).steps(0, 6):
        low, clean = batch
        assert low.shape == clean.shape == (BATCH, 3, 32, 32)
        assert low.dtype == clean.dtype == torch.uint8
        assert torch.equal(low, (clean.double() * 0.15).to(torch.uint8))


def test_augmentation_turns_and_mirrors(url):
    """Each crop lies in one of the eight positions of the crop that is cut without augmentation."""
    share = WorkerShare(0, 1, BATCH, 1)
    turned, plain = (
        [crop for _, (batch,) in loader(url, share, flips=flips).steps(0, 20) for crop in batch.low]
        for flips in (True, False)
    )
    seen = set()
    for crop, upright in zip(turned, plain, strict=True):
        positions = {
            (mirrored, quarters): torch.rot90(upright.flip(-1) if mirrored else upright, quarters, (1, 2))
            for mirrored in (False, True)
            for quarters in range(4)
        }
        seen |= {name for name, position in positions.items() if torch.equal(position, crop)}
        assert any(torch.equal(position, crop) for position in positions.values())
    assert len(seen) == 8


def test_crops_lie_channels_last(url):
    (_, (batch,)) = next(loader(url, WorkerShare(0, 1, BATCH, 1)).steps(0, 1))
    assert all(images.is_contiguous(memory_format=torch.channels_last) for images in batch)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_crops_for_a_gpu_lie_in_pinned_memory_and_are_the_same(url):
    def crops(pinned):
        data = DataSettings(url=url, crop=32, cache=CACHE)
        steps = Loader([load_manifest(url)], data, WorkerShare(0, 1, BATCH, 1), 0, pinned=pinned).steps(0, 6)
        return [images for _, (batch,) in steps for images in batch]

    pinned = crops(True)
    assert all(images.is_pinned() for images in pinned)
    assert all(torch.equal(images, expected) for images, expected in zip(pinned, crops(False), strict=True))


@pytest.mark.parametrize(
    "layout",
    [
        {"workers": 2},
        {"workers": 4},
        {"workers": 2, "accumulation": 2},
        {"threads": 1},
        {"threads": 5, "fetches": 1},
        {"cache_gib": 0},
        {"ahead": 1},
        {"ahead": 50},
    ],
)
def test_same_samples_on_every_layout(url, layout):
    assert batches(url) == batches(url, **layout)


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    before=st.sampled_from([1, 2, 4]), after=st.sampled_from([1, 2, 4]), at=st.integers(0, 8), window=st.integers(1, 4)
)
def test_continues_at_the_exact_next_sample_on_any_number_of_workers(url, before, after, at, window):
    whole = batches(url, stop=8, shuffle_shards=window)
    resumed = batches(url, before, 0, at, shuffle_shards=window) + batches(url, after, at, 8, shuffle_shards=window)
    assert resumed == whole


def test_seeds_differ(url):
    assert batches(url) != batches(url, seed=1)


def test_batches_that_are_kept_are_not_overwritten(url):
    kept = [batch for _, (batch,) in loader(url, WorkerShare(0, 1, BATCH, 1), flips=False).steps(0, 20)]
    copies = [batch.low.clone() for _, (batch,) in loader(url, WorkerShare(0, 1, BATCH, 1), flips=False).steps(0, 20)]
    assert all(torch.equal(batch.low, copy) for batch, copy in zip(kept, copies, strict=True))


def test_a_worker_that_stops_early_leaves_no_threads_waiting(url):
    stream = loader(url, WorkerShare(0, 1, BATCH, 1)).steps(0, 1000)
    next(stream)
    stream.close()
    deadline = time.monotonic() + 10
    while any(thread.name.startswith(("cut", "fetch")) for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "the loader's threads outlive it"
        time.sleep(0.05)


def test_one_shard_and_eight_workers(tmp_path):
    write_pairs(tmp_path / "source", 5)
    url = str(tmp_path / "shards")
    pack(PackSettings(source=tmp_path / "source", out=url, shard_pairs=100, dev_fraction=0))
    shares = [WorkerShare(rank, 8, 1, 1) for rank in range(8)]
    steps = list(zip(*(loader(url, share).steps(0, 5) for share in shares), strict=True))
    assert len(steps) == 5


def test_images_smaller_than_the_crop_portrait_and_landscape(tmp_path):
    write_pairs(tmp_path / "source/train", 2, size=(20, 70))
    write_pairs(tmp_path / "other/train", 2, size=(70, 24), seed=1)
    for name in ("source", "other"):
        pack(PackSettings(source=tmp_path / name, out=str(tmp_path / f"{name}-shards"), dev_fraction=0))
    urls = {"url": str(tmp_path / "source-shards"), "extra_urls": (str(tmp_path / "other-shards"),)}
    for _, (batch,) in loader(share=WorkerShare(0, 1, BATCH, 1), **urls).steps(0, 6):
        low, clean = batch
        assert low.shape == (BATCH, 3, 32, 32)
        assert torch.equal(low, (clean.double() * 0.15).to(torch.uint8))


def test_mixed_data_sets_are_read_by_their_shares(url, tmp_path):
    write_pairs(tmp_path / "black/train", 3)
    for file in (tmp_path / "black/train").glob("*/*.png"):
        Image.new("RGB", (40, 40)).save(file)
    other = str(tmp_path / "shards")
    pack(PackSettings(source=tmp_path / "black", out=other, dev_fraction=0))
    mixed = {"extra_urls": (other,), "weights": (3.0, 1.0)}
    crops = torch.cat([batch.clean for _, (batch,) in loader(url, WorkerShare(0, 1, BATCH, 1), **mixed).steps(0, 256)])
    assert (crops.flatten(1).amax(dim=1) == 0).sum() == 256
    assert batches(url, **mixed) == batches(url, workers=2, **mixed)


def test_drop_last_reads_whole_batches_of_each_epoch(url):
    pairs = int(load_manifest(url).split("train").pairs.sum())
    assert pairs % BATCH
    steps = pairs // BATCH
    share = WorkerShare(0, 1, BATCH, 1)
    whole = [batch for _, (batch,) in loader(url, share, drop_last=True, crop=32, flips=False).steps(0, steps)]
    assert len(whole) == steps
    assert batches(url, drop_last=True, stop=steps) == batches(url, stop=steps)
    assert batches(url, drop_last=True, stop=2 * steps) != batches(url, stop=2 * steps)


def test_a_broken_pair_reaches_training_as_an_error(tmp_path):
    url = packed(tmp_path)
    record = load_manifest(url).pairs("train")[0]
    with Path(url, record.shard).open("r+b") as file:
        file.truncate(record.low_offset + 100)
    with pytest.raises(ValueError, match=rf"(?s){record.shard}.*{record.key}"):
        list(loader(url, WorkerShare(0, 1, BATCH, 1), cache_gib=0).steps(0, 10))


def test_pairs_skipped_by_all_workers_are_the_same_on_every_layout(url, tmp_path):
    damaged = packed(tmp_path)
    record = load_manifest(damaged).pairs("train")[4]
    with Path(damaged, record.shard).open("r+b") as file:
        file.seek(record.high_offset + 60)
        file.write(b"\0\0\0\0")
    changes = {"on_bad_data": "skip", "cache": tmp_path / "cache"}
    one, two = (batches(damaged, workers=workers, **changes) for workers in (1, 2))
    assert one == two != batches(url)
    single = loader(damaged, WorkerShare(0, 1, BATCH, 1), **changes)
    list(single.steps(0, 9 * 3))
    epochs = 9 * 3 * BATCH // int(single.readers[0].shards.pairs.sum())
    assert single.skipped >= epochs


def test_crops_lie_anywhere_in_the_image(tmp_path):
    """An image that counts its columns shows where each crop was cut."""
    columns = np.tile(np.arange(200, dtype=np.uint8), (32, 1))
    for side in ("low", "high"):
        (tmp_path / "source" / side).mkdir(parents=True)
        Image.fromarray(np.dstack([columns] * 3)).save(tmp_path / "source" / side / "1.png")
    url = str(tmp_path / "shards")
    pack(PackSettings(source=tmp_path / "source", out=url, dev_fraction=0))
    lefts = [
        int(left)
        for _, (batch,) in loader(url, WorkerShare(0, 1, BATCH, 1), flips=False).steps(0, 500)
        for left in batch.low[:, 0, 0, 0]
    ]
    assert min(lefts) == 0 and max(lefts) == 200 - 32
    assert np.histogram(lefts, bins=13, range=(0, 169))[0] == pytest.approx(2000 / 13, rel=0.35)


def finished(loader, steps):
    """The state after so many steps, once the cache is written."""
    list(loader.steps(0, steps))
    for stream in loader.readers:
        stream.cache._writer.shutdown()
    return loader.state()


def test_states_what_was_decoded_and_what_the_cache_held(url, tmp_path):
    pairs, shards = 9, 3
    one, header = 72 * 48 * 3 * 2, 16 + 32 * pairs // shards
    cold = finished(loader(url, WorkerShare(1, 2, 2, 2), cache=tmp_path), 20)
    assert cold.pairs == 20 * 2 * 2
    assert pairs <= cold.decoded_pairs < cold.pairs
    assert cold.cached_bytes == cold.decoded_pairs * one + shards * header
    assert cold.cache_bytes == pairs * one
    warm = finished(loader(url, WorkerShare(0, 1, BATCH, 1), cache=tmp_path), 20)
    assert (warm.pairs, warm.decoded_pairs, warm.cached_bytes) == (20 * BATCH, 0, 0)
    assert (cold.fetched_bytes, cold.retries) == (warm.fetched_bytes, warm.retries) == (0, 0), "the shards are local"
    bare = loader(url, WorkerShare(0, 1, BATCH, 1), cache_gib=0)
    list(bare.steps(0, 20))
    assert bare.state().decoded_pairs == 20 * BATCH and bare.state().cache_bytes == 0


def test_states_how_many_steps_are_ready_ahead(url):
    held, ahead = threading.Event(), 3
    one = loader(url, WorkerShare(0, 1, BATCH, 1), ahead=ahead, shuffle_shards=8)
    window = 8 * 3 // BATCH  # the steps that the samples of a window last
    assert one.state()[:2] == (0, 0)
    steps = one.steps(0, 20)
    next(steps)
    deadline = time.monotonic() + 10
    while one.state().ready_steps < ahead and time.monotonic() < deadline:
        time.sleep(0.01)
    assert one.state()[:2] == (window - 1 - ahead, ahead)
    cut = one.readers[0].pair
    one.readers[0].pair = lambda *place: held.wait(10) and cut(*place)
    next(steps)
    assert one.state()[:2] == (window - 1, ahead - 1), "the step that was begun last can't become ready"
    held.set()
    list(steps)
    assert one.state()[:2] == (0, 0)


def test_states_how_long_training_waited_and_not_how_long_it_took(url):
    def waited(training_s):
        one = loader(url, WorkerShare(0, 1, BATCH, 1), ahead=1, threads=1)
        cut = one.readers[0].pair
        one.readers[0].pair = lambda *place: time.sleep(0.01) or cut(*place)
        for _ in one.steps(0, 6):
            time.sleep(training_s)
        return one.state().wait_s

    began = time.monotonic()
    in_vain = waited(0)
    assert 6 * BATCH * 0.01 <= in_vain <= time.monotonic() - began
    assert waited(0.1) < in_vain

"""The stream from a real S3 server, also when the way to it breaks: the same samples as from an undisturbed disk."""

import threading
from pathlib import Path

import numpy as np
import pytest
from datasets import packed
from s3 import Fault

from pipeline import s3 as door
from pipeline import storage
from pipeline.data.loader import Loader
from pipeline.data.manifest import load_manifest
from pipeline.data.order import WorkerShare
from pipeline.data.pair_reader import PairReader
from pipeline.data.shard import BadDataError
from pipeline.settings.data import DataSettings

SHARDS = r"GET /.*train-\d+\.tar"


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    return packed(tmp_path_factory.mktemp("data"), count=24, size=(192, 128))


@pytest.fixture
def url(local, s3):
    """The same data set on the server."""
    bucket = s3.make_bucket()
    for name in storage.listdir(local):
        storage.write_bytes(f"{bucket}/set/{name}", storage.read_bytes(f"{local}/{name}"))
    return f"{bucket}/set"


@pytest.fixture
def impatient(monkeypatch):
    """Silence counts as a dead connection after a second."""
    monkeypatch.setattr(door, "READ_TIMEOUT_S", 1.0)


def crops(url, cache, **changes):
    """The crops of 12 steps, two epochs and a bit."""
    settings = DataSettings(url=url, crop=64, cache=cache, **changes)
    loader = Loader([load_manifest(url)], settings, WorkerShare(0, 1, 4, 1), 0)
    return [batch.low.numpy() for _, (batch,) in loader.steps(0, 12)]


def same(one, other):
    return len(one) == len(other) and all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("cache_gib", [0, 1, 1e-4], ids=["no cache", "decoded images kept", "a few shards kept"])
def test_gives_what_the_disk_gives(local, url, tmp_path, cache_gib):
    assert same(crops(url, tmp_path / "s3", cache_gib=cache_gib), crops(local, tmp_path / "disk"))


def test_each_shard_is_fetched_once_for_all_workers_of_a_node(url, faults, tmp_path):
    shards = len(load_manifest(url).split("train"))

    def read(stream):
        for shard in range(shards):
            stream.pair(shard, 0)

    settings = DataSettings(url=url, cache=tmp_path)
    streams = [PairReader(load_manifest(url), "train", settings) for _ in range(3)]
    threads = [threading.Thread(target=read, args=[stream]) for stream in streams]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(request.path.endswith(".tar") for request in faults.requests) == shards
    read(PairReader(load_manifest(url), "train", settings))
    assert sum(request.path.endswith(".tar") for request in faults.requests) == shards


def test_a_second_run_asks_for_the_manifest_alone(url, faults, tmp_path):
    first = crops(url, tmp_path)
    faults.reset()
    assert same(crops(url, tmp_path), first)
    assert {request.path.rsplit("/", 1)[1] for request in faults.requests} == {"manifest.parquet"}


@pytest.mark.parametrize(
    "fault",
    [
        Fault("status", SHARDS, probability=0.5, status=503),
        Fault("status", SHARDS, probability=0.5, status=500, code="InternalError"),
        Fault("reset", SHARDS, probability=0.5),
        Fault("reset", SHARDS, probability=0.5, at=20_000),
        Fault("truncate", SHARDS, probability=0.5, at=20_000),
        Fault("stall", SHARDS, times=2, at=20_000, seconds=10),
        Fault("flip", SHARDS, times=2, at=20_000),
    ],
    ids=["503", "500", "reset", "reset in the body", "truncated", "stalled", "flipped bit"],
)
def test_samples_are_those_of_an_undisturbed_stream(local, url, faults, impatient, tmp_path, fault):
    faults.add(fault)
    assert same(crops(url, tmp_path / "s3"), crops(local, tmp_path / "disk"))
    assert fault.hits


def test_a_shard_that_arrives_changed_each_time_is_named(url, faults, tmp_path, caplog):
    name = load_manifest(url).split("train")[0].name
    faults.add(Fault("flip", name, at=20_000))
    stream = PairReader(load_manifest(url), "train", DataSettings(url=url, cache=tmp_path))
    with pytest.raises(BadDataError, match=rf"{url}: {name}: differs from the shard that was packed"):
        stream.pair(0, 0)
    assert f"{url}/{name} arrived changed (SHA-256), attempt 3 of 3" in caplog.text
    assert not list(tmp_path.rglob("*.tar"))


def test_every_transfer_is_verified_and_not_the_first_alone(local, url, faults, tmp_path):
    def first_pairs(stream):
        return [stream.pair(shard, 0).low.copy() for shard in [*range(len(stream.shards)), 0]]

    def open_stream(url):
        settings = DataSettings(url=url, cache=tmp_path, cache_gib=0, shuffle_shards=1, fetches=1)
        return PairReader(load_manifest(url), "train", settings)

    stream = open_stream(url)
    assert len(stream.shards) > 3, "so that the first one is closed before it is read again"
    stream.pair(0, 0)
    faults.add(Fault("flip", stream.shards[0].name, at=20_000, times=1))
    assert same(first_pairs(stream)[1:], first_pairs(open_stream(local))[1:])
    assert faults.faults[0].hits == 1


def test_a_missing_shard_is_named_at_once(url, tmp_path):
    name = load_manifest(url).split("train")[1].name
    storage.delete(f"{url}/{name}")
    stream = PairReader(load_manifest(url), "train", DataSettings(url=url, cache=tmp_path))
    with pytest.raises(BadDataError, match=rf"{url}: {name}: is missing"):
        stream.pair(1, 0)


def test_a_cached_shard_that_has_changed_is_fetched_again(local, url, faults, tmp_path):
    settings = {"cache_gib": 1.5e-3}
    expected = crops(url, tmp_path, **settings)
    shard = next(tmp_path.rglob("*.tar"))
    shard.write_bytes(bytes(shard.stat().st_size))
    faults.reset()
    assert same(crops(url, tmp_path, **settings), expected)
    assert any(request.path.endswith(".tar") for request in faults.requests)


def test_counts_what_was_fetched_and_how_often_it_had_to_be_tried_again(local, url, faults, tmp_path):
    def fetched(folder):
        stream = PairReader(load_manifest(url), "train", DataSettings(url=url, cache=tmp_path / folder))
        for shard in range(len(stream.shards)):
            stream.pair(shard, 0)
        return stream.fetched_bytes, stream.retries

    sizes = [path.stat().st_size for path in sorted(Path(local).glob("train-*.tar"))]
    assert fetched("first") == (sum(sizes), 0)
    assert fetched("first") == (0, 0)
    faults.add(Fault("status", SHARDS, times=2))
    faults.add(Fault("truncate", SHARDS, times=1, at=20_000))
    assert fetched("second") == (sum(sizes), 3)
    faults.reset()
    faults.add(Fault("flip", "train-000001.tar", times=1, at=20_000))
    assert fetched("third") == (sum(sizes) + sizes[1], 1)

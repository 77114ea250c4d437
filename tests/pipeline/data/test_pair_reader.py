"""The stream of pairs: right pixels with and without a cache, decoded once, and bad data named or replaced."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from datasets import packed
from PIL import Image

import pipeline.data.shard
from pipeline.data.manifest import load_manifest
from pipeline.data.pair_reader import PairReader
from pipeline.data.shard import BadDataError
from pipeline.settings.data import DataSettings


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return packed(tmp_path_factory.mktemp("data"))


@pytest.fixture
def url(source, tmp_path):
    """A copy of the data set, to be damaged."""
    return str(shutil.copytree(source, tmp_path / "copy"))


def open_stream(url, tmp_path, **changes):
    return PairReader(load_manifest(url), "train", DataSettings(url=url, cache=tmp_path / "cache", **changes))


def places(stream):
    return [(shard, sample) for shard in range(len(stream.shards)) for sample in range(stream.shards[shard].pairs)]


def read_all(stream):
    return [[image.copy() for image in stream.pair(*place)] for place in places(stream)]


def same(one, other):
    return all(np.array_equal(a, b) for pair in zip(one, other, strict=True) for a, b in zip(*pair, strict=True))


def counted(monkeypatch):
    """The images decoded from now on."""
    decoded = []
    decode = pipeline.data.shard.decode_rgb
    monkeypatch.setattr(pipeline.data.shard, "decode_rgb", lambda data: decoded.append(1) or decode(data))
    return decoded


def flip_a_bit(url, record, where):
    with Path(url, record.shard).open("r+b") as file:
        file.seek(where)
        byte = file.read(1)
        file.seek(where)
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("cache_gib", [0, 1])
def test_gives_the_pixels_that_were_packed(source, tmp_path, cache_gib):
    stream = open_stream(source, tmp_path, cache_gib=cache_gib)
    keys = iter(load_manifest(source).pairs("train"))
    for _ in range(2):
        for place, record in zip(places(stream), keys, strict=False):
            number = record.key.removeprefix("train-")
            for side, image in zip(("low", "high"), stream.pair(*place), strict=True):
                assert np.array_equal(image, np.asarray(Image.open(f"{source}/../source/train/{side}/{number}.png")))


def test_an_image_is_decoded_once_by_all_processes_that_share_a_cache(source, tmp_path, monkeypatch):
    stream = open_stream(source, tmp_path)
    first = read_all(stream)
    stream.cache._writer.shutdown()  # decoded images are written in the background
    decoded = counted(monkeypatch)
    stream = open_stream(source, tmp_path)
    for shard in range(len(stream.shards)):
        stream.fetch(shard)
    assert same(read_all(stream), first) and not decoded
    assert same(read_all(open_stream(source, tmp_path, cache_gib=0)), first) and decoded


def test_decoded_images_that_do_not_fit_are_decoded_anew(source, tmp_path, monkeypatch):
    stream = open_stream(source, tmp_path, cache_gib=1e-6)
    assert "no room" in str(stream.cache)
    first, decoded = read_all(stream), counted(monkeypatch)
    assert same(read_all(stream), first) and len(decoded) == 2 * len(first)


def test_no_more_shards_are_open_than_two_windows_need(source, tmp_path):
    stream = open_stream(source, tmp_path, shuffle_shards=1, fetches=1, cache_gib=0)
    assert len(stream.shards) >= 3
    first = read_all(stream)
    assert len(stream._open) == 3
    assert same(read_all(stream), first)


@pytest.mark.parametrize("cache_gib", [0, 1])
def test_a_changed_byte_stops_the_run_with_shard_key_and_reason(url, tmp_path, cache_gib):
    record = load_manifest(url).pairs("train")[1]
    flip_a_bit(url, record, record.high_offset + record.high_size // 2)
    reason = rf"{record.shard}: differs from the shard that was packed.*\n  {record.key}: its high image differs"
    with pytest.raises(BadDataError, match=reason):
        open_stream(url, tmp_path, cache_gib=cache_gib).pair(0, 0)


def test_a_truncated_shard_names_the_pairs_that_are_cut_off(url, tmp_path):
    record = load_manifest(url).pairs("train")[2]
    with Path(url, record.shard).open("r+b") as file:
        file.truncate(record.low_offset + 10)
    with pytest.raises(BadDataError, match=rf"{record.shard}: has not the \d+ bytes") as error:
        open_stream(url, tmp_path).pair(0, 0)
    assert f"{record.key}: its low image is cut off (the shard ends after {record.low_offset + 10} bytes)" in str(
        error.value
    )
    assert load_manifest(url).pairs("train")[1].key + ":" not in str(error.value)


def test_skipping_takes_the_next_good_pair_says_so_once_and_counts(url, source, tmp_path, caplog):
    records = load_manifest(url).pairs("train")
    for number in (1, 2):
        flip_a_bit(url, records[number], records[number].low_offset + 100)
    whole = read_all(open_stream(source, tmp_path / "whole"))
    stream = open_stream(url, tmp_path, on_bad_data="skip")
    expected = [whole[3 if number in (1, 2) else number] for number in range(len(whole))]
    assert same(read_all(stream), expected)
    assert same(read_all(stream), expected)
    assert stream.skipped == 4
    said = [entry.message for entry in caplog.records]
    assert [sum(f"{records[number].key}: its low image differs" in line for line in said) for number in (1, 2)] == [
        1,
        1,
    ]


def test_skipping_a_whole_shard_goes_on_with_the_next_one(url, source, tmp_path):
    stream = open_stream(url, tmp_path, on_bad_data="skip")
    last = len(stream.shards) - 1
    Path(url, stream.shards[last].name).unlink()
    whole = open_stream(source, tmp_path / "whole")
    for sample in range(stream.shards[last].pairs):
        assert same([stream.pair(last, sample)], [whole.pair(0, 0)])


def test_a_data_set_without_one_good_pair_is_an_error(url, tmp_path):
    for shard in Path(url).glob("train-*.tar"):
        shard.write_bytes(b"")
    stream = open_stream(url, tmp_path, on_bad_data="skip")
    with pytest.raises(BadDataError, match="none of its train pairs can be read"):
        stream.pair(0, 0)


def test_a_manifest_of_another_tar_is_noticed(url, tmp_path):
    stream = open_stream(url, tmp_path, cache_gib=0)
    names = [stream.shards[number].name for number in (0, 1)]
    Path(url, names[0]).write_bytes(Path(url, names[1]).read_bytes())
    with pytest.raises(BadDataError, match=rf"{names[0]}: (differs from|has not)"):
        stream.pair(0, 0)

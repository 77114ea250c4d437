"""Single pairs, read from where they lie in the shards."""

from pathlib import Path

import numpy as np
import pytest
from datasets import packed
from PIL import Image

from pipeline import storage
from pipeline.data.manifest import PairRecord, load_manifest
from pipeline.data.pairs import read_pair


@pytest.fixture
def url(tmp_path: Path) -> str:
    return packed(tmp_path)


@pytest.fixture
def record(url: str) -> PairRecord:
    return load_manifest(url).pairs("train")[1]


def test_the_packed_pixels(url: str, record: PairRecord, tmp_path: Path) -> None:
    pair = read_pair(url, record)
    number = record.key.removeprefix("train-")
    assert np.array_equal(pair.low, np.asarray(Image.open(tmp_path / f"source/train/low/{number}.png")))
    assert np.array_equal(pair.clean, np.asarray(Image.open(tmp_path / f"source/train/high/{number}.png")))


def test_only_the_two_images_are_read(url: str, record: PairRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    def counted(url: str, offset: int = 0, length: int | None = None) -> bytes:
        read.append((offset, length))
        return Path(url).read_bytes()[offset : offset + (length or 0)]

    monkeypatch.setattr(storage, "read_bytes", counted)
    read_pair(url, record)
    assert read == [(record.low_offset, record.low_size), (record.high_offset, record.high_size)]


def test_a_flipped_bit_is_refused_by_shard_and_key(url: str, record: PairRecord) -> None:
    shard = Path(url, record.shard)
    data = bytearray(shard.read_bytes())
    data[record.high_offset + record.high_size // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{record.shard}: {record.key}.high.png: differs from the image that was"):
        read_pair(url, record)


def test_a_shard_cut_short_or_missing_is_refused_by_shard_and_key(url: str, record: PairRecord) -> None:
    shard = Path(url, record.shard)
    shard.write_bytes(shard.read_bytes()[: record.low_offset + 1])
    with pytest.raises(ValueError, match=rf"{record.shard}: {record.key}.low.png: .*bytes from {record.low_offset}"):
        read_pair(url, record)
    shard.unlink()
    with pytest.raises(ValueError, match=rf"{record.shard}: {record.key}.low.png: .*No such file"):
        read_pair(url, record)

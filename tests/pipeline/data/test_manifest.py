"""A data set's two tables come back as written, byte for byte the same, and say plainly when they can't be used."""

import hashlib
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import storage
from pipeline.data.manifest import (
    PairRecord,
    ShardRecord,
    load_manifest,
    mean_luminance,
    perceptual_hash,
    write_manifest,
)

PAIR = PairRecord(
    key="train-1",
    shard="train-000000.tar",
    low_offset=512,
    low_size=100,
    high_offset=2048,
    high_size=200,
    width=8,
    height=6,
    low_luminance=0.1,
    high_luminance=0.5,
    low_sha256="a" * 64,
    high_sha256="b" * 64,
    low_phash="0" * 16,
    high_phash="f" * 16,
    scene="train-1",
    split="train",
)
PAIRS = (
    PAIR,
    replace(PAIR, key="train-2", shard="train-000001.tar", high_sha256="c" * 64),
    replace(PAIR, key="test-1", shard="test-000000.tar", split="test"),
)
SHARD = ShardRecord("train-000000.tar", "train", pairs=1, size=10_240, sha256="0f" * 32, pixels=288)
SHARDS = (
    SHARD,
    ShardRecord("train-000001.tar", "train", pairs=1, size=20_480, sha256="e1" * 32, pixels=289),
    ShardRecord("test-000000.tar", "test", pairs=1, size=30_720, sha256="2d" * 32, pixels=290),
)


@pytest.fixture
def url(tmp_path: Path) -> str:
    write_manifest(str(tmp_path), SHARDS, PAIRS)
    return str(tmp_path)


def test_what_is_written_is_read(url: str) -> None:
    manifest = load_manifest(url)
    assert manifest.url == url
    shards = manifest.split("train")
    assert (shards.url, len(shards), shards[0], shards[1]) == (url, 2, SHARDS[0], SHARDS[1])
    assert (shards.pairs.tolist(), shards.sizes.tolist(), shards.pixels.tolist()) == (
        [1, 1],
        [10_240, 20_480],
        [288, 289],
    )
    assert manifest.split("test")[0] == SHARDS[2]
    assert manifest.pairs("train") == PAIRS[:2]
    assert manifest.pairs("test") == PAIRS[2:]
    assert manifest.pair_table(["split", "high_sha256"]).to_pylist() == [
        {"high_sha256": pair.high_sha256, "split": pair.split} for pair in PAIRS
    ]


def test_the_checksum_is_that_of_the_file(url: str) -> None:
    assert load_manifest(url).checksum == hashlib.sha256(Path(url, "manifest.parquet").read_bytes()).hexdigest()


def test_one_changed_image_changes_the_checksum(url: str, tmp_path: Path) -> None:
    write_manifest(str(tmp_path / "other"), SHARDS, (replace(PAIR, low_sha256="d" * 64), *PAIRS[1:]))
    assert load_manifest(url).checksum != load_manifest(str(tmp_path / "other")).checksum


def test_the_same_records_give_the_same_bytes(url: str, tmp_path: Path) -> None:
    write_manifest(str(tmp_path / "again"), SHARDS, PAIRS)
    for name in ("manifest.parquet", "pairs.parquet"):
        assert Path(url, name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_hundred_thousand_shards_cost_no_objects_until_they_are_asked_for(tmp_path: Path) -> None:
    shards = [replace(SHARD, name=f"train-{index:06d}.tar", size=index) for index in range(100_000)]
    write_manifest(str(tmp_path), shards, PAIRS)
    load_manifest(str(tmp_path)).split("train")  # whatever is imported or kept by the first one
    before = sys.getallocatedblocks()
    found = load_manifest(str(tmp_path)).split("train")
    assert sys.getallocatedblocks() - before < 1_000
    assert len(found) == 100_000
    assert found[77_777] == shards[77_777]
    assert np.array_equal(found.sizes, np.arange(100_000))
    assert not found.sizes.flags.writeable


def test_the_manifest_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(storage, "write_bytes", lambda url, data: written.append(storage.name_of(url)))
    write_manifest(str(tmp_path), SHARDS, PAIRS)
    assert written == ["pairs.parquet", "manifest.parquet"]


def test_an_empty_split_names_those_that_exist(url: str) -> None:
    manifest = load_manifest(url)
    for ask in (manifest.split, manifest.pairs):
        with pytest.raises(ValueError, match=r"split 'dev' holds no pairs; .* train \(2 pairs\), test \(1 pairs\)"):
            ask("dev")


def test_a_missing_manifest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"manifest.parquet: there is no manifest; check the path"):
        load_manifest(str(tmp_path))


def test_a_folder_in_place_of_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "manifest.parquet").mkdir()
    with pytest.raises(ValueError, match="cannot be read"):
        load_manifest(str(tmp_path))


@pytest.mark.parametrize("error", [PermissionError("s3://b/p: access denied"), ConnectionError("no one listens")])
def test_storage_that_refuses_gives_its_reason(error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url: str, **_: object) -> bytes:
        raise error

    monkeypatch.setattr(storage, "read_bytes", refuse)
    with pytest.raises(ValueError, match=rf"s3://b/p/manifest.parquet: cannot be read \({error}\)"):
        load_manifest("s3://b/p")


def test_not_parquet(tmp_path: Path) -> None:
    (tmp_path / "manifest.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(ValueError, match="is not a Parquet file"):
        load_manifest(str(tmp_path))


def test_a_damaged_manifest(url: str) -> None:
    path = Path(url, "manifest.parquet")
    data = bytearray(path.read_bytes())
    data[4:400] = bytes(396)  # the first column's pages, not the footer
    path.write_bytes(data)
    with pytest.raises(ValueError, match="is not a Parquet file"):
        load_manifest(url)


def test_a_table_of_pairs_in_place_of_the_manifest(url: str) -> None:
    Path(url, "pairs.parquet").replace(Path(url, "manifest.parquet"))
    with pytest.raises(ValueError, match=r"missing or of another type: name, pairs, size, .*: pack the data set again"):
        load_manifest(url)


def test_other_columns(tmp_path: Path) -> None:
    columns = {name: pa.array([value]) for name, value in asdict(SHARD).items()}
    fields = [pa.field(name, column.type, nullable=False) for name, column in columns.items()]
    pq.write_table(pa.table(list(columns.values()), schema=pa.schema(fields)), tmp_path / "manifest.parquet")
    with pytest.raises(ValueError, match="columns missing or of another type: sha256;"):
        load_manifest(str(tmp_path))


@pytest.mark.parametrize(("shards", "fault"), [((), "no pairs"), ((replace(SHARD, split="val"),), "splits val")])
def test_shards_that_make_no_data_set(shards: tuple[ShardRecord, ...], fault: str, tmp_path: Path) -> None:
    write_manifest(str(tmp_path), shards, ())
    with pytest.raises(ValueError, match=rf"{fault}; pack the data set again"):
        load_manifest(str(tmp_path))


def test_missing_pairs_leave_training_alone(url: str) -> None:
    Path(url, "pairs.parquet").unlink()
    manifest = load_manifest(url)
    assert len(manifest.split("train")) == 2
    with pytest.raises(ValueError, match=r"pairs.parquet: the manifest's table of pairs is missing; copy it too"):
        manifest.pairs("train")


def test_pairs_of_another_packing_are_refused(url: str, tmp_path: Path) -> None:
    write_manifest(str(tmp_path / "other"), SHARDS, PAIRS[::-1])
    (tmp_path / "other/pairs.parquet").replace(Path(url, "pairs.parquet"))
    with pytest.raises(ValueError, match=r"pairs.parquet: is not the table that was packed"):
        load_manifest(url).pair_table(["key"])


def test_luminance_is_bt601() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    expected = (pixels.astype(float) @ [0.299, 0.587, 0.114]).mean() / 255
    assert mean_luminance(pixels) == pytest.approx(expected, abs=1e-12)


def distance(one: str, two: str) -> int:
    return (int(one, 16) ^ int(two, 16)).bit_count()


def blobs(seed: int) -> Image.Image:
    """A smooth random image, as photographs are at the scale of the hash."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((96, 64), Image.Resampling.BICUBIC)


def test_hashes_of_one_scene_are_near_and_of_others_far() -> None:
    image = blobs(1)
    original = perceptual_hash(np.asarray(image))
    smaller = perceptual_hash(np.asarray(image.resize((48, 32), Image.Resampling.BOX)))
    darker = perceptual_hash((np.asarray(image) * 0.6).astype(np.uint8))
    strangers = [perceptual_hash(np.asarray(blobs(seed))) for seed in range(2, 12)]
    assert len(original) == 16
    assert distance(original, smaller) <= 4
    assert distance(original, darker) <= 4
    assert min(distance(original, stranger) for stranger in strangers) > 10


def test_flat_images_are_alike() -> None:
    flats = {perceptual_hash(np.full((40, 50, 3), value, dtype=np.uint8)) for value in (1, 77, 255)}
    assert len(flats) == 1

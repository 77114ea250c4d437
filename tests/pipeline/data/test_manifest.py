"""The manifest comes back as written, byte for byte the same, and says plainly when it can't be used."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.data.manifest import PairRecord, load_manifest, mean_luminance, perceptual_hash, write_manifest

RECORD = PairRecord(
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
RECORDS = (RECORD, replace(RECORD, key="train-2"), replace(RECORD, key="test-1", split="test"))


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path)


def test_what_is_written_is_read(url: str) -> None:
    write_manifest(url, RECORDS)
    manifest = load_manifest(url)
    assert manifest.url == url
    assert manifest.records == RECORDS
    assert manifest.checksum == hashlib.sha256(Path(url, "manifest.parquet").read_bytes()).hexdigest()
    assert [record.key for record in manifest.split("train")] == ["train-1", "train-2"]


def test_the_same_records_give_the_same_bytes(url: str, tmp_path: Path) -> None:
    write_manifest(url, RECORDS)
    write_manifest(str(tmp_path / "again"), RECORDS)
    assert Path(url, "manifest.parquet").read_bytes() == (tmp_path / "again/manifest.parquet").read_bytes()


def test_an_empty_split_names_those_that_exist(url: str) -> None:
    write_manifest(url, RECORDS)
    with pytest.raises(ValueError, match=r"split 'dev' holds no pairs; .* train \(2 pairs\), test \(1 pairs\)"):
        load_manifest(url).split("dev")


def test_a_missing_manifest(url: str) -> None:
    with pytest.raises(ValueError, match=r"manifest.parquet: there is no manifest; check the path"):
        load_manifest(url)


def test_a_folder_in_place_of_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "manifest.parquet").mkdir()
    with pytest.raises(ValueError, match="cannot be read"):
        load_manifest(str(tmp_path))


def test_not_parquet(url: str) -> None:
    Path(url, "manifest.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(ValueError, match="is not a Parquet file"):
        load_manifest(url)


def test_other_columns(url: str) -> None:
    columns = {name: pa.array([value]) for name, value in vars(RECORD).items() if name != "scene"}
    pq.write_table(pa.table(columns | {"width": pa.array(["wide"])}), Path(url, "manifest.parquet"))
    with pytest.raises(ValueError, match="columns missing or of another type: width, scene"):
        load_manifest(url)


@pytest.mark.parametrize(("records", "fault"), [((), "no pairs"), ((replace(RECORD, split="val"),), "splits val")])
def test_records_that_make_no_data_set(records: tuple[PairRecord, ...], fault: str, url: str) -> None:
    write_manifest(url, records)
    with pytest.raises(ValueError, match=fault):
        load_manifest(url)


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

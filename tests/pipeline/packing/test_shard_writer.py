"""Packing keeps every byte, cuts splits by scene, evens out shards and refuses faults before it writes."""

import hashlib
import io
import re
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import webdataset
from PIL import Image
from s3 import S3Server
from source_pairs import add_pair, all_pairs, scene_image, settings

from pipeline import storage
from pipeline.data.manifest import load_manifest
from pipeline.images.codecs import read_rgb, to_stored_png
from pipeline.packing.shard_writer import pack


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_manifest_leads_to_the_exact_bytes_of_the_source(source: Path, tmp_path: Path) -> None:
    report = pack(settings(source))
    assert load_manifest(report.url).checksum == report.checksum
    pairs = all_pairs(report.url)
    assert len(pairs) == 23
    for record in pairs:
        split, _, number = record.key.partition("-")
        folder = source / {"train": "our485", "test": "eval15"}[split]
        shard = (tmp_path / "out" / record.shard).read_bytes()
        for side in ("low", "high"):
            offset, size = getattr(record, f"{side}_offset"), getattr(record, f"{side}_size")
            stored = shard[offset : offset + size]
            assert stored == (folder / side / f"{number}.png").read_bytes()
            assert getattr(record, f"{side}_sha256") == hashlib.sha256(stored).hexdigest()
            pixels = np.asarray(Image.open(io.BytesIO(stored)), dtype=float)
            expected = (pixels @ [0.299, 0.587, 0.114]).mean() / 255
            assert getattr(record, f"{side}_luminance") == pytest.approx(expected, abs=1e-12)
        assert (record.width, record.height) == (48, 32)
    assert report.converted == 0


def test_the_manifest_tells_size_checksum_and_pixels_of_each_shard(source: Path, tmp_path: Path) -> None:
    for side in ("low", "high"):
        scene_image(77, (64, 16)).save(source / "our485" / side / "wide.png")
    report = pack(settings(source))
    manifest, pairs, size = load_manifest(report.url), all_pairs(report.url), 0
    for split in ("train", "dev", "test"):
        for shard in manifest.split(split):
            tar = (tmp_path / "out" / shard.name).read_bytes()
            members = [pair for pair in pairs if pair.shard == shard.name]
            assert (shard.split, shard.pairs, shard.size) == (split, len(members), len(tar))
            assert shard.sha256 == hashlib.sha256(tar).hexdigest()
            assert shard.pixels == sum(6 * (64 * 16 if pair.key == "train-wide" else 48 * 32) for pair in members)
            size += len(tar)
    assert report.size == size


def test_pairs_are_listed_in_the_order_of_the_tars(source: Path) -> None:
    report = pack(settings(source))
    manifest = load_manifest(report.url)
    order = []
    for split in ("train", "dev", "test"):
        for shard in manifest.split(split):
            with tarfile.open(Path(report.url, shard.name)) as tar:
                order += [name.removesuffix(".low.png") for name in tar.getnames() if name.endswith(".low.png")]
    assert [pair.key for pair in all_pairs(report.url)] == order


def test_storage_that_refuses_is_a_plain_error(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url: str, *_: object, **__: object) -> bool:
        raise PermissionError(f"{url}: access denied")

    for door in ("exists", "listdir", "write_bytes"):
        with monkeypatch.context() as patched:
            patched.setattr(storage, door, refuse)
            with pytest.raises(ValueError, match=r"out.*access denied"):
                pack(settings(source))


def test_packing_to_s3_gives_the_same_data_set(s3: S3Server, source: Path, tmp_path: Path) -> None:
    url = f"{s3.make_bucket()}/sets/lol"
    local, remote = pack(settings(source)), pack(settings(source, out=url))
    assert (remote.url, remote.checksum) == (url, local.checksum)
    assert storage.listdir(url) == sorted(contents(tmp_path / "out"))
    for name, data in contents(tmp_path / "out").items():
        assert storage.read_bytes(f"{url}/{name}") == data
    with pytest.raises(ValueError, match=r"manifest.parquet exists"):
        pack(settings(source, out=url))


def test_packing_to_a_bucket_that_is_not_there(s3: S3Server, source: Path) -> None:
    with pytest.raises(ValueError, match=r"s3://nothing-here/.*no such bucket"):
        pack(settings(source, out="s3://nothing-here/set"))


def test_shards_load_with_webdataset(source: Path, tmp_path: Path) -> None:
    report = pack(settings(source))
    records = {record.key: record for record in all_pairs(report.url)}
    urls = sorted(str(path) for path in (tmp_path / "out").glob("*.tar"))
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert {sample["__key__"] for sample in samples} == set(records)
    for sample in samples:
        record = records[sample["__key__"]]
        assert sample["low.png"].shape == sample["high.png"].shape == (32, 48, 3)
        assert sample["json"] == {
            "key": record.key, "scene": record.scene, "split": record.split, "width": 48, "height": 32,
        }  # fmt: skip
        assert record.shard.startswith(f"{record.split}-")


def test_mispaired_originals_are_reported_for_lol_v1_only(source: Path, tmp_path: Path) -> None:
    add_pair(source, "our485", "79.png", seed=79)
    add_pair(tmp_path / "other", "train", "79.png", seed=79)
    assert pack(settings(source)).mispaired == ("train-79",)
    assert pack(settings(tmp_path / "other", out=str(tmp_path / "other-out"))).mispaired == ()


def test_packing_again_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    pack(settings(source))
    pack(settings(source, out=str(tmp_path / "again")))
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


def test_an_existing_data_set_is_refused(source: Path, tmp_path: Path) -> None:
    pack(settings(source))
    before = contents(tmp_path / "out")
    with pytest.raises(ValueError, match=r"manifest.parquet exists; choose another folder for out, or delete"):
        pack(settings(source))
    assert contents(tmp_path / "out") == before


def test_an_interrupted_packing_can_be_repeated_but_not_mixed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("pipeline.packing.shard_writer.write_manifest", lambda url, shards, pairs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pack(settings(source))
    assert not (tmp_path / "out/manifest.parquet").exists()
    with pytest.raises(ValueError, match=r"shards of another packing; delete them first:\n  train-000001.tar"):
        pack(settings(source, shard_pairs=100))
    assert pack(settings(source)).pairs["test"] == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("train-000001.tar", r"train-000001\.tar holds something else than this packing would; choose another folder"),
        ("pairs.parquet", r"holds shards of another packing; delete them first:\n  pairs\.parquet"),
    ],
)
def test_a_file_of_somebody_else_is_not_written_over(source: Path, tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("a user's own")
    with pytest.raises(ValueError, match=message):
        pack(settings(source))
    assert (tmp_path / "out" / name).read_text() == "a user's own"
    assert not (tmp_path / "out/manifest.parquet").exists()


def test_every_fault_is_named_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    (source / "our485/low/3.png").write_bytes(b"not an image")
    whole = (source / "our485/high/5.png").read_bytes()
    (source / "our485/high/5.png").write_bytes(whole[: len(whole) // 2])
    scene_image(1, (40, 32)).save(source / "eval15/low/1.png")
    with pytest.raises(ValueError, match="nothing was packed") as error:
        pack(settings(source))
    lines = str(error.value).splitlines()[1:]
    assert len(lines) == 3
    assert "eval15/low/1.png has 40x32 pixels but" in lines[0]
    assert "48x32" in lines[0]
    assert "our485/low/3.png: is not an image" in lines[1]
    assert "our485/high/5.png:" in lines[2]
    assert "truncated" in lines[2]
    assert list((tmp_path / "out").iterdir()) == []


def test_other_formats_become_rgb_png_and_are_counted(tmp_path: Path) -> None:
    source = tmp_path / "set"
    for side in ("low", "high"):
        (source / side).mkdir(parents=True)
        scene_image(1).save(source / side / "photo.jpg")
        scene_image(2).save(source / side / "colour.png")
    scene_image(3).convert("L").save(source / "low/grey.png")
    scene_image(3).convert("RGBA").save(source / "high/grey.png")
    report = pack(settings(source, dev_fraction=0))
    assert report.converted == 4
    shard = (tmp_path / "out/train-000000.tar").read_bytes()
    for record in all_pairs(report.url):
        stored = Image.open(io.BytesIO(shard[record.low_offset : record.low_offset + record.low_size]))
        (original,) = (source / "low").glob(f"{record.key.removeprefix('train-')}.*")
        assert (stored.format, stored.mode) == ("PNG", "RGB")
        assert np.array_equal(np.asarray(stored), np.asarray(Image.open(original).convert("RGB")))


def test_sixteen_bits_are_stored_as_eight_and_counted(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (9, 11, 3), dtype=np.uint16)
    expected = np.round(values.astype(float) / 65535 * 255).astype(np.uint8)
    for name in ("deep.png", "deep.tif"):
        cv2.imwrite(str(tmp_path / name), values[..., ::-1])
        data, converted = to_stored_png(tmp_path / name)
        assert converted
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), expected)


def test_a_photograph_held_upright_is_stored_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to show
    scene_image(1, (48, 32)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_rgb(tmp_path / "turned.jpg").shape == (48, 32, 3)


def test_photographs_of_unknown_orientation_are_packed_and_named(source: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 9  # there are eight
    for side in ("low", "high"):
        scene_image(77).save(source / "our485" / side / "odd.jpg", exif=exif)
    report = pack(settings(source))
    assert [path.name for path in report.unoriented] == ["odd.jpg", "odd.jpg"]
    warning = r"2 images are taken as upright, since their orientation can't be read:\n .*low/odd.jpg\n .*high/odd.jpg"
    assert re.search(warning, str(report))

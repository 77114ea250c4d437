"""Packing keeps every byte, cuts splits by scene, evens out shards and refuses faults before it writes."""

import hashlib
import io
import re
import tarfile
from collections import Counter
from dataclasses import fields
from pathlib import Path

import cv2
import numpy as np
import pytest
import webdataset
from PIL import Image
from pydantic import ValidationError
from s3 import S3Server

from pipeline import storage
from pipeline.data.manifest import PairRecord, load_manifest
from pipeline.images.codecs import read_rgb, stored_png
from pipeline.packing.packing import PackSettings, pack

REAL_PAIRS = Path(__file__).parents[4] / "shared/data/lol-v1-part"


def scene_image(seed: int, size: tuple[int, int] = (48, 32)) -> Image.Image:
    """A smooth random image; those of different seeds are strangers to the perceptual hash."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def add_pair(source: Path, folder: str, name: str, seed: int, noise: int = 0) -> None:
    """A pair of scene ``seed``; ``noise`` makes another, nearly equal picture of it."""
    clean = np.asarray(scene_image(seed)).astype(int) + np.random.default_rng(seed).integers(0, noise + 1, (32, 48, 3))
    for side, pixels in (("low", clean // 8), ("high", clean)):
        path = source / folder / side / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Ten scenes of two pairs each for training and three pairs for testing."""
    folder = tmp_path / "set"
    for number in range(20):
        add_pair(folder, "our485", f"{number}.png", seed=number // 2, noise=4 * (number % 2))
    for number in range(3):
        add_pair(folder, "eval15", f"{number}.png", seed=100 + number)
    return folder


def settings(source: Path, **changes: object) -> PackSettings:
    return PackSettings.model_validate(
        {"source": source, "out": str(source.parent / "out"), "shard_pairs": 8} | changes
    )


def all_pairs(url: str) -> list[PairRecord]:
    """The pairs of every split, in the order of the table."""
    columns = [field.name for field in fields(PairRecord)]
    return [PairRecord(**row) for row in load_manifest(url).pair_table(columns).to_pylist()]


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


@pytest.mark.parametrize("shard_pairs", [1, 5, 8, 100])
def test_shards_are_full_but_even(shard_pairs: int, source: Path) -> None:
    report = pack(settings(source, shard_pairs=shard_pairs))
    records = all_pairs(report.url)
    for split in ("train", "dev", "test"):
        sizes = Counter(record.shard for record in records if record.split == split).values()
        assert max(sizes) <= shard_pairs
        assert max(sizes) - min(sizes) <= 1
        assert len(sizes) == report.shards[split] == -(-report.pairs[split] // shard_pairs)


def test_scenes_never_straddle_training_and_development(source: Path) -> None:
    chosen = set()
    for seed in range(4):
        report = pack(settings(source, out=str(source.parent / f"out{seed}"), dev_fraction=0.2, seed=seed))
        manifest = load_manifest(report.url)
        assert report.scenes == 13
        assert report.pairs == {"train": 16, "dev": 4, "test": 3}
        dev_numbers = {int(record.key.removeprefix("train-")) // 2 for record in manifest.pairs("dev")}
        train_numbers = {int(record.key.removeprefix("train-")) // 2 for record in manifest.pairs("train")}
        assert not dev_numbers & train_numbers
        chosen.add(frozenset(dev_numbers))
    assert len(chosen) > 1


def test_a_small_fraction_still_holds_out_a_scene_and_zero_none(source: Path) -> None:
    assert pack(settings(source, dev_fraction=0.01)).pairs["dev"] == 2
    assert pack(settings(source, dev_fraction=0, out=str(source.parent / "none"))).pairs["dev"] == 0


def test_a_single_scene_is_not_cut_and_the_report_says_what_helps(tmp_path: Path) -> None:
    for number in range(4):
        add_pair(tmp_path / "set", "train", f"{number}.png", seed=1)
    report = pack(settings(tmp_path / "set"))
    assert report.pairs == {"train": 4, "dev": 0, "test": 0}
    assert "WARNING: no development split" in str(report)
    for help_ in ("the 4 training pairs are one scene", "--scene-pattern", "--near-duplicate-bits (now 8)", "add more"):
        assert help_ in str(report)


def test_training_scenes_that_are_all_tested_give_no_development_split_and_it_is_said(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for number in range(3):
            add_pair(tmp_path / "set", split, f"{number}.png", seed=number)
    report = pack(settings(tmp_path / "set"))
    assert report.pairs == {"train": 3, "dev": 0, "test": 3}
    assert "the 3 training pairs all show scenes of the test split" in str(report)


def test_whoever_wants_no_development_split_or_has_no_training_pairs_is_told_nothing(tmp_path: Path) -> None:
    add_pair(tmp_path / "set", "train", "1.png", seed=1)
    add_pair(tmp_path / "eval15", "", "1.png", seed=1)
    for source, changes in ((tmp_path / "set", {"dev_fraction": 0}), (tmp_path / "eval15", {})):
        assert "no development split" not in str(
            pack(settings(source, out=str(tmp_path / source.name / "out"), **changes))
        )


def test_a_pattern_names_scenes(tmp_path: Path) -> None:
    for number in range(6):
        add_pair(tmp_path / "set", "", f"s{number // 3}_{number}.png", seed=number)
    report = pack(settings(tmp_path / "set", scene_pattern=r"s(\d+)_"))
    scenes = {record.key: record.scene for record in all_pairs(report.url)}
    assert scenes == {f"train-s{n // 3}_{n}": f"train-s{n // 3}_{n // 3 * 3}" for n in range(6)}
    with pytest.raises(ValueError, match=r"finds no scene in 6 keys:\n  train-s0_0"):
        pack(settings(tmp_path / "set", out=str(tmp_path / "other"), scene_pattern="frame(.)"))
    for wrong, message in (("no group", "has no group"), ("(", "is not a regular expression")):
        with pytest.raises(ValidationError, match=message):
            settings(tmp_path / "set", scene_pattern=wrong)


def test_test_scenes_among_the_training_pairs_are_reported_and_stay(source: Path) -> None:
    add_pair(source, "our485", "900.png", seed=101, noise=4)
    report = pack(settings(source))
    assert report.near_duplicates == (("train-900", "test-1"),)
    splits = {record.key: record.split for record in all_pairs(report.url)}
    assert (splits["train-900"], splits["test-1"]) == ("train", "test")
    assert "WARNING: 1 training pairs show a scene of the test split:\n  train-900 and test-1" in str(report)


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
        patched.setattr("pipeline.packing.packing.write_manifest", lambda url, shards, pairs: 1 / 0)
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
        data, converted = stored_png(tmp_path / name)
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


@pytest.mark.skipif(not REAL_PAIRS.is_dir(), reason="the real pairs of LOL-v1 are not here")
def test_real_scenes_stay_together(tmp_path: Path) -> None:
    report = pack(PackSettings(source=REAL_PAIRS, out=str(tmp_path / "out")))
    scenes = {record.key: record.scene for record in all_pairs(report.url)}
    assert len({scenes[f"train-{number}"] for number in (43, 44, 45, 46)}) == 1
    assert scenes["train-43"] != scenes["train-47"]
    assert scenes["train-2"] != scenes["train-5"]

"""Darkened images have the exposure, the noise and the steps that the physics of a sensor gives them."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError

from pipeline.packing.darkening import darken, darken_folder
from pipeline.packing.pairing import find_pairs
from pipeline.packing.photographs import export_photographs
from pipeline.settings.darkening import CameraSettings, DarkenSettings


def linear(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The sRGB standard's curve, written out again."""
    values = pixels / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def flat(value: int, side: int = 128) -> NDArray[np.uint8]:
    return np.full((side, side, 3), value, dtype=np.uint8)


def camera(
    stops: float, full_well: float = 1e7, read_noise: float = 0, cast: float = 0, bits: int = 16
) -> CameraSettings:
    return CameraSettings(
        least_stops=stops,
        most_stops=stops,
        least_full_well=full_well,
        most_full_well=full_well,
        read_noise=read_noise,
        colour_cast=cast,
        bits=bits,
    )


def test_each_stop_halves_the_light() -> None:
    for stops in (0, 1, 3):
        dark = darken(flat(200), camera(stops, full_well=2000), np.random.default_rng(0))
        assert linear(dark).mean() == pytest.approx(linear(flat(200)).mean() / 2**stops, rel=0.01)


def test_shot_noise_grows_with_the_signal() -> None:
    # Poisson: the variance of light in [0, 1] is light / full well.
    for value in (120, 200, 250):
        light = linear(darken(flat(value, 256), camera(1, full_well=2000), np.random.default_rng(0)))
        assert light.var() == pytest.approx(linear(flat(value)).mean() / 2 / 2000, rel=0.05)


def test_read_noise_adds_its_own_variance() -> None:
    light = linear(darken(flat(230, 256), camera(1, full_well=1000, read_noise=20), np.random.default_rng(0)))
    expected = linear(flat(230)).mean() / 2 / 1000 + (20 / 1000) ** 2
    assert light.var() == pytest.approx(expected, rel=0.05)


def test_few_bits_leave_few_levels() -> None:
    ramp = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (8, 256, 3)).copy()
    dark = darken(ramp, camera(2, bits=6), np.random.default_rng(0))
    assert len(np.unique(dark)) == 17  # a quarter of the light: sensor values 0 to 16 of 63


def test_colour_cast_tints_red_and_blue_only() -> None:
    darks = [darken(flat(200), camera(1, cast=0.3), np.random.default_rng(seed)) for seed in range(20)]
    ratios = np.array([linear(dark).mean(axis=(0, 1)) for dark in darks]) / (linear(flat(200)).mean() / 2)
    assert ratios[:, 1] == pytest.approx(1, rel=0.01)
    for channel in (0, 2):
        assert np.abs(np.log(ratios[:, channel])).max() <= 0.31
        assert np.log(ratios[:, channel]).std() > 0.1


def test_the_default_camera_makes_dark_but_visible_images() -> None:
    photo = np.random.default_rng(0).integers(30, 256, (64, 64, 3), dtype=np.uint8)
    means = [darken(photo, CameraSettings(), np.random.default_rng(seed)).mean() / 255 for seed in range(20)]
    assert min(means) > 0.05
    assert max(means) < 0.25


def test_ranges_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"least_stops 4\.0 exceeds most_stops 3\.0"):
        CameraSettings(least_stops=4, most_stops=3)


def photographs(source: Path) -> Path:
    rng = np.random.default_rng(5)
    for name, shape in {
        "root.png": (20, 30, 3),
        "train/a.jpg": (24, 16, 3),
        "test/grey.png": (16, 16),
    }.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(source / name)
    return source


def pixels(path: Path) -> NDArray[np.uint8]:
    return np.asarray(Image.open(path))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_is_mirrored_and_can_be_packed(tmp_path: Path) -> None:
    source, out = photographs(tmp_path / "photos"), tmp_path / "out"
    report = darken_folder(DarkenSettings(source=source, out=out, variants=2))
    assert (report.photographs, report.pairs) == (3, 6)
    assert [pair.key for pair in find_pairs(out)] == [
        "test-grey-v0", "test-grey-v1", "train-a-v0", "train-a-v1", "train-root-v0", "train-root-v1",
    ]  # fmt: skip
    assert np.array_equal(pixels(out / "high/root-v1.png"), pixels(source / "root.png"))
    assert Image.open(out / "test/high/grey-v0.png").mode == "RGB"
    assert pixels(out / "train/low/a-v0.png").mean() < pixels(out / "train/high/a-v0.png").mean() / 2
    assert (out / "low/root-v0.png").read_bytes() != (out / "low/root-v1.png").read_bytes()


def test_an_image_is_the_same_whatever_lies_beside_it(tmp_path: Path) -> None:
    source = photographs(tmp_path / "photos")
    darken_folder(DarkenSettings(source=source, out=tmp_path / "all", variants=2, seed=3))
    (source / "root.png").unlink()
    darken_folder(DarkenSettings(source=source, out=tmp_path / "fewer", seed=3))
    darken_folder(DarkenSettings(source=source, out=tmp_path / "reseeded", seed=4))
    everything, fewer, reseeded = (files(tmp_path / name) for name in ("all", "fewer", "reseeded"))
    assert fewer.items() <= everything.items()
    assert fewer["train/low/a-v0.png"] != reseeded["train/low/a-v0.png"]


def test_large_photographs_are_scaled_down(tmp_path: Path) -> None:
    source = photographs(tmp_path / "photos")
    darken_folder(DarkenSettings(source=source, out=tmp_path / "out", max_side=16))
    assert Image.open(tmp_path / "out/high/root-v0.png").size == (16, 11)  # from 30x20
    assert Image.open(tmp_path / "out/low/root-v0.png").size == (16, 11)
    assert Image.open(tmp_path / "out/test/high/grey-v0.png").size == (16, 16)


def test_photographs_of_unknown_orientation_are_darkened_and_named(tmp_path: Path) -> None:
    source = photographs(tmp_path / "photos")
    exif = Image.Exif()
    exif[0x0112] = 9  # there are eight
    Image.new("RGB", (8, 16)).save(source / "odd.jpg", exif=exif)
    report = darken_folder(DarkenSettings(source=source, out=tmp_path / "out"))
    assert report.unoriented == (source / "odd.jpg",)
    assert "1 images are taken as upright, since their orientation can't be read:" in str(report)
    assert Image.open(tmp_path / "out/low/odd-v0.png").size == (8, 16)


def test_faults_are_named_before_anything_is_written(tmp_path: Path) -> None:
    source, out = photographs(tmp_path / "photos"), tmp_path / "out"
    (source / "broken.png").write_bytes(b"not an image")
    Image.new("RGB", (8, 8)).save(source / "train/a.png")
    with pytest.raises(ValueError, match=r"broken.png: is not an image(.|\n)*a.jpg and .*a.png would have one name"):
        darken_folder(DarkenSettings(source=source, out=out))
    assert not out.exists()


def test_a_folder_in_use_or_without_photographs_is_refused(tmp_path: Path) -> None:
    source = photographs(tmp_path / "photos")
    with pytest.raises(ValueError, match="is not empty"):
        darken_folder(DarkenSettings(source=source, out=source))
    with pytest.raises(ValueError, match="no photographs found"):
        darken_folder(DarkenSettings(source=tmp_path / "nowhere", out=tmp_path / "out"))


def test_the_photographs_of_scikit_image_are_written(tmp_path: Path) -> None:
    pytest.importorskip("skimage")
    assert export_photographs(tmp_path) == 13
    test = {path.name: pixels(path) for path in (tmp_path / "test").iterdir()}
    assert test.keys() == {"chelsea.png", "coffee.png", "rocket.png"}
    assert test["chelsea.png"].shape == (300, 451, 3)
    assert {"motorcycle_left.png", "motorcycle_right.png"} <= {path.name for path in (tmp_path / "train").iterdir()}
    with pytest.raises(ValueError, match="is not empty; choose another folder"):
        export_photographs(tmp_path)

"""Make dark images out of well-lit photographs: a physical model of a camera short of light.

sRGB -> linear light -> exposure and colour cast -> shot noise -> read noise -> clip and quantise -> sRGB
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline import storage
from pipeline.images.codecs import encode_png, read_image
from pipeline.packing.pairing import images_under, unoriented_warning
from pipeline.settings.darkening import CameraSettings, DarkenSettings
from pipeline.terminal import bar


@dataclass(frozen=True)
class DarkenReport:
    """How many photographs became how many pairs, where they are, and whose orientation could not be read."""

    photographs: int
    pairs: int
    out: Path
    unoriented: tuple[Path, ...]

    def __str__(self) -> str:
        """The report as text for the terminal."""
        counts = f"{self.photographs} photographs, {self.pairs} pairs in {self.out}"
        return f"{counts}\n{unoriented_warning(self.unoriented)}" if self.unoriented else counts


def darken(photo: NDArray[np.uint8], camera: CameraSettings, rng: np.random.Generator) -> NDArray[np.uint8]:
    """What the camera would have made of the scene in low light; both images are uint8 [height, width, 3]."""
    stops = rng.uniform(camera.least_stops, camera.most_stops)
    full_well = np.exp(rng.uniform(np.log(camera.least_full_well), np.log(camera.most_full_well)))
    red, blue = np.exp(rng.uniform(-camera.colour_cast, camera.colour_cast, size=2))
    light = srgb_to_linear(photo) * 2.0**-stops * np.array([red, 1.0, blue])
    electrons = rng.poisson(light * full_well) + rng.normal(0.0, camera.read_noise, size=photo.shape)
    steps = 2**camera.bits - 1
    signal = np.round(np.clip(electrons / full_well, 0.0, 1.0) * steps) / steps
    return linear_to_srgb(signal)


def darken_folder(settings: DarkenSettings) -> DarkenReport:
    """Write a pair for every photograph and variant: ``train/x.jpg`` gives ``train/{low,high}/x-v0.png``.

    An image depends only on its photograph, its relative path, the variant and the settings.

    Raises:
        ValueError: there are no photographs, some can't be read, or ``out`` holds something already.
    """
    photographs = list(images_under(settings.source))
    unoriented = _check(photographs, settings)
    for path in bar(photographs, title="darkening", total=len(photographs), unit="photo"):
        relative = path.relative_to(settings.source)
        clean = _scale(read_image(path).pixels, settings.max_side)
        clean_png = encode_png(clean)
        for variant in range(settings.variants):
            dark = darken(clean, settings.camera, _generator(settings.seed, relative, variant))
            folder, name = settings.out / relative.parent, f"{relative.stem}-v{variant}.png"
            storage.write_bytes(str(folder / "low" / name), encode_png(dark))
            storage.write_bytes(str(folder / "high" / name), clean_png)
    return DarkenReport(len(photographs), len(photographs) * settings.variants, settings.out, unoriented)


def srgb_to_linear(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Linear light in [0, 1] of 8-bit sRGB values (IEC 61966-2-1)."""
    values = np.arange(256) / 255
    table: NDArray[np.float64] = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    return table[pixels]


def linear_to_srgb(light: NDArray[np.float64]) -> NDArray[np.uint8]:
    """8-bit sRGB values of linear light in [0, 1], rounded."""
    curve = np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.round(curve * 255).astype(np.uint8)


def _generator(seed: int, relative: Path, variant: int) -> np.random.Generator:
    # A hash of the names, so that an image is the same whichever others lie beside it.
    digest = hashlib.sha256(f"{seed}/{relative.as_posix()}/{variant}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def _scale(photo: NDArray[np.uint8], max_side: int | None) -> NDArray[np.uint8]:
    height, width, _ = photo.shape
    if max_side is None or max(height, width) <= max_side:
        return photo
    size = [max(1, round(side * max_side / max(height, width))) for side in (width, height)]
    return np.asarray(Image.fromarray(photo).resize((size[0], size[1]), Image.Resampling.LANCZOS))


def _check(photographs: list[Path], settings: DarkenSettings) -> tuple[Path, ...]:
    """Refuse before anything is written, and give the photographs whose orientation can't be read.

    Reading every photograph twice is cheap beside darkening it.
    """
    if not photographs:
        raise ValueError(f"source {settings.source}: no photographs found; give a folder of PNG or JPEG files")
    if storage.listdir(str(settings.out)):
        raise ValueError(f"out {settings.out} is not empty; choose another folder, or empty it first")
    faults: list[str] = []
    unoriented: list[Path] = []
    seen: dict[Path, Path] = {}
    for path in bar(photographs, title="checking", total=len(photographs), unit="photo"):
        first = seen.setdefault(path.with_suffix(""), path)
        if first != path:
            faults.append(f"{first} and {path} would have one name")
        try:
            if not read_image(path).orientation_known:
                unoriented.append(path)
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise ValueError(
            "nothing was darkened; repair or remove these:\n" + "\n".join(f"  {fault}" for fault in faults)
        )
    return tuple(unoriented)

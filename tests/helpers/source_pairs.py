"""Folders of image pairs as users have them, to be packed."""

from dataclasses import fields
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.data.manifest import PairRecord, load_manifest
from pipeline.settings.packing import PackSettings


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


def settings(source: Path, **changes: object) -> PackSettings:
    return PackSettings.model_validate(
        {"source": source, "out": str(source.parent / "out"), "shard_pairs": 8} | changes
    )


def all_pairs(url: str) -> list[PairRecord]:
    """The pairs of every split, in the order of the table."""
    columns = [field.name for field in fields(PairRecord)]
    return [PairRecord(**row) for row in load_manifest(url).pair_table(columns).to_pylist()]

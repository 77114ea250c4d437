"""Small packed data sets for tests: smooth random photographs and a dark version of each."""

from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.packing.shard_writer import pack
from pipeline.settings.packing import PackSettings


def write_pairs(folder: Path, count: int, size: tuple[int, int] = (72, 48), seed: int = 0) -> None:
    """``count`` pairs below ``folder`` as ``low/N.png`` and ``high/N.png``; ``size`` is width and height."""
    draw = np.random.default_rng(seed)
    for side in ("low", "high"):
        (folder / side).mkdir(parents=True, exist_ok=True)
    for index in range(count):
        rough = draw.integers(0, 256, (6, 9, 3), dtype=np.uint8)
        clean = Image.fromarray(rough).resize(size, Image.Resampling.BICUBIC)
        dark = (np.asarray(clean) * 0.15).astype(np.uint8)
        clean.save(folder / "high" / f"{index}.png")
        Image.fromarray(dark).save(folder / "low" / f"{index}.png")


def packed(folder: Path, count: int = 12, test: int = 0, size: tuple[int, int] = (72, 48)) -> str:
    """URL of a packed data set of ``count`` training pairs, some of them for development, and ``test`` test pairs."""
    write_pairs(folder / "source/train", count, size)
    if test:
        write_pairs(folder / "source/test", test, size, seed=1)
    url = str(folder / "shards")
    pack(PackSettings(source=folder / "source", out=url, shard_pairs=4, dev_fraction=0.25))
    return url

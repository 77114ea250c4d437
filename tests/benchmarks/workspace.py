"""The data that all contenders read: one set of pairs as PNG files, as shards and as MosaicML Streaming keeps them."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mosaic import write_mds
from numpy.typing import NDArray
from PIL import Image, ImageOps

from pipeline.images.codecs import encode_png, read_rgb, to_stored_png
from pipeline.packing.darkening import darken_folder
from pipeline.packing.pairing import PairPixels, find_pairs
from pipeline.packing.photographs import export_photographs
from pipeline.packing.shard_writer import pack
from pipeline.settings.darkening import DarkenSettings
from pipeline.settings.packing import PackSettings

SIZE = (600, 400)  # of LOL's images: width and height, pixels
LEAST_PAIRS = 485  # as many as LOL-v1 trains on; a smaller source is repeated until there are so many
VARIANTS = 4  # dark images of each of scikit-image's photographs


@dataclass(frozen=True)
class Workspace:
    """A folder that holds the pairs in all the forms that are compared.

    Attributes:
        root: the folder.
        sources: keys of the pairs before they were repeated; images are ``pairs/{low,high}/0-KEY.png``.
        pairs: number of pairs, repeated ones included.
        description: the data in words.
    """

    root: Path
    sources: tuple[str, ...]
    pairs: int
    description: str

    @property
    def folder(self) -> Path:
        """The pairs as PNG files in the folders ``low`` and ``high``."""
        return self.root / "pairs"

    @property
    def shards(self) -> Path:
        """The pairs as this project packs them."""
        return self.root / "shards"

    @property
    def mds(self) -> Path:
        """The pairs in the format of MosaicML Streaming."""
        return self.root / "mds"

    def images(self, key: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """A source pair's low-light and clean pixels, uint8 [height, width, 3]."""
        low, high = (read_rgb(self.folder / side / f"0-{key}.png") for side in ("low", "high"))
        return low, high

    def new_folder(self, name: str) -> Path:
        """An empty folder."""
        folder = self.root / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder


def make_workspace(root: Path, source: Path | None) -> Workspace:
    """Write the pairs of ``source``, or of scikit-image's photographs, in all forms below ``root``.

    Raises:
        ValueError: ``source`` holds no pairs, or a pair can't be packed.
    """
    origin = "scikit-image's photographs, darkened" if source is None else f"the pairs of {source.name}"
    found = find_pairs(source or _photographs(root))
    copies = -(-LEAST_PAIRS // len(found))
    description = f"{copies * len(found)} pairs: {origin}, {len(found)} pairs, each {copies} times"
    workspace = Workspace(root, tuple(pair.key for pair in found), copies * len(found), description)
    _write_folder(workspace.folder, found, copies)
    pack(PackSettings(source=workspace.folder, out=str(workspace.shards), dev_fraction=0))
    write_mds(workspace.folder, workspace.mds)
    return workspace


def _photographs(root: Path) -> Path:
    photographs, pairs = root / "photographs", root / "photograph-pairs"
    export_photographs(photographs)
    for path in sorted(photographs.rglob("*.png")):
        fitted = ImageOps.fit(Image.fromarray(read_rgb(path)), SIZE, Image.Resampling.LANCZOS)
        path.write_bytes(encode_png(np.asarray(fitted)))
    darken_folder(DarkenSettings(source=photographs, out=pairs, variants=VARIANTS))
    return pairs


def _write_folder(folder: Path, pairs: Sequence[PairPixels], copies: int) -> None:
    for pair in pairs:
        for side, path in (("low", pair.low), ("high", pair.high)):
            (folder / side).mkdir(parents=True, exist_ok=True)
            first = folder / side / f"0-{pair.key}.png"
            first.write_bytes(to_stored_png(path)[0])
            for copy in range(1, copies):
                os.link(first, folder / side / f"{copy}-{pair.key}.png")

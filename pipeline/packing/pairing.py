"""Find the pairs of dark and well-lit images in a folder, matched by identifier, never by sort order."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from pipeline.terminal import bullet_list

Side = Literal["low", "high"]
Place = tuple[tuple[str, ...], str]  # the folders other than the side's, and the image's identifier

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
SIDES: dict[str, Side] = {
    "low": "low", "input": "low",
    "high": "high", "target": "high", "normal": "high",
}  # fmt: skip
SPLITS: dict[str, Literal["train", "test"]] = {
    "train": "train", "training": "train", "training data": "train", "our485": "train",
    "test": "test", "testing": "test", "test data": "test", "eval": "test", "eval15": "test",
}  # fmt: skip
SYSTEM_FOLDERS = {
    "@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "__macosx",
    "$recycle.bin", "system volume information", "lost+found",
}  # fmt: skip
VALIDATION = {"val", "valid", "validation", "dev"}
LAYOUTS = """Layouts that are understood (names in any case, folders nested in any order):
  LOL-v1             our485/{low,high}/1.png  eval15/{low,high}/1.png
  LOL-v1, mirrors    {Train,Test}/{input,target}/1.png
  LOL-v2             {Real_captured,Synthetic}/{Train,Test}/{Low,Normal}/  (low00001.png with normal00001.png,
                     or one name on both sides)
  LSRW               {Training data,Eval}/{Huawei,Nikon}/{low,high}/1.jpg
  your own           {train,test}/{low,high}/name.png, or low/name.png and high/name.png, all for training
Both images of a pair have one name; low, input, normal, high or target before a number is ignored."""


@dataclass(frozen=True)
class PairPaths:
    """Two images of one scene.

    ``key`` is the split, the folders between and the identifier, joined by ``-``: ``test-Huawei-123``.
    """

    key: str
    low: Path
    high: Path
    split: Literal["train", "test"]


def find_pairs(source: Path) -> list[PairPaths]:
    """All pairs under ``source``, sorted by key; keys are unique and free of dots and slashes.

    Pairs outside any train or test folder are for training. The name of ``source`` itself counts as
    such a folder, so that packing ``eval15`` alone does not make training pairs of it.

    Raises:
        ValueError: no pairs, images without a partner, or names that leave the match in doubt.
    """
    if not source.is_dir():
        raise ValueError(f"source {source}: there is no such folder")
    lows, highs = _images_by_side(source)
    if not lows and not highs:
        raise ValueError(f"source {source}: no pairs of images found.\n{LAYOUTS}")
    alone = [lows.get(place) or highs[place] for place in sorted(lows.keys() ^ highs.keys())]
    if alone:
        names = bullet_list(str(path.relative_to(source)) for path in alone)
        raise ValueError(f"source {source}: {len(alone)} images have no partner:\n{names}\n{LAYOUTS}")
    top = Path(source.absolute()).name
    pairs = [_pair(top, place, lows[place], highs[place]) for place in lows]
    return _with_unique_keys(sorted(pairs, key=lambda pair: pair.key))


def match_pictures(folder: Path, keys: Iterable[str]) -> dict[str, Path]:
    """The picture of each packed pair in a folder of some method's output, by the pair's key.

    A file is named as the pair's images were, or by the key; files for other pairs are ignored.

    Raises:
        ValueError: a pair has no picture, or several.
    """
    found: dict[str, list[Path]] = {}
    for path in images_under(folder):
        between = [name for name in path.relative_to(folder).parts[:-1] if name.lower() not in {*SIDES, *SPLITS}]
        for name in {_clean([*between, _identifier(path.stem)]), _clean([path.stem])}:
            found.setdefault(name, []).append(path)
    pictures, missing = {}, []
    for key in keys:
        paths = found.get(key) or found.get(key.partition("-")[2]) or []
        if len(paths) > 1:
            raise ValueError(f"{paths[0]} and {paths[1]} could both be the picture of {key}; keep one of them")
        if paths:
            pictures[key] = paths[0]
        else:
            missing.append(key)
    if missing:
        raise ValueError(f"{folder}: {len(missing)} images of the split have no picture here:\n{bullet_list(missing)}")
    return pictures


def images_under(folder: Path) -> Iterator[Path]:
    """Every image file under ``folder`` in a fixed order.

    Hidden files (``._1.png``) and hidden or system folders (``.thumbnails``, ``__MACOSX``) are left out. Links
    are followed, but not back into a folder that leads to them.
    """
    for parent, folders, names in os.walk(folder, followlinks=True):
        here = Path(parent)
        folders[:] = sorted(name for name in folders if not _is_hidden(name) and not _is_loop(here / name, folder))
        for name in sorted(names):
            if Path(name).suffix.lower() in IMAGE_SUFFIXES and not _is_hidden(name):
                yield here / name


def unoriented_warning(paths: Sequence[Path]) -> str:
    """What is said of images whose orientation can't be read."""
    return f"WARNING: {len(paths)} images are taken as upright, since their orientation can't be read:\n" + bullet_list(
        str(path) for path in paths
    )


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


def _is_loop(path: Path, top: Path) -> bool:
    return path.is_symlink() and any(path.samefile(above) for above in path.parents if above.is_relative_to(top))


def _images_by_side(source: Path) -> tuple[dict[Place, Path], dict[Place, Path]]:
    sides: dict[Side, dict[Place, Path]] = {"low": {}, "high": {}}
    for path in images_under(source):
        folders = path.relative_to(source).parts[:-1]
        at = next((i for i in reversed(range(len(folders))) if folders[i].lower() in SIDES), None)
        if at is None:
            continue
        found = sides[SIDES[folders[at].lower()]]
        place = (folders[:at] + folders[at + 1 :], _identifier(path.stem))
        if place in found:
            raise ValueError(f"{found[place]} and {path} could both be image {place[1]}; keep one of them")
        found[place] = path
    return sides["low"], sides["high"]


def _identifier(stem: str) -> str:
    """``00001`` of ``low00001`` and ``normal00001``; other names stay as they are."""
    return re.sub(rf"^({'|'.join(SIDES)})[-_]?(?=\d)", "", stem, flags=re.IGNORECASE)


def _pair(top: str, place: Place, low: Path, high: Path) -> PairPaths:
    folders, identifier = place
    splits = {SPLITS[name.lower()] for name in (top, *folders) if name.lower() in SPLITS}
    if len(splits) > 1 or any(name.lower() in VALIDATION for name in folders):
        raise ValueError(
            f"{low}: its folders don't say plainly whether it is for training or for testing. Use one of"
            " train and test; the development split is cut from the training pairs when they are packed"
        )
    split = splits.pop() if splits else "train"
    between = [name for name in folders if name.lower() not in SPLITS]
    return PairPaths(_clean([split, *between, identifier]), low, high, split)


def _clean(parts: Sequence[str]) -> str:
    return re.sub(r"[^A-Za-z0-9_-]", "_", "-".join(parts))


def _with_unique_keys(pairs: list[PairPaths]) -> list[PairPaths]:
    """Different names can become one key, as ``a.b`` and ``a b`` do."""
    clashes = [f"{one.low} and {two.low}" for one, two in pairwise(pairs) if one.key == two.key]
    if clashes:
        raise ValueError(f"these images would get one key; rename one of each:\n{bullet_list(clashes)}")
    return pairs

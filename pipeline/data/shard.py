"""One shard's bytes: a plain WebDataset tar, of which any reader makes the same samples."""

import io
import logging
import mmap
import tarfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from itertools import groupby
from pathlib import PurePosixPath
from typing import NamedTuple

from PIL import Image

from pipeline.data.pairs import PairPixels
from pipeline.images.codecs import BROKEN_IMAGE, decode_rgb

logger = logging.getLogger(__name__)

SIDES = ("low", "high")
HEADER = 4096  # bytes in which images tell their size


class BadDataError(ValueError):
    """A shard or an image in it is not what was packed, or can't be decoded."""


class Member(NamedTuple):
    """A file in a tar: its name and where its bytes lie."""

    name: str
    offset: int
    size: int


class PairMembers(NamedTuple):
    """The two images of a sample in a tar."""

    key: str
    low: Member
    high: Member


class Shard:
    """A shard's tar, in memory or mapped.

    Args:
        name: how messages call it.
        data: the bytes of the tar.
        pairs: where each pair lies in them.
        damage: what is wrong with a pair, by its place; such pairs are not decoded.
    """

    def __init__(
        self, name: str, data: mmap.mmap | bytes, pairs: Sequence[PairMembers], damage: Mapping[int, str] | None = None
    ) -> None:
        self.name = name
        self.pairs = pairs
        self.damage = damage or {}
        self._data = memoryview(data)

    def image_bytes(self, sample: int) -> tuple[memoryview, memoryview]:
        """The encoded low-light and clean image of a pair."""
        _, low, high = self.pairs[sample]
        return self._data[low.offset : low.offset + low.size], self._data[high.offset : high.offset + high.size]

    def areas(self) -> list[int]:
        """Each pair's height x width by its images' headers, in pixels; 0 where there is none to read."""
        return [_area(self.image_bytes(sample)[0]) for sample in range(len(self.pairs))]

    def decode(self, sample: int) -> PairPixels:
        """The pair at a place in the shard, decoded.

        Raises:
            BadDataError: it can't be, with shard, key and reason.
        """
        key = self.pairs[sample].key
        if sample in self.damage:
            raise BadDataError(f"{self.name}: {key}: {self.damage[sample]}")
        images = []
        for side, data in zip(SIDES, self.image_bytes(sample), strict=True):
            try:
                image = decode_rgb(data)
            except ValueError as error:
                raise BadDataError(f"{self.name}: {key}.{side}: {error}") from error
            images.append(image.pixels)
            if image.converted:
                _warn("some images are not 8-bit RGB (grey, palette, alpha or 16 bits); they are converted as read")
            if not image.orientation_known:
                _warn("the orientation of some images can't be read; they are taken as upright")
        low, clean = images
        if low.shape != clean.shape:
            raise BadDataError(f"{self.name}: {key}: its images differ in size, {low.shape[:2]} and {clean.shape[:2]}")
        return PairPixels(low, clean)


def find_pairs(name: str, data: mmap.mmap) -> list[PairMembers]:
    """The pairs in a tar, by WebDataset's convention: members of one name up to the first dot are a sample.

    Raises:
        BadDataError: it is no whole tar, or a sample lacks an image.
    """
    data.seek(0)
    try:
        with tarfile.open(fileobj=data, mode="r:") as tar:
            members = [Member(member.name, member.offset_data, member.size) for member in tar if member.isfile()]
    except (tarfile.TarError, ValueError) as error:  # the latter from a seek behind the end of the map
        raise BadDataError(f"{name}: is not a whole tar file ({error})") from error
    return [_pair(name, key, list(group)) for key, group in groupby(members, key=lambda member: _key(member.name))]


def _pair(name: str, key: str, members: Sequence[Member]) -> PairMembers:
    found = {side: member for member in members for side in SIDES if _field(member.name).split(".")[0] == side}
    if len(found) < len(SIDES):
        raise BadDataError(f"{name}: {key}: has {', '.join(m.name for m in members)}, but needs a low and a high image")
    return PairMembers(key, found["low"], found["high"])


def _key(name: str) -> str:
    path = PurePosixPath(name)
    return str(path.with_name(path.name.split(".", 1)[0]))


def _field(name: str) -> str:
    return PurePosixPath(name).name.partition(".")[2].lower()


def _area(data: memoryview) -> int:
    for part in (data[:HEADER], data):  # nearly always enough, and the rest of the file is not touched
        with suppress(*BROKEN_IMAGE), Image.open(io.BytesIO(part)) as image:
            return image.width * image.height
    return 0


@cache
def _warn(message: str) -> None:
    """Once, however many images it holds for."""
    logger.warning(message)

"""A decoded pair of images, and single pairs read from wherever they lie in the shards."""

import hashlib
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline import storage
from pipeline.data.manifest import PairRecord
from pipeline.images.codecs import decode_rgb


class PairPixels(NamedTuple):
    """A decoded pair: RGB, uint8, both of shape (H, W, 3)."""

    low: NDArray[np.uint8]
    clean: NDArray[np.uint8]


def read_pair(url: str, record: PairRecord) -> PairPixels:
    """The decoded pair of the data set at ``url``; of its shard only the two images are read.

    Raises:
        ValueError: an image is out of reach or not the one that was packed; shard, key and reason are named.
    """
    return PairPixels(_image(url, record, "low"), _image(url, record, "high"))


def _image(url: str, record: PairRecord, side: Literal["low", "high"]) -> NDArray[np.uint8]:
    if side == "low":
        offset, size, sha256 = record.low_offset, record.low_size, record.low_sha256
    else:
        offset, size, sha256 = record.high_offset, record.high_size, record.high_sha256
    try:
        data = storage.read_bytes(storage.join(url, record.shard), offset, size)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ValueError("differs from the image that was packed (its SHA-256 is not the one recorded then)")
        return decode_rgb(data)[0]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{url}: {record.shard}: {record.key}.{side}.png: {error}; copy the shard again or pack the data set again"
        ) from error

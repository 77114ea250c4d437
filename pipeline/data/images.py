"""Image files of any kind as 8-bit RGB, and the PNG that a shard holds for them."""

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# What Pillow raises on broken files, by its own tests; all of them mean "this is not a readable image".
BROKEN_IMAGE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def decode_rgb(data: bytes | memoryview) -> tuple[NDArray[np.uint8], bool]:
    """The pixels of an image file's bytes as 8-bit RGB, and whether they were anything else before.

    Grey is repeated, alpha dropped, 16 bits are scaled to 8 with rounding, and a photograph's
    orientation is applied. A PNG is taken as it lies, as its readers will.

    Returns:
        uint8 [height, width, 3], read-only; and True for grey, palette, alpha, CMYK or 16 bits.

    Raises:
        ValueError: this is not an image, is cut short, or has pixels of unknown range.
    """
    try:
        return _decode(data)
    except UnidentifiedImageError as error:
        raise ValueError("is not an image, or its header is broken") from error
    except BROKEN_IMAGE as error:
        raise ValueError(str(error)) from error


def read_rgb(path: Path) -> NDArray[np.uint8]:
    """The pixels of an image file as ``decode_rgb`` gives them; a ``ValueError`` names the file."""
    with _named(path):
        return decode_rgb(path.read_bytes())[0]


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """Lossless PNG of an RGB image, uint8 [height, width, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def stored_png(path: Path) -> tuple[bytes, bool]:
    """The bytes that a shard holds for an image file, and whether they had to be converted."""
    with _named(path):
        data = path.read_bytes()
        # The header's bit depth and colour type, always the bytes 24 and 25.
        if data.startswith(PNG_SIGNATURE) and data[24:26] == b"\x08\x02":
            return data, False
        return encode_png(decode_rgb(data)[0]), True


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _decode(data: bytes | memoryview) -> tuple[NDArray[np.uint8], bool]:
    image = Image.open(io.BytesIO(data))
    if image.mode in ("I", "F"):
        raise ValueError(f"its 32-bit pixels (mode {image.mode}) have no known range; save it with 8 or 16 bits")
    if image.mode.startswith("I;16"):
        return _eight_bits(np.repeat(np.asarray(image, dtype=np.uint16)[..., None], 3, axis=2)), True
    if data[:8] == PNG_SIGNATURE and data[24] == 16:
        # Pillow decodes the upper byte of such values only; a second reading gives the lower one.
        lower = Image.open(io.BytesIO(data))
        lower.tile = [tile._replace(args=f"{lower.mode};16L") for tile in lower.tile]
        upper_bytes, lower_bytes = (np.asarray(half.convert("RGB"), dtype=np.uint16) for half in (image, lower))
        return _eight_bits(256 * upper_bytes + lower_bytes), True
    upright = image if image.format == "PNG" else ImageOps.exif_transpose(image)
    if upright.mode == "RGB":
        return np.asarray(upright), False  # as nearly all are: convert() would copy them
    return np.asarray(upright.convert("RGB")), True


def _eight_bits(values: NDArray[np.uint16]) -> NDArray[np.uint8]:
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)  # 65535 / 255 is 257

"""Image files of any kind as 8-bit RGB, and the PNG that a shard holds for them."""

import io
import logging
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    EXTRASAMPLES,
    PHOTOMETRIC_INTERPRETATION,
    PLANAR_CONFIGURATION,
    ImageFileDirectory_v2,
    TiffImageFile,
)

logger = logging.getLogger(__name__)

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
INTEGERS = {1: "B", 3: "H", 4: "I"}  # TIFF's types


class Decoded(NamedTuple):
    """An image file's pixels as 8-bit RGB.

    Attributes:
        pixels: uint8 [height, width, 3], perhaps read-only.
        converted: it was grey, had a palette or alpha, was CMYK, or had 16 bits.
        orientation_known: false for one whose orientation is given but can't be read; it counts as upright.
    """

    pixels: NDArray[np.uint8]
    converted: bool
    orientation_known: bool = True


def decode_rgb(data: bytes | memoryview) -> Decoded:
    """An image file's bytes as 8-bit RGB.

    Grey is repeated, alpha dropped, 16 bits are scaled to 8 with rounding, and a photograph's
    orientation is applied. A PNG is taken as it lies, as its readers will.

    Raises:
        ValueError: this is not an image, is cut short, claims too many pixels, or has some of unknown range.
    """
    try:
        return _decode(data)
    except UnidentifiedImageError as error:
        raise ValueError("is not an image, or its header is broken") from error
    except BROKEN_IMAGE as error:
        raise ValueError(str(error)) from error


def read_image(path: Path) -> Decoded:
    """An image file as ``decode_rgb`` gives it; a ``ValueError`` names the file."""
    with _name_file(path):
        return decode_rgb(path.read_bytes())


def read_rgb(path: Path) -> NDArray[np.uint8]:
    """The pixels alone of ``read_image``; problems with the orientation are logged."""
    image = read_image(path)
    if not image.orientation_known:
        logger.warning("%s: its orientation can't be read; it is taken as upright", path)
    return image.pixels


def encode_png(pixels: NDArray[np.uint8]) -> bytes:
    """Lossless PNG of an RGB image, uint8 [height, width, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def to_stored_png(path: Path) -> tuple[bytes, bool]:
    """The bytes that a shard holds for an image file, and whether they had to be converted."""
    with _name_file(path):
        data = path.read_bytes()
        # The header's bit depth and colour type, always the bytes 24 and 25.
        if data.startswith(PNG_SIGNATURE) and data[24:26] == b"\x08\x02":
            return data, False
        return encode_png(decode_rgb(data)[0]), True


@contextmanager
def _name_file(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _decode(data: bytes | memoryview) -> Decoded:
    image = Image.open(io.BytesIO(data))
    if image.mode in ("I", "F"):
        raise ValueError(f"its 32-bit pixels (mode {image.mode}) have no known range; save it with 8 or 16 bits")
    orientation = 1 if image.format == "PNG" else _orientation(image, data)
    # Pillow turns a TIFF as it loads it, by code that fails on odd metadata; without any it leaves it alone.
    image.info["exif"] = b""
    image.info.pop("xmp", None)
    known = orientation is not None
    if _is_deep(image, data):
        return Decoded(_eight_bits(_deep_rgb(image, data)), True, known)  # OpenCV turns a TIFF itself
    # the size of a TIFF is that of the turned image, that of its copy is that of its pixels
    flat = image.copy() if image.format == "TIFF" else image
    pixels = np.asarray(flat if flat.mode == "RGB" else flat.convert("RGB"))  # which would copy what is RGB
    return Decoded(_turn_upright(pixels, orientation or 1), flat.mode != "RGB", known)


def _is_deep(image: Image.Image, data: bytes | memoryview) -> bool:
    if image.format == "PNG":
        return data[24] == 16
    if isinstance(image, TiffImageFile):
        return bool(max(image.tag_v2.get(BITSPERSAMPLE, (1,))) > 8)
    return image.mode.startswith("I;16")


def _deep_rgb(image: Image.Image, data: bytes | memoryview) -> NDArray[np.uint16]:
    """16-bit RGB by OpenCV, since Pillow has no such mode; Pillow's own reading finds what is cut short."""
    if isinstance(image, TiffImageFile) and not _is_plain(image.tag_v2):
        raise ValueError(
            "is a TIFF of more than 8 bits in a form that is not read (12 bits, white as zero, CMYK, premultiplied "
            "alpha, or a plane for each colour); save it as plain 16-bit RGB or grey"
        )
    image.load()
    import cv2  # few images need it, and it takes time and memory of every process

    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # or it warns of every tag that it does not know
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise ValueError(f"is broken: {error.err}") from error
    if pixels is None or pixels.dtype != np.uint16 or pixels.shape[:2] != image.size[::-1]:
        raise ValueError("is broken or cut short; OpenCV can't decode its 16-bit pixels")
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    return np.broadcast_to(pixels[..., 2::-1], (*pixels.shape[:2], 3))  # OpenCV has blue first


def _is_plain(tags: ImageFileDirectory_v2) -> bool:
    return (
        set(tags[BITSPERSAMPLE]) == {16}
        and tags.get(PHOTOMETRIC_INTERPRETATION) in (1, 2)
        and tags.get(PLANAR_CONFIGURATION, 1) == 1
        and 1 not in tags.get(EXTRASAMPLES, ())
    )


def _eight_bits(values: NDArray[np.uint16]) -> NDArray[np.uint8]:
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)  # 65535 / 255 is 257


def _orientation(image: Image.Image, data: bytes | memoryview) -> int | None:
    """How an image is to be turned, 1 to 8 as EXIF counts; None where it is given, but can't be read.

    Pillow's own reading passes over what is broken without a word, or fails on tags that have nothing to do with it.
    """
    if image.format == "TIFF":
        value = _tiff_orientation(data)
    else:
        exif = image.info.get("exif", b"").removeprefix(b"Exif\0\0")
        value = _tiff_orientation(exif) if exif else 0
    xmp = image.info.get("xmp")
    if not value and isinstance(xmp, bytes) and (found := re.search(rb'tiff:Orientation(?:="|>)([0-9])', xmp)):
        value = int(found[1])
    if value == 0:  # cameras write it when they don't know
        return 1
    return value if value in range(1, 9) else None


def _tiff_orientation(tiff: bytes | memoryview) -> int | None:
    """The orientation in the first directory of a TIFF structure, as EXIF is one; 0 without, None if broken."""
    try:
        order = {b"II": "<", b"MM": ">"}[bytes(tiff[:2])]
        big = 43 in tiff[2:4]  # BigTIFF's offsets and counts have 64 bits
        (start,) = struct.unpack_from(order + ("Q" if big else "I"), tiff, 8 if big else 4)
        (entries,) = struct.unpack_from(order + ("Q" if big else "H"), tiff, start)
        start, size, head = (start + 8, 20, "HHQ") if big else (start + 2, 12, "HHI")
        for entry in range(start, start + entries * size, size):
            tag, kind, count = struct.unpack_from(order + head, tiff, entry)
            if tag == ExifTags.Base.Orientation:
                (value,) = struct.unpack_from(order + INTEGERS[kind], tiff, entry + size - (8 if big else 4))
                return int(value) if count == 1 else None
    except (KeyError, OverflowError, struct.error):
        return None
    return 0


def _turn_upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """The image as it is to be seen, whose first row and column lie as EXIF's orientation says."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)

"""Whatever an image file holds, decoding it gives an image or a ``ValueError``, in memory that fits its size."""

import io
import resource
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.images.codecs import decode_rgb

VALUES = np.random.default_rng(0).integers(0, 65536, (19, 31, 4), dtype=np.uint16)
BYTES = (VALUES >> 8).astype(np.uint8)
LIMIT = 2**20  # pixels that Pillow is told to take; it refuses from twice as many on
HEADROOM = 512 * 2**20  # 256 bytes for each of those pixels: an image is held a few times, in 8 bytes at most
TELLING = (0, 1, 2, 7, 8, 0x7F, 0x80, 0xFF, 0x100, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0xFFFFFFFF)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def exif() -> Image.Exif:
    """What a phone writes: orientation, maker, resolution, and directories for exposure and place."""
    tags = Image.Exif()
    tags[0x0112], tags[0x010F], tags[0x011A], tags[0x0128] = 6, "Maker", 72.0, 2
    tags.get_ifd(0x8769).update({0x829A: 0.01, 0x9003: "2024:01:01 00:00:00", 0x927C: b"note"})
    tags.get_ifd(0x8825).update({1: "N", 2: (1.0, 2.0, 3.0)})
    return tags


def tiff(values: np.ndarray, **options: object) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, metadata=None, extratags=[(274, 3, 1, 6, True)], **options)
    return buffer.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def deep_png(channels: int, colour_type: int) -> bytes:
    header = struct.pack(">IIBBBBB", VALUES.shape[1], VALUES.shape[0], 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in VALUES[..., :channels])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def signed(png: bytes) -> bytes:
    """With the checksum of every chunk, or readers would look no further than the first that is wrong."""
    parts, at = [png[:8]], 8
    while at + 12 <= len(png):
        length = int.from_bytes(png[at : at + 4], "big")
        parts.append(chunk(png[at + 4 : at + 8], png[at + 8 : at + 8 + length]))
        at += 12 + length
    return b"".join(parts)


RGB, RGBA, GREY = Image.fromarray(BYTES[..., :3]), Image.fromarray(BYTES), Image.fromarray(BYTES[..., 0])
GREY_ALPHA = Image.fromarray(BYTES[..., :2], "LA")
XMP = b'<x:xmpmeta xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
PLANAR = tiff(np.moveaxis(VALUES[..., :3], 2, 0), photometric="rgb", planarconfig="separate")  # is refused
FILES = [
    *(saved(image, "PNG") for image in (RGB, RGBA, GREY, GREY_ALPHA, RGB.quantize(16), GREY.convert("1"))),
    *(saved(image, "PNG", exif=exif(), pnginfo=None) for image in (RGB, GREY)),
    saved(RGB, "PNG", save_all=True, append_images=[RGB.rotate(180)]),
    *(deep_png(channels, kind) for channels, kind in ((1, 0), (2, 4), (3, 2), (4, 6))),
    *(saved(image, "JPEG", exif=exif(), xmp=XMP) for image in (RGB, GREY, RGBA.convert("CMYK"))),
    saved(RGB, "JPEG", progressive=True, exif=exif()),
    saved(RGB, "MPO", save_all=True, append_images=[RGB], exif=exif()),
    *(saved(image, "BMP") for image in (RGB, RGBA, GREY, RGB.quantize(16), GREY.convert("1"))),
    *(saved(image, "TIFF", exif=exif()) for image in (RGB, RGBA, GREY, GREY_ALPHA, RGB.quantize(16))),
    *(
        saved(RGB, "TIFF", exif=exif(), compression=name)
        for name in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg", "tiff_adobe_deflate")
    ),
    saved(RGB, "TIFF", save_all=True, append_images=[GREY]),
    *(tiff(VALUES[..., :3], photometric="rgb", byteorder=order) for order in "<>"),
    *(tiff(VALUES[..., 0], photometric="minisblack", byteorder=order, compression="zlib") for order in "<>"),
    tiff(VALUES, photometric="rgb", extrasamples=["unassalpha"], tile=(16, 16)),
    tiff(VALUES[..., :3], photometric="rgb", bigtiff=True),
    PLANAR,
    cv2.imencode(".tif", VALUES[..., :3])[1].tobytes(),  # LZW
    *(saved(RGB, "WEBP", lossless=lossless, exif=exif(), xmp=XMP) for lossless in (False, True)),
    *(saved(image, "WEBP", exif=exif()) for image in (RGBA, GREY)),
    saved(RGB, "WEBP", save_all=True, append_images=[RGB.rotate(180)]),
]


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    """A file in which a few places were overwritten, cut out, doubled or cut off, mostly near its start or end."""
    data = bytearray(draw(st.sampled_from(FILES)))
    for _ in range(draw(st.integers(1, 5))):
        size = len(data)
        near = draw(st.sampled_from([64, 512, size]))
        at = draw(st.integers(0, min(near, size)))
        at = draw(st.sampled_from([at, size - at]))
        kind = draw(st.sampled_from(["byte", "number", "number", "cut", "double", "end"]))
        if kind == "byte":
            data[at : at + 1] = draw(st.binary(min_size=1, max_size=1))
        elif kind == "number":
            width, order = draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from(["little", "big"]))
            value = draw(st.sampled_from(TELLING)) % 256**width
            data[at : at + width] = value.to_bytes(width, order)
        elif kind == "end":
            del data[at:]
        else:
            part = data[at : at + draw(st.integers(1, 64))]
            data[at : at + len(part)] = part * 2 if kind == "double" else b""
    return signed(bytes(data)) if data[:4] == b"\x89PNG" and draw(st.booleans()) else bytes(data)


@pytest.fixture(scope="module", autouse=True)
def bounded_memory() -> Iterator[None]:
    """Little memory beside what is held: who asks for more than an image of the permitted size needs gets none."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Image, "MAX_IMAGE_PIXELS", LIMIT)
        resource.setrlimit(resource.RLIMIT_AS, (held + HEADROOM, hard))
        yield
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def check(data: bytes) -> None:
    with suppress(ValueError):
        pixels = decode_rgb(data).pixels
        height, width, colours = pixels.shape
        assert (pixels.dtype, colours) == (np.uint8, 3)
        assert height * width <= 2 * LIMIT


@pytest.mark.parametrize("number", range(len(FILES)))
def test_the_files_to_be_mutated_are_whole(number: int) -> None:
    if FILES[number] == PLANAR:
        with pytest.raises(ValueError, match="a plane for each colour"):
            decode_rgb(PLANAR)
    else:
        assert sorted(decode_rgb(FILES[number]).pixels.shape) == [3, 19, 31]


@given(mutated())
@settings(max_examples=400, database=None)
def test_mutated_files_give_an_image_or_the_named_error(data: bytes) -> None:
    check(data)


@pytest.mark.slow
@given(mutated())
@settings(max_examples=25_000, database=None)
def test_many_mutated_files_give_an_image_or_the_named_error(data: bytes) -> None:
    check(data)

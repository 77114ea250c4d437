"""Image files of any kind become 8-bit RGB, and it is told whether they were anything else."""

import io
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from pipeline.images.codecs import decode_rgb, encode_png, read_rgb, to_stored_png

COLOURS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
GREY = np.repeat(COLOURS[..., :1], 3, axis=2)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_rgb_is_taken_as_it_is(kind: str) -> None:
    pixels, converted, orientation_known = decode_rgb(encoded(Image.fromarray(COLOURS), kind, lossless=True))
    assert np.array_equal(pixels, COLOURS)
    assert (pixels.dtype, converted, orientation_known) == (np.uint8, False, True)


def test_jpeg_is_taken_as_it_is() -> None:
    pixels, converted, _ = decode_rgb(encoded(Image.fromarray(np.full((16, 16, 3), 90, dtype=np.uint8)), "JPEG"))
    assert (pixels.shape, int(abs(pixels.astype(int) - 90).max()) <= 1, converted) == ((16, 16, 3), True, False)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.fromarray(GREY[..., 0]), GREY),
        (Image.fromarray(GREY[..., 0].astype(np.uint16) * 257), GREY),
        (Image.fromarray(np.dstack([COLOURS, COLOURS[..., 0]])), COLOURS),
        (Image.fromarray(np.dstack([GREY[..., 0], COLOURS[..., 1]]), "LA"), GREY),
        (Image.fromarray(COLOURS // 128 * 255).quantize(8), COLOURS // 128 * 255),
    ],
    ids=["grey", "16-bit grey", "RGBA", "grey with alpha", "palette"],
)
def test_anything_else_is_converted_and_told(image: Image.Image, expected: np.ndarray) -> None:
    data = encoded(image, "PNG")
    for bytes_ in (data, memoryview(data)):
        pixels, converted, _ = decode_rgb(bytes_)
        assert np.array_equal(pixels, expected)
        assert converted


def test_a_view_of_bytes_is_decoded_where_it_lies() -> None:
    around = b"before" + encode_png(COLOURS) + b"after"
    assert np.array_equal(decode_rgb(memoryview(around)[6:-5])[0], COLOURS)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is not an image"),
        (b"no image at all", "is not an image"),
        (encode_png(COLOURS)[:70], "truncated|broken"),
        (encoded(Image.fromarray(COLOURS.astype(np.float32)[..., 0]), "TIFF"), "32-bit pixels .* no known range"),
    ],
)
def test_broken_images_give_a_reason_and_files_their_path(data: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason) as error:
        decode_rgb(data)
    assert "BytesIO" not in str(error.value)
    path = tmp_path / "broken.png"
    path.write_bytes(data)
    for read in (read_rgb, to_stored_png) if len(data) != 70 else (read_rgb,):
        with pytest.raises(ValueError, match=rf"broken.png: .*({reason})"):
            read(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for read in (read_rgb, to_stored_png):
        with pytest.raises(ValueError, match=r"gone.png: .*No such file"):
            read(tmp_path / "gone.png")


def test_an_eight_bit_rgb_png_is_stored_byte_for_byte(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encode_png(COLOURS))
    assert to_stored_png(tmp_path / "a.png") == ((tmp_path / "a.png").read_bytes(), False)


# --- sixteen bits

DEEP = np.random.default_rng(1).integers(0, 65536, (21, 33, 4), dtype=np.uint16)


def png(width: int, height: int, bits: int, colour_type: int, rows: bytes) -> bytes:
    """A PNG written by the book: signature, header, one stream of rows."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def deep_png(values: NDArray[np.uint16], colour_type: int) -> bytes:
    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png(width, height, 16, colour_type, rows)


def tiff(values: NDArray[np.generic], photometric: str, orientation: int = 1, **options: object) -> bytes:
    buffer = io.BytesIO()
    tags = [(274, "H", 1, orientation, True)]
    tifffile.imwrite(buffer, values, photometric=photometric, metadata=None, extratags=tags, **options)
    return buffer.getvalue()


def rounded(values: NDArray[np.uint16]) -> NDArray[np.uint8]:
    colours = values[..., :3] if values.shape[2] >= 3 else np.repeat(values[..., :1], 3, axis=2)
    return np.round(colours.astype(float) / 65535 * 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("data", "channels"),
    [
        *[(deep_png(DEEP[..., :channels], kind), channels) for channels, kind in ((1, 0), (2, 4), (3, 2), (4, 6))],
        *[(tiff(DEEP[..., :3], "rgb", byteorder=order), 3) for order in "<>"],
        (tiff(DEEP[..., :3], "rgb", compression="zlib", predictor=True, tile=(16, 16)), 3),
        (tiff(np.stack([DEEP[..., :3], 65535 - DEEP[..., :3]]), "rgb"), 3),
        (cv2.imencode(".tif", DEEP[..., 2::-1])[1].tobytes(), 3),
        (tiff(DEEP, "rgb", extrasamples=["unassalpha"]), 4),
        *[(tiff(DEEP[..., 0], "minisblack", byteorder=order, rowsperstrip=5), 1) for order in "<>"],
    ],
    ids=[
        *["PNG grey", "PNG grey, alpha", "PNG RGB", "PNG RGBA"],
        *["TIFF RGB, little-endian", "TIFF RGB, big-endian", "TIFF tiles, deflate", "TIFF of two pages", "TIFF LZW"],
        *["TIFF RGBA", "TIFF grey, little-endian", "TIFF grey, big-endian"],
    ],
)
def test_sixteen_bits_are_scaled_with_rounding_and_told(data: bytes, channels: int) -> None:
    for bytes_ in (data, memoryview(data)):
        pixels, converted, _ = decode_rgb(bytes_)
        assert np.array_equal(pixels, rounded(DEEP[..., :channels]))
        assert (pixels.dtype, converted) == (np.uint8, True)


@pytest.mark.parametrize(
    "data",
    [
        tiff(np.moveaxis(DEEP[..., :3], 2, 0), "rgb", planarconfig="separate"),
        tiff(DEEP[..., 0], "miniswhite"),
        tiff(DEEP, "separated"),
        tiff(DEEP, "rgb", extrasamples=["assocalpha"]),
    ],
    ids=["planes", "white as zero", "CMYK", "premultiplied alpha"],
)
def test_a_deep_tiff_that_would_be_misread_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"more than 8 bits in a form that is not read .*; save it as plain 16-bit"):
        decode_rgb(data)


@pytest.mark.parametrize(
    "data",
    [
        deep_png(DEEP[..., :3], 2),
        deep_png(DEEP[..., :2], 4),
        tiff(DEEP[..., :3], "rgb"),
        tiff(DEEP[..., :3], "rgb", compression="zlib", rowsperstrip=4),
    ],
    ids=["PNG RGB", "PNG grey, alpha", "TIFF", "TIFF deflate"],
)
def test_sixteen_bits_cut_short_are_refused(data: bytes) -> None:
    for end in (len(data) // 4, len(data) // 2, len(data) - 30, len(data) - 13):
        with pytest.raises(ValueError, match=r"."):
            decode_rgb(data[:end])


@pytest.mark.parametrize("bits", [8, 16])
def test_a_claim_of_too_many_pixels_is_refused_before_they_are_decoded(bits: int, tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(png(60_000, 60_000, bits, 2, bytes(100)))
    with pytest.raises(ValueError, match=r"bomb.png: .*3600000000 pixels. exceeds limit of 178956970 pixels"):
        read_rgb(tmp_path / "bomb.png")


# --- orientation

SHORT, LONG, RATIONAL, ASCII = 3, 4, 5, 2
Entry = tuple[int, int, int, bytes]  # tag, type, count, value of four bytes


def exif(*entries: Entry, declared: int | None = None) -> bytes:
    """An EXIF block by the book, little-endian; ``declared`` is how many entries it claims."""
    body = b"".join(struct.pack("<HHI", tag, kind, count) + value for tag, kind, count, value in entries)
    count = struct.pack("<H", len(entries) if declared is None else declared)
    return b"Exif\0\0II*\0\x08\0\0\0" + count + body + bytes(12)


def turned(orientation: int, kind: int = SHORT) -> Entry:
    return (0x0112, kind, 1, struct.pack("<I", orientation))


WRONG_MAKE = (0x010F, RATIONAL, 1, struct.pack("<I", 8))
# On which side of what is shown the stored image's first row and first column lie, by the EXIF standard.
SIDES = {
    1: ("top", "left"), 2: ("top", "right"), 3: ("bottom", "right"), 4: ("bottom", "left"),
    5: ("left", "top"), 6: ("right", "top"), 7: ("right", "bottom"), 8: ("left", "bottom"),
}  # fmt: skip


def side(image: NDArray[np.generic], name: str) -> NDArray[np.generic]:
    """The pixels along a side, from left to right or from top to bottom."""
    return {"top": image[0], "bottom": image[-1], "left": image[:, 0], "right": image[:, -1]}[name]


@pytest.mark.parametrize("orientation", SIDES)
@pytest.mark.parametrize("kind", ["WEBP", "TIFF", "deep TIFF"])
def test_an_image_is_shown_as_its_orientation_says(kind: str, orientation: int) -> None:
    if kind == "WEBP":
        data = encoded(Image.fromarray(COLOURS), kind, lossless=True, exif=exif(turned(orientation)))
    else:
        data = tiff(COLOURS if kind == "TIFF" else COLOURS.astype(np.uint16) * 257, "rgb", orientation)
    pixels, _, known = decode_rgb(data)
    row, column = SIDES[orientation]
    shown_row, shown_column = side(pixels, row), side(pixels, column)
    stored_row = COLOURS[0] if column in ("left", "top") else COLOURS[0, ::-1]
    stored_column = COLOURS[:, 0] if row in ("left", "top") else COLOURS[::-1, 0]
    assert np.array_equal(shown_row, stored_row) and np.array_equal(shown_column, stored_column) and known


@pytest.mark.parametrize("kind", ["JPEG", "MPO", "WEBP", "TIFF"])
def test_a_wrong_type_elsewhere_in_exif_changes_nothing(kind: str) -> None:
    block = exif(WRONG_MAKE, turned(6), (0x8769, ASCII, 4, b"oops"))
    image = Image.fromarray(COLOURS)
    if kind == "TIFF":
        data = tiff(COLOURS, "rgb", 6, software="aaaaaaaa")
        # the name of the software becomes a maker of another type, and an EXIF directory that lies nowhere
        assert data.count(struct.pack("<HH", 305, ASCII)) == 1
        data = data.replace(struct.pack("<HH", 305, ASCII), struct.pack("<HH", 0x8769, RATIONAL))
    else:
        data = encoded(
            image, kind, exif=block, **({"save_all": True, "append_images": [image]} if kind == "MPO" else {})
        )
    pixels, _, known = decode_rgb(data)
    assert (pixels.shape, known) == ((9, 6, 3), True)


@pytest.mark.parametrize("kind", ["JPEG", "MPO", "WEBP"])
@pytest.mark.parametrize(
    ("block", "known"),
    [
        (exif(), True),
        (exif(WRONG_MAKE), True),
        (exif(turned(0)), True),
        (exif(turned(1, LONG)), True),
        (exif(turned(9)), False),
        (exif(turned(6, ASCII)), False),
        (exif((0x0112, SHORT, 7, struct.pack("<I", 6))), False),
        (exif(WRONG_MAKE, declared=40), False),
        (b"Exif\0\0no such thing", False),
    ],
    ids=["empty", "without", "zero", "upright", "nine", "text", "seven of them", "cut short", "no EXIF"],
)
def test_an_orientation_that_cannot_be_read_counts_as_upright_and_is_told(kind: str, block: bytes, known: bool) -> None:
    image = Image.fromarray(COLOURS)
    pages = {"save_all": True, "append_images": [image]} if kind == "MPO" else {}
    pixels, converted, orientation_known = decode_rgb(encoded(image, kind, exif=block, **pages))
    assert (pixels.shape, converted, orientation_known) == ((6, 9, 3), False, known)


def test_files_of_unknown_orientation_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.fromarray(COLOURS).save(tmp_path / "odd.jpg", exif=exif(turned(9)))
    assert read_rgb(tmp_path / "odd.jpg").shape == (6, 9, 3)
    assert "odd.jpg: its orientation can't be read" in caplog.text

"""Image files of any kind become 8-bit RGB, and it is told whether they were anything else."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.data.images import decode_rgb, encode_png, read_rgb, stored_png

COLOURS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
GREY = np.repeat(COLOURS[..., :1], 3, axis=2)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "WEBP"])
def test_rgb_is_taken_as_it_is(kind: str) -> None:
    pixels, converted = decode_rgb(encoded(Image.fromarray(COLOURS), kind, lossless=True))
    assert np.array_equal(pixels, COLOURS)
    assert (pixels.dtype, converted) == (np.uint8, False)


def test_jpeg_is_taken_as_it_is() -> None:
    pixels, converted = decode_rgb(encoded(Image.fromarray(np.full((16, 16, 3), 90, dtype=np.uint8)), "JPEG"))
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
        pixels, converted = decode_rgb(bytes_)
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
    for read in (read_rgb, stored_png) if len(data) != 70 else (read_rgb,):
        with pytest.raises(ValueError, match=rf"broken.png: .*({reason})"):
            read(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for read in (read_rgb, stored_png):
        with pytest.raises(ValueError, match=r"gone.png: .*No such file"):
            read(tmp_path / "gone.png")


def test_an_eight_bit_rgb_png_is_stored_byte_for_byte(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encode_png(COLOURS))
    assert stored_png(tmp_path / "a.png") == ((tmp_path / "a.png").read_bytes(), False)

"""Pictures side by side in one PNG: what went in, what came out, what was wanted."""

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

MAX_BYTES = 1_500_000
WIDEST_CELL, NARROWEST_CELL = 480, 120  # pixels
GAP = 8
FONT_SIZE = 16
LINE_HEIGHT = 22

Pixels = NDArray[np.uint8]


def image_grid(rows: Sequence[Sequence[Pixels]], column_titles: Sequence[str], row_titles: Sequence[str]) -> bytes:
    """Draw rows of images under column titles, each row below a title of its own, as one PNG.

    Images are only ever made smaller, in proportion, and as small as it takes for the PNG to stay under
    `MAX_BYTES` (down to `NARROWEST_CELL`, where a very long grid may exceed it).

    Args:
        rows: one sequence per row, one (H, W, 3) uint8 RGB array per column; sizes may differ.
        column_titles: one per column; wrapped where too long, as the row titles are.
        row_titles: one per row.

    Raises:
        ValueError: if titles and images differ in number, there are none, or an array is not such an image.
    """
    _check(rows, column_titles, row_titles)
    pictures = [[Image.fromarray(pixels) for pixels in row] for row in rows]
    widest = max(picture.width for row in pictures for picture in row)
    cell = max(NARROWEST_CELL, min(WIDEST_CELL, widest))
    while True:
        png = _encode(_draw(pictures, column_titles, row_titles, cell))
        if len(png) <= MAX_BYTES or cell == NARROWEST_CELL:
            return png
        # Bytes go with the area; a little less than that, so that one more round is usually enough.
        cell = max(NARROWEST_CELL, int(0.97 * cell * (MAX_BYTES / len(png)) ** 0.5))


def _draw(
    pictures: Sequence[Sequence[Image.Image]],
    column_titles: Sequence[str],
    row_titles: Sequence[str],
    cell: int,
) -> Image.Image:
    """Stack the bands from top to bottom: the column titles, then each row's title and its images."""
    width = len(column_titles) * (cell + GAP) + GAP
    bands = [_side_by_side([_text(title, cell) for title in column_titles], cell)]
    for title, row in zip(row_titles, pictures, strict=True):
        bands.append(_side_by_side([_text(title, width - 2 * GAP)], width - 2 * GAP))
        bands.append(_side_by_side([_shrink(picture, cell) for picture in row], cell))
    grid = Image.new("RGB", (width, sum(band.height for band in bands) + GAP), "white")
    top = GAP // 2
    for band in bands:
        grid.paste(band, (0, top))
        top += band.height
    return grid


def _side_by_side(pictures: Sequence[Image.Image], cell: int) -> Image.Image:
    """One band of cells, each picture in the middle of its own."""
    height = max(picture.height for picture in pictures)
    band = Image.new("RGB", (len(pictures) * (cell + GAP) + GAP, height + GAP), "white")
    for column, picture in enumerate(pictures):
        left = GAP + column * (cell + GAP) + (cell - picture.width) // 2
        band.paste(picture, (left, GAP // 2 + (height - picture.height) // 2))
    return band


def _shrink(picture: Image.Image, cell: int) -> Image.Image:
    """Fit into a square cell, so that a portrait takes no more of the page than a landscape."""
    smaller = picture.copy()
    smaller.thumbnail((cell, cell), Image.Resampling.LANCZOS)
    return smaller


def _text(title: str, width: int) -> Image.Image:
    font = ImageFont.load_default(FONT_SIZE)
    lines = [""]
    for word in title.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    picture = Image.new("RGB", (width, LINE_HEIGHT * len(lines)), "white")
    draw = ImageDraw.Draw(picture)
    for i, line in enumerate(lines):
        draw.text((width / 2, LINE_HEIGHT * (i + 0.5)), line, fill="black", font=font, anchor="mm")
    return picture


def _encode(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def _check(rows: Sequence[Sequence[Pixels]], column_titles: Sequence[str], row_titles: Sequence[str]) -> None:
    if not rows or not column_titles:
        raise ValueError("an image grid needs at least one row and one column")
    if len(rows) != len(row_titles):
        raise ValueError(f"an image grid of {len(rows)} rows got {len(row_titles)} row titles")
    for title, row in zip(row_titles, rows, strict=True):
        if len(row) != len(column_titles):
            raise ValueError(f"row {title!r} has {len(row)} images under {len(column_titles)} column titles")
        for pixels in row:
            if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
                raise ValueError(
                    f"row {title!r} holds {pixels.dtype} pixels of shape {pixels.shape}: give (H, W, 3) uint8"
                )

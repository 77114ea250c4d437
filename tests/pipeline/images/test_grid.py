import io

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from pipeline.images.grid import MAX_BYTES, NARROWEST_CELL, image_grid


def plain(height: int, width: int, colour: tuple[int, int, int]) -> NDArray[np.uint8]:
    return np.full((height, width, 3), colour, dtype=np.uint8)


def decode(png: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def columns_holding(grid: NDArray[np.uint8], colour: tuple[int, int, int]) -> NDArray[np.intp]:
    return np.flatnonzero((grid == colour).all(axis=2).any(axis=0))


def test_columns_keep_their_order_and_rows_their_proportions() -> None:
    red, green, blue = (200, 0, 0), (0, 200, 0), (0, 0, 200)
    landscape = [plain(200, 300, colour) for colour in (red, green, blue)]
    portrait = [plain(300, 200, (9, 0, 9))] * 3
    grid = decode(image_grid([landscape, portrait], ["low", "enhanced", "clean"], ["22", "23"]))
    spans = [columns_holding(grid, colour) for colour in (red, green, blue)]
    assert [len(span) for span in spans] == [300, 300, 300]
    assert spans[0].max() < spans[1].min() < spans[1].max() < spans[2].min()
    assert (grid == red).all(axis=2).sum() == 200 * 300
    assert (grid == (9, 0, 9)).all(axis=2).sum() == 3 * 200 * 300


def test_titles_are_drawn_and_long_ones_wrapped() -> None:
    row = [plain(40, 150, (255, 255, 255))]
    short = decode(image_grid([row], ["low"], ["22"]))
    long = decode(image_grid([row], ["low"], ["22: " + "PSNR 21.30 dB, SSIM 0.8123, " * 4]))
    assert (short < 128).any()
    assert long.shape[1] == short.shape[1] and long.shape[0] > short.shape[0] + 40


def test_noise_is_shrunk_until_the_file_is_small() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (400, 600, 3), dtype=np.uint8)
    png = image_grid([[noise] * 3] * 3, ["a", "b", "c"], ["1", "2", "3"])
    assert len(png) <= MAX_BYTES
    assert decode(png).shape[1] > 3 * NARROWEST_CELL


def test_refuses_what_does_not_fit_together() -> None:
    image = plain(20, 20, (0, 0, 0))
    with pytest.raises(ValueError, match="at least one row"):
        image_grid([], ["low"], [])
    with pytest.raises(ValueError, match="1 rows got 2 row titles"):
        image_grid([[image]], ["low"], ["22", "23"])
    with pytest.raises(ValueError, match="'22' has 1 images under 2 column titles"):
        image_grid([[image]], ["low", "clean"], ["22"])
    with pytest.raises(ValueError, match="float64"):
        image_grid([[image / 255]], ["low"], ["22"])  # type: ignore[list-item]

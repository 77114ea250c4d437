"""The emphasis map against numpy."""

import numpy as np
import pytest
import torch

from iaml import emphasis_map


def emphasis(image, beta, gamma):
    y = 0.299 * image[0] + 0.587 * image[1] + 0.114 * image[2]
    stretched = (y - y.min()) / (y.max() - y.min() + 1e-7)
    return 1 + beta * (1 - stretched) ** gamma


@pytest.mark.parametrize(("beta", "gamma"), [(0.6, 1.0), (0.6, 2.5), (1.7, 0.5), (0.0, 1.0)])
def test_equals_arithmetic_per_image(beta, gamma):
    images = np.random.default_rng(0).random((3, 3, 17, 23)) * np.array([0.1, 0.5, 1.0])[:, None, None, None]
    found = emphasis_map(torch.from_numpy(images).float(), beta, gamma)
    assert found.shape == (3, 1, 17, 23)
    expected = np.stack([emphasis(image, beta, gamma) for image in images])[:, None]
    assert np.allclose(found.numpy(), expected, atol=1e-3)


def test_darkest_place_has_most_emphasis_and_brightest_has_none():
    image = torch.zeros(1, 3, 4, 4)
    image[..., 0, 0] = 0.2
    found = emphasis_map(image, 0.6, 1.0)
    assert found[0, 0, 1, 1] == pytest.approx(1.6)
    assert found[0, 0, 0, 0] == pytest.approx(1.0, abs=1e-6)


def test_image_of_one_brightness_is_finite():
    assert emphasis_map(torch.full((1, 3, 8, 8), 0.1), 0.6, 1.0).isfinite().all()


def test_is_float32_whatever_comes_in():
    assert emphasis_map(torch.rand(1, 3, 8, 8).bfloat16(), 0.6, 1.0).dtype == torch.float32

from typing import get_args

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity as reference_ssim
from torch.utils._python_dispatch import TorchDispatchMode

from iaml.similarity import Window, structural_similarity


def pair(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(shape, generator=generator, dtype=dtype)
    return a, (0.8 * a + 0.1 * torch.rand(shape, generator=generator, dtype=dtype)).clamp(0, 1)


SKIMAGE_OPTIONS = {
    "gaussian": {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False},
    "uniform": {},  # 7x7 and sample covariance are its defaults
}

every_window = pytest.mark.parametrize("window", get_args(Window))


def reference(a: np.ndarray, b: np.ndarray, data_range: float, window: Window) -> float:
    """Mean over channels of scikit-image's SSIM of two (C, H, W) arrays."""
    options = {"data_range": data_range, **SKIMAGE_OPTIONS[window]}
    return float(np.mean([reference_ssim(x, y, **options) for x, y in zip(a, b, strict=True)]))


@every_window
@pytest.mark.parametrize("size", [(11, 11), (11, 40), (37, 53), (120, 181)])
@pytest.mark.parametrize("data_range", [1.0, 255.0])
def test_equals_scikit_image_in_float64(size: tuple[int, int], data_range: float, window: Window) -> None:
    a, b = (data_range * image for image in pair((2, 3, *size)))
    ours = structural_similarity(a, b, data_range=data_range, window=window)
    expected = [reference(x, y, data_range, window) for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    assert ours.dtype == torch.float64
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12)


def test_the_uniform_window_takes_images_of_its_size() -> None:
    a, b = pair((1, 1, 7, 7))
    ours = structural_similarity(a, b, data_range=1.0, window="uniform")
    assert ours.item() == pytest.approx(reference(a[0].numpy(), b[0].numpy(), 1.0, "uniform"), abs=1e-12)


@every_window
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_strips_without_gradients_change_no_bit(dtype: torch.dtype, window: Window) -> None:
    a, b = pair((2, 3, 150, 401), dtype)
    whole = structural_similarity(a.requires_grad_(), b, data_range=1.0, window=window)
    with torch.no_grad():
        assert torch.equal(structural_similarity(a, b, data_range=1.0, window=window), whole)


class LargestTensor(TorchDispatchMode):
    """Keeps the size of the largest tensor that an operation returned."""

    values = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.values = max(self.values, result.numel())
        return result


def test_without_gradients_no_tensor_is_larger_than_an_image() -> None:
    a, b = pair((1, 3, 400, 600))
    with LargestTensor() as largest:
        structural_similarity(a, b, data_range=1.0)
    assert 0 < largest.values <= a.numel()


def test_float32_stays_float32_and_close_to_float64() -> None:
    a, b = pair((2, 3, 32, 48))
    ours = structural_similarity(a.float(), b.float(), data_range=1.0)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), structural_similarity(a, b, data_range=1.0), rtol=0, atol=1e-5)


def test_dark_images_keep_their_precision_under_autocast() -> None:
    a, b = (0.05 * image for image in pair((1, 3, 24, 24)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = structural_similarity(a.float(), b.float(), data_range=1.0)
    torch.testing.assert_close(ours.double(), structural_similarity(a, b, data_range=1.0), rtol=0, atol=1e-5)


def test_equal_images_score_one() -> None:
    a, _ = pair((1, 3, 16, 16))
    black = torch.zeros(1, 3, 16, 16, dtype=torch.float64)
    for image in (a, black):
        assert structural_similarity(image, image, data_range=1.0).item() == pytest.approx(1, abs=1e-12)


@every_window
def test_gradients_are_right_and_zero_at_the_maximum(window: Window) -> None:
    a, b = pair((1, 2, 12, 13))
    a.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: structural_similarity(x, b, data_range=1.0, window=window), (a,))
    (gradient,) = torch.autograd.grad(structural_similarity(a, a.detach(), data_range=1.0, window=window).sum(), a)
    assert gradient.abs().max() < 1e-12


def test_gradient_of_black_float32_images_is_finite() -> None:
    black = torch.zeros(1, 3, 16, 16, requires_grad=True)
    structural_similarity(black, torch.zeros(1, 3, 16, 16), data_range=1.0).sum().backward()
    assert black.grad is not None and black.grad.isfinite().all()


def test_refuses_what_it_cannot_compare() -> None:
    a = torch.zeros(1, 3, 16, 16)
    with pytest.raises(ValueError, match="one shape"):
        structural_similarity(a, a[..., 1:], data_range=1.0)
    with pytest.raises(ValueError, match="too small"):
        structural_similarity(a[..., :10], a[..., :10], data_range=1.0)
    with pytest.raises(ValueError, match="7x7"):
        structural_similarity(a[..., :6, :], a[..., :6, :], data_range=1.0, window="uniform")
    with pytest.raises(ValueError, match="choose from gaussian, uniform"):
        structural_similarity(a, a, data_range=1.0, window="box")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\.float\(\)"):
        structural_similarity(a.bfloat16(), a, data_range=1.0)
    with pytest.raises(ValueError, match="data_range"):
        structural_similarity(a, a, data_range=0.0)

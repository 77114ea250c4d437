import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity as reference_ssim

from iaml.similarity import structural_similarity


def pair(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(shape, generator=generator, dtype=dtype)
    return a, (0.8 * a + 0.1 * torch.rand(shape, generator=generator, dtype=dtype)).clamp(0, 1)


def reference(a: np.ndarray, b: np.ndarray, data_range: float) -> float:
    """Mean over channels of scikit-image's SSIM of two (C, H, W) arrays."""
    return float(
        np.mean(
            [
                reference_ssim(
                    x, y, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=data_range
                )
                for x, y in zip(a, b, strict=True)
            ]
        )
    )


@pytest.mark.parametrize("size", [(11, 11), (11, 40), (37, 53)])
@pytest.mark.parametrize("data_range", [1.0, 255.0])
def test_equals_scikit_image_in_float64(size: tuple[int, int], data_range: float) -> None:
    a, b = (data_range * image for image in pair((2, 3, *size)))
    ours = structural_similarity(a, b, data_range=data_range)
    expected = [reference(x, y, data_range) for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    assert ours.dtype == torch.float64
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12)


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


def test_gradients_are_right_and_zero_at_the_maximum() -> None:
    a, b = pair((1, 2, 12, 13))
    a.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: structural_similarity(x, b, data_range=1.0), (a,))
    (gradient,) = torch.autograd.grad(structural_similarity(a, a.detach(), data_range=1.0).sum(), a)
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
    with pytest.raises(ValueError, match=r"\.float\(\)"):
        structural_similarity(a.bfloat16(), a, data_range=1.0)
    with pytest.raises(ValueError, match="data_range"):
        structural_similarity(a, a, data_range=0.0)

import math

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity as reference_ssim
from torch import Tensor

from iaml.metrics import eight_bit_levels, score


def reference(prediction: Tensor, target: Tensor) -> tuple[float, float]:
    """PSNR and SSIM of one (3, H, W) pair, by numpy and scikit-image."""
    a, b = (np.round(np.clip(x.double().numpy(), 0, 1) * 255).astype(np.uint8) for x in (prediction, target))
    mse = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    channels = [
        reference_ssim(x, y, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255)
        for x, y in zip(a, b, strict=True)
    ]
    return float(10 * np.log10(255**2 / mse)), float(np.mean(channels))


def photograph_like(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A noisy, tinted prediction, partly outside [0, 1], of a smooth picture: each (2, 3, H, W)."""
    generator = torch.Generator().manual_seed(1)
    y, x = (torch.linspace(0, 6, n) for n in shape)
    waves = 0.5 + 0.4 * torch.sin(y)[:, None] * torch.cos(2 * x)
    target = torch.stack([waves.expand(3, -1, -1), 1 - waves.expand(3, -1, -1)])
    tint = torch.tensor([0.9, 1.0, 1.2])[:, None, None]
    return tint * target + 0.05 * torch.randn(target.shape, generator=generator), target


@pytest.mark.parametrize("shape", [(48, 64), (37, 53), (11, 12)])
def test_rgb_u8_equals_numpy_and_scikit_image(shape: tuple[int, int]) -> None:
    prediction, target = photograph_like(shape)
    scores = score(prediction, target)
    for i in range(2):
        psnr, ssim = reference(prediction[i], target[i])
        assert scores["psnr"][i].item() == pytest.approx(psnr, abs=1e-4)
        assert scores["ssim"][i].item() == pytest.approx(ssim, abs=1e-5)
    assert {name: (values.shape, values.dtype) for name, values in scores.items()} == dict.fromkeys(
        ("psnr", "ssim"), ((2,), torch.float64)
    )


def test_equal_images_score_inf_and_one() -> None:
    _, target = photograph_like((16, 16))
    target[1] = 0
    scores = score(target, target.clone())
    assert scores["psnr"].tolist() == [math.inf, math.inf]
    torch.testing.assert_close(scores["ssim"], torch.ones(2, dtype=torch.float64))


def test_a_black_prediction_has_finite_scores() -> None:
    _, target = photograph_like((16, 16))
    scores = score(torch.zeros_like(target), target)
    psnr, ssim = reference(torch.zeros_like(target[0]), target[0])
    assert scores["psnr"][0].item() == pytest.approx(psnr, abs=1e-4)
    assert scores["ssim"][0].item() == pytest.approx(ssim, abs=1e-5)
    black_and_white = score(torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16))
    assert black_and_white["psnr"].item() == pytest.approx(0)


def test_a_nan_shows_in_its_image_only() -> None:
    prediction, target = photograph_like((16, 16))
    prediction[0, 0, 3, 3] = math.nan
    scores = score(prediction, target)
    for values in scores.values():
        assert values.isnan().tolist() == [True, False]


def test_levels_round_half_to_even_and_recover_every_saved_level() -> None:
    halves = torch.tensor([0.5, 1.5, 2.5, 254.5], dtype=torch.float64) / 255
    assert eight_bit_levels(halves).tolist() == [0, 2, 2, 254]
    assert eight_bit_levels(torch.tensor([-0.2, 1.3])).tolist() == [0, 255]
    levels = torch.arange(256)
    assert torch.equal(eight_bit_levels(levels.float() / 255), levels.double())


def test_refuses_what_it_cannot_score() -> None:
    image = torch.zeros(1, 3, 16, 16)
    with pytest.raises(ValueError, match="nothing is resized"):
        score(image, image[..., 1:])
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        score(image[0], image[0])
    with pytest.raises(ValueError, match=r"target is torch\.uint8"):
        score(image, image.byte())
    with pytest.raises(ValueError, match="choose from rgb_u8"):
        score(image, image, protocol="psnr_y")  # type: ignore[arg-type]

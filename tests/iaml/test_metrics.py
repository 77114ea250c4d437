import math
from collections.abc import Callable
from itertools import combinations
from typing import get_args

import cv2
import numpy as np
import pytest
import skimage.data
import skimage.filters
import torch
from skimage.metrics import peak_signal_noise_ratio
from skimage.metrics import structural_similarity as skimage_ssim
from torch import Tensor

from iaml.metrics import Protocol, eight_bit_levels, score

PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)

# Each protocol again, of one (H, W, 3) float32 pair, by numpy, OpenCV and scikit-image.


def saved(image: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(image.astype(np.float64), 0, 1) * 255).astype(np.uint8)


def truncated(image: np.ndarray) -> np.ndarray:
    return (np.clip(image, 0, 1) * np.float32(255)).astype(np.uint8)


def mean_ratio(target: np.ndarray, prediction: np.ndarray, conversion: int) -> float:
    below = cv2.cvtColor(prediction, conversion).mean()
    return cv2.cvtColor(target, conversion).mean() / below if below > 0 else 1.0


def decibels(signal: float, mse: float) -> float:
    return 10 * math.log10(signal / mse) if mse > 0 else math.inf


def gaussian_ssim(a: np.ndarray, b: np.ndarray, channel_axis: int | None = 2) -> float:
    return skimage_ssim(
        a,
        b,
        channel_axis=channel_axis,
        data_range=255,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )


def rgb_u8(prediction: np.ndarray, target: np.ndarray) -> tuple[float, float]:
    a, b = saved(prediction), saved(target)
    return decibels(255**2, np.mean((a.astype(np.float64) - b) ** 2)), gaussian_ssim(a, b)


def retinexformer(prediction: np.ndarray, target: np.ndarray) -> tuple[float, float]:
    prediction = np.clip(prediction, 0, 1)
    psnr = decibels(1, float(np.mean((prediction - target) ** 2)))
    return min(psnr, 100.0), gaussian_ssim(saved(prediction), saved(target))


def retinexformer_gtmean(prediction: np.ndarray, target: np.ndarray) -> tuple[float, float]:
    prediction = np.clip(prediction, 0, 1)
    ratio = mean_ratio(target, prediction, cv2.COLOR_BGR2GRAY)
    return retinexformer(np.clip(prediction * np.float32(ratio), 0, 1), target)


def cidnet(prediction: np.ndarray, target: np.ndarray) -> tuple[float, float]:
    a, b = truncated(prediction), saved(target)
    mse = np.mean((a.astype(np.float32) - b.astype(np.float32)) ** 2)
    return decibels(255**2, float(mse) + 1e-8), gaussian_ssim(a, b)


def cidnet_gtmean(prediction: np.ndarray, target: np.ndarray) -> tuple[float, float]:
    a, b = truncated(prediction), saved(target)
    scaled = np.clip(a * mean_ratio(b, a, cv2.COLOR_RGB2GRAY), 0, 255)
    mse = np.mean((scaled.astype(np.float32) - b.astype(np.float32)) ** 2)
    return decibels(255**2, float(mse) + 1e-8), gaussian_ssim(scaled, b.astype(np.float64))


def basicsr_y(prediction: np.ndarray, target: np.ndarray) -> tuple[float, float]:
    a, b = (saved(x).astype(np.float64) @ [65.481, 128.553, 24.966] / 255 + 16 for x in (prediction, target))
    return decibels(255**2, np.mean((a - b) ** 2)), gaussian_ssim(a, b, channel_axis=None)


def skimage_default(prediction: np.ndarray, target: np.ndarray) -> tuple[float, float]:
    a, b = saved(prediction), saved(target)
    with np.errstate(divide="ignore"):
        return peak_signal_noise_ratio(b, a, data_range=255), skimage_ssim(a, b, channel_axis=2, data_range=255)


REFERENCES: dict[Protocol, Callable[[np.ndarray, np.ndarray], tuple[float, float]]] = {
    "rgb_u8": rgb_u8,
    "retinexformer": retinexformer,
    "retinexformer_gtmean": retinexformer_gtmean,
    "cidnet": cidnet,
    "cidnet_gtmean": cidnet_gtmean,
    "basicsr_y": basicsr_y,
    "skimage_default": skimage_default,
}

every_protocol = pytest.mark.parametrize("protocol", PROTOCOLS)


def assert_as_reference(prediction: Tensor, target: Tensor, protocol: Protocol) -> None:
    scores = score(prediction, target, protocol)
    for i, (a, b) in enumerate(zip(prediction, target, strict=True)):
        psnr, ssim = REFERENCES[protocol](*(np.ascontiguousarray(x.permute(1, 2, 0).numpy()) for x in (a, b)))
        assert scores["psnr"][i].item() == pytest.approx(psnr, abs=1e-4)
        assert scores["ssim"][i].item() == pytest.approx(ssim, abs=1e-5)


def photograph_like(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A noisy, tinted prediction, partly outside [0, 1], of a smooth 8-bit picture: each (2, 3, H, W)."""
    generator = torch.Generator().manual_seed(1)
    y, x = (torch.linspace(0, 6, n) for n in shape)
    waves = (0.5 + 0.4 * torch.sin(y)[:, None] * torch.cos(2 * x)).expand(3, -1, -1)
    target = (torch.stack([waves, 1 - waves]) * 255).round() / 255
    tint = torch.tensor([0.9, 1.0, 1.2])[:, None, None]
    return tint * target + 0.05 * torch.randn(target.shape, generator=generator), target


def astronaut() -> tuple[Tensor, Tensor]:
    """A blurred, noisy, dark and tinted copy of a photograph, and the photograph: each (1, 3, 255, 201)."""
    photograph = skimage.data.astronaut()[20:275, 120:321]
    blurred = skimage.filters.gaussian(photograph / 255, sigma=1, channel_axis=2)
    noise = np.random.default_rng(0).normal(0, 0.02, photograph.shape)
    prediction = blurred * [0.92, 0.85, 0.78] + noise
    return tuple(
        torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)[None] for image in (prediction, photograph / 255)
    )


@every_protocol
@pytest.mark.parametrize("shape", [(48, 64), (37, 53), (11, 12)])
def test_equals_independent_arithmetic(shape: tuple[int, int], protocol: Protocol) -> None:
    assert_as_reference(*photograph_like(shape), protocol)


@every_protocol
def test_equals_independent_arithmetic_on_a_photograph(protocol: Protocol) -> None:
    assert_as_reference(*astronaut(), protocol)


@every_protocol
def test_scores_are_float64_one_per_image(protocol: Protocol) -> None:
    prediction, target = photograph_like((16, 20))
    for pair in ((prediction, target), (prediction.double(), target.double())):
        scores = score(*pair, protocol)
        assert {name: (values.shape, values.dtype) for name, values in scores.items()} == dict.fromkeys(
            ("psnr", "ssim"), ((2,), torch.float64)
        )


def test_protocols_differ_on_a_photograph() -> None:
    scores = {protocol: score(*astronaut(), protocol) for protocol in PROTOCOLS}
    # too noisy a prediction for the rounding of retinexformer to show; of skimage_default only the SSIM is its own
    alike = {("rgb_u8", "retinexformer"), ("rgb_u8", "skimage_default"), ("retinexformer", "skimage_default")}
    for pair in combinations(PROTOCOLS, 2):
        a, b = (scores[protocol]["psnr"].item() for protocol in pair)
        assert (abs(a - b) > 0.05) == (pair not in alike), pair
    assert abs(scores["rgb_u8"]["ssim"] - scores["skimage_default"]["ssim"]).item() > 0.005


@pytest.mark.parametrize(("offset", "after_rounding"), [(0.4, 0), (-0.4, 0), (0.6, 1), (-0.6, -1)])
def test_protocols_round_as_they_should(offset: float, after_rounding: int) -> None:
    levels = torch.randint(10, 240, (1, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    prediction, target = (levels + offset) / 255, levels.float() / 255
    psnr = {protocol: score(prediction, target, protocol)["psnr"].item() for protocol in PROTOCOLS}
    one_level = 20 * math.log10(255)
    rounded = one_level if after_rounding else math.inf
    assert psnr["rgb_u8"] == psnr["skimage_default"] == pytest.approx(rounded)
    assert psnr["retinexformer"] == pytest.approx(20 * math.log10(255 / abs(offset)), abs=1e-3)
    assert psnr["cidnet"] == pytest.approx(one_level if offset < 0 else one_level + 80)


@every_protocol
def test_equal_images_have_the_protocols_best_scores(protocol: Protocol) -> None:
    _, target = photograph_like((16, 17))
    target[1] = 0
    scores = score(target, target.clone(), protocol)
    ceilings = {"retinexformer": 100.0, "cidnet": 10 * math.log10(255**2 / 1e-8)}
    expected = ceilings.get(protocol.removesuffix("_gtmean"), math.inf)
    assert scores["psnr"].tolist() == pytest.approx([expected] * 2)
    torch.testing.assert_close(scores["ssim"], torch.ones(2, dtype=torch.float64))


@every_protocol
def test_black_images_score_as_by_independent_arithmetic(protocol: Protocol) -> None:
    _, target = photograph_like((15, 17))
    black = torch.zeros_like(target)
    for pair in ((black, target), (target, black), (black, black)):
        assert_as_reference(*pair, protocol)


@every_protocol
@pytest.mark.parametrize("pixel", [(0, 0), (7, 9)])
def test_a_nan_shows_in_its_image_only(pixel: tuple[int, int], protocol: Protocol) -> None:
    for position in (0, 1):
        for images in (photograph_like((16, 16)), (torch.zeros(2, 3, 16, 16), torch.zeros(2, 3, 16, 16))):
            images[position][(0, 1, *pixel)] = math.nan
            for values in score(*images, protocol).values():
                assert values.isnan().tolist() == [True, False]


def test_levels_round_half_to_even_and_recover_every_saved_level() -> None:
    halves = torch.tensor([0.5, 1.5, 2.5, 254.5], dtype=torch.float64) / 255
    assert eight_bit_levels(halves).tolist() == [0, 2, 2, 254]
    assert eight_bit_levels(torch.tensor([-0.2, 1.3])).tolist() == [0, 255]
    levels = torch.arange(256)
    assert torch.equal(eight_bit_levels(levels.float() / 255), levels.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_truncation_recovers_every_saved_level(dtype: torch.dtype) -> None:
    levels = torch.arange(256, dtype=dtype).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    for image in (levels / 255, levels * (1 / 255), (levels.double() / 255).to(dtype)):
        assert score(image, levels / 255, "cidnet")["psnr"].item() == pytest.approx(128.1308, abs=1e-4)


def test_gray_of_cidnet_is_rounded_as_opencv_rounds_it() -> None:
    """Flat dark colours, where a gray of 9 instead of 10 changes the score by about 1 dB."""
    colours = torch.randint(0, 20, (200, 3), generator=torch.Generator().manual_seed(0))
    colours[0] = torch.tensor([0, 12, 4])  # coefficients of 14 bits instead of 15 round this to 7, not 8
    prediction = (colours / 255)[:, :, None, None].expand(-1, -1, 11, 11)
    target = photograph_like((11, 11))[1][:1].expand_as(prediction)
    assert_as_reference(prediction, target, "cidnet_gtmean")


def test_refuses_what_it_cannot_score() -> None:
    image = torch.zeros(1, 3, 16, 16)
    with pytest.raises(ValueError, match="nothing is resized"):
        score(image, image[..., 1:])
    with pytest.raises(ValueError, match=r"\(B, 3, H, W\)"):
        score(image[0], image[0])
    with pytest.raises(ValueError, match=r"clean image is torch\.uint8"):
        score(image, image.byte())
    with pytest.raises(ValueError, match="choose from rgb_u8"):
        score(image, image, protocol="psnr_y")  # type: ignore[arg-type]

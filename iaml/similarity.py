"""Structural similarity (SSIM), the one both the training loss and the metrics use."""

import math

import torch
from torch import Tensor

WINDOW = 11
SIGMA = 1.5
K1, K2 = 0.01, 0.03


def structural_similarity(a: Tensor, b: Tensor, *, data_range: float) -> Tensor:
    """SSIM of each image in `a` with its partner in `b`, averaged over pixels and channels.

    Gaussian window of 11x11 with sigma 1.5, windows wholly inside the image, population covariance:
    scikit-image's `gaussian_weights=True, sigma=1.5, use_sample_covariance=False`, channel by channel.
    Differentiable. float32 is precise enough for a loss on values in [0, 1]; measure in float64.

    Args:
        a: (B, C, H, W), float32 or float64; H and W at least 11.
        b: as `a`: same shape, dtype and device.
        data_range: the distance from black to white: 1.0 for values in [0, 1], 255.0 for 8-bit levels.

    Returns:
        (B,), in the dtype of `a`: 1 for equal images, lower otherwise (it can fall below 0).

    Raises:
        ValueError: for other shapes or dtypes, or a `data_range` that is not positive.
    """
    _check(a, b, data_range)
    mean_a, mean_b, mean_aa, mean_bb, mean_ab = _blur(torch.stack((a, b, a * a, b * b, a * b)))
    variances = (mean_aa - mean_a**2) + (mean_bb - mean_b**2)
    covariance = mean_ab - mean_a * mean_b
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variances + c2)
    similarity: Tensor = luminance * structure
    return similarity.mean(dim=(1, 2, 3))


def _blur(images: Tensor) -> Tensor:
    return _blur_along(_blur_along(images, dim=-2), dim=-1)


def _blur_along(images: Tensor, dim: int) -> Tensor:
    """One axis of the separable Gaussian, without padding: (..., N, ...) to (..., N - 10, ...).

    A sum of shifted copies and not a convolution, because autocast and TF32 would round a convolution's
    inputs, and the variances are small differences of large means. On a CPU it is about as fast.
    """
    size = images.shape[dim] - WINDOW + 1
    blurred = torch.zeros_like(images.narrow(dim, 0, size))
    for offset, weight in enumerate(_gaussian()):
        blurred = blurred + weight * images.narrow(dim, offset, size)
    return blurred


def _gaussian() -> list[float]:
    weights = [math.exp(-((i - WINDOW // 2) ** 2) / (2 * SIGMA**2)) for i in range(WINDOW)]
    return [weight / sum(weights) for weight in weights]


def _check(a: Tensor, b: Tensor, data_range: float) -> None:
    if a.ndim != 4 or a.shape != b.shape:
        raise ValueError(
            f"SSIM compares two (B, C, H, W) batches of one shape, not {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if min(a.shape[-2:]) < WINDOW:
        raise ValueError(
            f"SSIM's window is {WINDOW}x{WINDOW} pixels: an image of {a.shape[-2]}x{a.shape[-1]} is too small"
        )
    if a.dtype != b.dtype or a.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"SSIM needs two float32 or two float64 tensors, not {a.dtype} and {b.dtype}: convert them with .float()"
        )
    if not data_range > 0:
        raise ValueError(f"SSIM's data_range must be positive, not {data_range}")

"""Structural similarity (SSIM), the one both the training loss and the metrics use."""

import functools
import math
from typing import Literal

import torch
from torch import Tensor

from iaml import kernels

Window = Literal["gaussian", "uniform"]

SIZES: dict[Window, int] = {"gaussian": 11, "uniform": 7}
SIGMA = 1.5
K1, K2 = 0.01, 0.03


def structural_similarity(a: Tensor, b: Tensor, *, data_range: float, window: Window = "gaussian") -> Tensor:
    """SSIM of each image in `a` with its partner in `b`, averaged over pixels and channels.

    Windows lie wholly inside the image; channel by channel. Differentiable. float32 is precise enough for
    a loss on values in [0, 1]; measure in float64. Without gradients it needs little memory: about that of `a` and `b`.

    Windows:
        gaussian: 11x11 with sigma 1.5, population covariance: scikit-image's
            `gaussian_weights=True, sigma=1.5, use_sample_covariance=False`.
        uniform: 7x7, sample covariance: scikit-image's defaults.

    Args:
        a: (B, C, H, W), float32 or float64; H and W at least the window's size.
        b: as `a`: same shape, dtype and device.
        data_range: the distance from black to white: 1.0 for values in [0, 1], 255.0 for 8-bit levels.
        window: which pixels around each one are compared, and how they weigh.

    Returns:
        (B,), in the dtype of `a`: 1 for equal images, lower otherwise (it can fall below 0).

    Raises:
        ValueError: for other shapes or dtypes, or a `data_range` that is not positive.
    """
    _check(a, b, data_range, window)
    if window == "gaussian" and kernels.usable(a) and not b.requires_grad:
        return kernels.similarity(a, b, SIGMA, (K1 * data_range) ** 2, (K2 * data_range) ** 2)
    height = a.shape[-2] - SIZES[window] + 1
    rows = height if _needs_gradient(a, b) else _rows_per_strip(a)
    strips = []
    for top in range(0, height, rows):
        bottom = min(top + rows, height) + SIZES[window] - 1
        strips.append(_similarity_map(a[..., top:bottom, :], b[..., top:bottom, :], data_range, window))
    return torch.cat(strips, dim=-2).mean(dim=(1, 2, 3))


def _needs_gradient(a: Tensor, b: Tensor) -> bool:
    return torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)


def _rows_per_strip(image: Tensor) -> int:
    """How many rows to compare at once: what fits a CPU's cache; more on a GPU, where each launch costs time."""
    values = 2**16 if image.is_cpu else 2**22
    return max(values * image.shape[-2] // image.numel(), 1)


def _similarity_map(a: Tensor, b: Tensor, data_range: float, window: Window) -> Tensor:
    """The similarity at every place of the window: (B, C, H, W) to (B, C, H - size + 1, W - size + 1)."""
    mean_a, mean_b, mean_aa, mean_bb, mean_ab = _blur(torch.stack((a, b, a * a, b * b, a * b)), _weights(window))
    variances = (mean_aa - mean_a**2) + (mean_bb - mean_b**2)
    covariance = mean_ab - mean_a * mean_b
    c1, c2 = (K1 * data_range) ** 2, (K2 * data_range) ** 2
    if window == "uniform":
        # sample covariances are n / (n - 1) times these; in the ratio below the factor reaches c2 alone
        n = SIZES[window] ** 2
        c2 *= (n - 1) / n
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variances + c2)
    similarity: Tensor = luminance * structure
    return similarity


def _blur(images: Tensor, weights: list[float]) -> Tensor:
    return _blur_along(_blur_along(images, weights, dim=-2), weights, dim=-1)


def _blur_along(images: Tensor, weights: list[float], dim: int) -> Tensor:
    """One axis of a separable window, without padding: (..., N, ...) to (..., N - len(weights) + 1, ...).

    No convolution, because autocast and TF32 would round its inputs, and the variances are small differences of large
    means. On a GPU a product with a band of weights, which moves the images once; else a sum of shifted copies, which
    on a CPU is about as fast as a convolution.
    """
    size = images.shape[dim] - len(weights) + 1
    if images.is_cuda:
        band = _band(tuple(weights), images.shape[dim], images.dtype, images.device)
        with torch.autocast("cuda", enabled=False):
            return images @ band if dim == -1 else band.t() @ images
    blurred = torch.zeros_like(images.narrow(dim, 0, size))
    for offset, weight in enumerate(weights):
        blurred.add_(images.narrow(dim, offset, size), alpha=weight)
    return blurred


@functools.lru_cache(maxsize=32)
def _band(weights: tuple[float, ...], size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The matrix, (size, size - len(weights) + 1), that blurs rows which are multiplied by it; kept on the device."""
    rows = torch.zeros(size, size - len(weights) + 1, dtype=dtype)
    for offset, weight in enumerate(weights):
        rows.diagonal(-offset).fill_(weight)
    return rows.to(device)


def _weights(window: Window) -> list[float]:
    """The window along one axis; sums to 1."""
    size = SIZES[window]
    if window == "uniform":
        return [1 / size] * size
    weights = [math.exp(-((i - size // 2) ** 2) / (2 * SIGMA**2)) for i in range(size)]
    return [weight / sum(weights) for weight in weights]


def _check(a: Tensor, b: Tensor, data_range: float, window: Window) -> None:
    if a.ndim != 4 or a.shape != b.shape:
        raise ValueError(
            f"SSIM compares two (B, C, H, W) batches of one shape, not {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if window not in SIZES:
        raise ValueError(f"unknown SSIM window {window!r}: choose from {', '.join(SIZES)}")
    size = SIZES[window]
    if min(a.shape[-2:]) < size:
        raise ValueError(f"SSIM's window is {size}x{size} pixels: an image of {a.shape[-2]}x{a.shape[-1]} is too small")
    if a.dtype != b.dtype or a.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"SSIM needs two float32 or two float64 tensors, not {a.dtype} and {b.dtype}: convert them with .float()"
        )
    if not data_range > 0:
        raise ValueError(f"SSIM's data_range must be positive, not {data_range}")

"""The illumination-aware mirror loss between the student's and the teacher's decoder features."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from iaml import kernels
from iaml.illumination import emphasis_map

EPSILON = 1e-6


def standardise(features: Tensor) -> Tensor:
    """``z(a) = (a - mean a) / (std a + 1e-6)`` per sample, over channels and pixels jointly (unbiased std).

    Args:
        features: float32, shape (B, C, H, W).
    """
    mean = features.mean(dim=(1, 2, 3), keepdim=True)
    deviation = features.std(dim=(1, 2, 3), keepdim=True)
    return (features - mean) / (deviation + EPSILON)


def mirror_loss(
    student_maps: Sequence[Tensor],
    teacher_maps: Sequence[Tensor],
    low: Tensor,
    *,
    scale_weights: Sequence[float],
    beta: float,
    gamma: float,
) -> Tensor:
    """``IAML = sum_i w_i mean(W_i |z(u_i) - sg z(t_i)|)``, in float32 whatever the inputs' precision.

    Scales whose weight is 0 are left out. No gradient reaches the teacher.

    Args:
        student_maps: ``u_i``, coarsest first, each of shape (B, C_i, H_i, W_i).
        teacher_maps: ``t_i``, of the same shapes.
        low: low-light images ``x`` in [0, 1], shape (B, 3, H, W).
        scale_weights: ``w_i``, one for each scale.
        beta: strength of the emphasis on dark places.
        gamma: the illumination exponent.

    Returns:
        Float32 scalar.

    Raises:
        ValueError: the numbers of maps and weights differ.
    """
    if not len(student_maps) == len(teacher_maps) == len(scale_weights):
        raise ValueError(
            f"mirror_loss: {len(student_maps)} student maps, {len(teacher_maps)} teacher maps and "
            f"{len(scale_weights)} scale weights; there must be as many of each"
        )
    with torch.autocast(low.device.type, enabled=False):
        emphasis = emphasis_map(low, beta, gamma)
        total = torch.zeros((), device=low.device)
        for u, t, weight in zip(student_maps, teacher_maps, scale_weights, strict=True):
            if weight:
                resized = F.interpolate(emphasis, size=u.shape[-2:], mode="bilinear", align_corners=False)
                total = total + weight * _compare(u, t.detach(), resized)
        return total


def _compare(u: Tensor, t: Tensor, emphasis: Tensor) -> Tensor:
    """``mean(W |z(u) - z(t)|)`` of one scale."""
    if kernels.usable(u):
        return kernels.mirror(u, t, emphasis, EPSILON).mean()
    return (emphasis * (standardise(u.float()) - standardise(t.float())).abs()).mean()

"""Scores of enhanced images by named protocols, because numbers of different protocols do not compare."""

from typing import Literal, get_args

import torch
from torch import Tensor

from iaml.similarity import structural_similarity

Protocol = Literal["rgb_u8"]


@torch.no_grad()
def score(prediction: Tensor, target: Tensor, protocol: Protocol = "rgb_u8") -> dict[str, Tensor]:
    """PSNR in dB and SSIM of each prediction against its target.

    Protocols:
        rgb_u8: both images as they would be saved, in 8 bits; PSNR over all pixels and channels, `inf` for
            equal images; SSIM with a Gaussian window, per channel, averaged. Computed in float64.

    Args:
        prediction: (B, 3, H, W), float, RGB in [0, 1]; values outside are clamped. H and W at least 11.
        target: as `prediction`: same shape, same device.
        protocol: how to score.

    Returns:
        `{"psnr": (B,), "ssim": (B,)}`, float64. A NaN in an image makes its scores NaN.

    Raises:
        ValueError: for an unknown protocol, or shapes or dtypes other than those above.
    """
    _check(prediction, target)
    match protocol:
        case "rgb_u8":
            return _rgb_u8(prediction, target)
        case _:
            raise ValueError(f"unknown protocol {protocol!r}: choose from {', '.join(get_args(Protocol))}")


def eight_bit_levels(image: Tensor) -> Tensor:
    """The levels 0 to 255 that an image in [0, 1] takes when it is saved: clamped, rounded half to even.

    Args:
        image: any shape, float.

    Returns:
        Same shape, float64, whole numbers (NaN stays NaN).
    """
    return (image.double().clamp(0, 1) * 255).round()


def _rgb_u8(prediction: Tensor, target: Tensor) -> dict[str, Tensor]:
    a, b = eight_bit_levels(prediction), eight_bit_levels(target)
    mse = (a - b).square().mean(dim=(1, 2, 3))
    return {"psnr": 10 * torch.log10(255**2 / mse), "ssim": structural_similarity(a, b, data_range=255)}


def _check(prediction: Tensor, target: Tensor) -> None:
    if prediction.shape != target.shape:
        raise ValueError(
            f"the prediction is {tuple(prediction.shape)} and the target {tuple(target.shape)}: "
            "scores compare images of one shape, and nothing is resized"
        )
    if prediction.ndim != 4 or prediction.shape[1] != 3:
        raise ValueError(f"scores need (B, 3, H, W) images, not {tuple(prediction.shape)}")
    for name, image in (("prediction", prediction), ("target", target)):
        if not image.is_floating_point():
            raise ValueError(f"the {name} is {image.dtype}: scores need float images in [0, 1]")

"""Scores of enhanced images by named protocols, because numbers of different protocols do not compare."""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from iaml.similarity import Window, structural_similarity

Protocol = Literal[
    "rgb_u8", "retinexformer", "retinexformer_gtmean", "cidnet", "cidnet_gtmean", "basicsr_y", "skimage_default"
]


@torch.no_grad()
def score(prediction: Tensor, clean: Tensor, protocol: Protocol = "rgb_u8") -> dict[str, Tensor]:
    """PSNR in dB and SSIM of each prediction against its clean image.

    Protocols (SSIM has a Gaussian window and is averaged over the channels, unless said otherwise):
        rgb_u8: both images as they would be saved, in 8 bits; PSNR over all pixels and channels, `inf` for
            equal images. Computed in float64.
        retinexformer: PSNR of the prediction before it is rounded, in float32, 100 for equal images; SSIM as
            rgb_u8.
        retinexformer_gtmean: as retinexformer, of the prediction scaled to the clean image's mean brightness. Red
            and blue change places in that brightness, as they do in the published scores.
        cidnet: the prediction truncated to 8 bits; PSNR in float32, about 128 for equal images; SSIM as
            rgb_u8.
        cidnet_gtmean: as cidnet, of the truncated prediction scaled to the clean image's mean brightness.
        basicsr_y: as rgb_u8, of the luma alone, whose range of 16 to 235 is scored as if it were 0 to 255.
        skimage_default: PSNR as rgb_u8; SSIM with a uniform window, as scikit-image computes it by default.

    The two `_gtmean` protocols look at the clean image before they score: their numbers are no measure of how well
    the brightness was found. A black prediction has no brightness to scale and stays black; the published
    programs divide by zero there.

    Args:
        prediction: (B, 3, H, W), float, RGB in [0, 1]; values outside are clamped. H and W at least 11.
        clean: as `prediction`: same shape, same device; levels of an 8-bit image divided by 255.
        protocol: how to score.

    Returns:
        `{"psnr": (B,), "ssim": (B,)}`, float64. A NaN in an image makes its scores NaN.

    Raises:
        ValueError: for an unknown protocol, or shapes or dtypes other than those above.
    """
    _check(prediction, clean)
    psnr, ssim = _psnr_and_ssim(prediction, clean, protocol)
    return {"psnr": psnr.double(), "ssim": ssim}


def eight_bit_levels(image: Tensor) -> Tensor:
    """The levels 0 to 255 that an image in [0, 1] takes when it is saved: clamped, rounded half to even.

    Args:
        image: any shape, float.

    Returns:
        Same shape, float64, whole numbers (NaN stays NaN).
    """
    return (image.double().clamp(0, 1) * 255).round()


def _psnr_and_ssim(prediction: Tensor, clean: Tensor, protocol: Protocol) -> tuple[Tensor, Tensor]:
    rounded, clean_levels = eight_bit_levels(prediction), eight_bit_levels(clean)
    match protocol:
        case "rgb_u8":
            return _psnr(rounded, clean_levels), _ssim(rounded, clean_levels)
        case "retinexformer":
            return _psnr_of_floats(prediction, clean), _ssim(rounded, clean_levels)
        case "retinexformer_gtmean":
            scaled = _with_mean_of(clean.float(), prediction.float().clamp(0, 1), gray=_gray_of_floats, white=1)
            return _psnr_of_floats(scaled, clean), _ssim(eight_bit_levels(scaled), clean_levels)
        case "cidnet":
            truncated = _truncated_levels(prediction)
            return _psnr_with_ceiling(truncated, clean_levels), _ssim(truncated, clean_levels)
        case "cidnet_gtmean":
            scaled = _with_mean_of(clean_levels, _truncated_levels(prediction), gray=_gray_of_levels, white=255)
            return _psnr_with_ceiling(scaled, clean_levels), _ssim(scaled, clean_levels)
        case "basicsr_y":
            return _psnr(_luma(rounded), _luma(clean_levels)), _ssim(_luma(rounded), _luma(clean_levels))
        case "skimage_default":
            return _psnr(rounded, clean_levels), structural_similarity(
                rounded, clean_levels, data_range=255, window="uniform"
            )
        case _:
            raise ValueError(f"unknown protocol {protocol!r}: choose from {', '.join(get_args(Protocol))}")


def _psnr(a: Tensor, b: Tensor) -> Tensor:
    """Of levels (B, C, H, W), float64, to (B,): `inf` for equal images."""
    return 10 * torch.log10(255**2 / _mean_squared_error(a, b))


def _psnr_of_floats(prediction: Tensor, clean: Tensor) -> Tensor:
    """Of images (B, 3, H, W), clamped to [0, 1], in float32, to (B,): 100 for equal images."""
    mse = _mean_squared_error(prediction.float().clamp(0, 1), clean.float().clamp(0, 1))
    return torch.where(mse == 0, 100, 10 * torch.log10(1 / mse))


def _psnr_with_ceiling(a: Tensor, b: Tensor) -> Tensor:
    """Of levels (B, C, H, W), in float32, to (B,): 128.13 for equal images."""
    return 10 * torch.log10(255**2 / (_mean_squared_error(a.float(), b.float()) + 1e-8))


def _mean_squared_error(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().mean(dim=(1, 2, 3))


def _ssim(a: Tensor, b: Tensor, window: Window = "gaussian") -> Tensor:
    """Of levels (B, C, H, W), float64, to (B,)."""
    return structural_similarity(a, b, data_range=255, window=window)


def _truncated_levels(image: Tensor) -> Tensor:
    """The levels 0 to 255 of an image in [0, 1], clamped, rounded down: float64, whole numbers (NaN stays NaN).

    Multiplied in float32, where level / 255 times 255 gives back each of the 256 levels and never a little
    less, which would lose a whole level. Not cast to integers, which would turn a NaN into a number.
    """
    return (image.float().clamp(0, 1) * 255).floor().double()


def _with_mean_of(clean: Tensor, prediction: Tensor, *, gray: Callable[[Tensor], Tensor], white: float) -> Tensor:
    """The prediction, (B, 3, H, W), scaled to the clean one's mean gray, clamped to [0, white]; black stays black."""
    mean_clean, mean_prediction = (gray(image).mean(dim=(1, 2)) for image in (clean, prediction))
    ratio = torch.where(mean_prediction == 0, 1, mean_clean / mean_prediction)
    return (prediction * ratio[:, None, None, None]).clamp(0, white)


def _gray_of_floats(image: Tensor) -> Tensor:
    """(B, 3, H, W) to (B, H, W), with the weights of red and blue exchanged: the published program's BGR2GRAY."""
    red, green, blue = image.unbind(dim=1)
    return 0.114 * red + 0.587 * green + 0.299 * blue


def _gray_of_levels(levels: Tensor) -> Tensor:
    """(B, 3, H, W) to (B, H, W), rounded to whole levels: OpenCV's RGB2GRAY, in fixed point with 15 bits."""
    red, green, blue = levels.unbind(dim=1)
    return ((9798 * red + 19235 * green + 3735 * blue) / 2**15 + 0.5).floor()


def _luma(levels: Tensor) -> Tensor:
    """Y of BT.601, studio range: levels (B, 3, H, W) to (B, 1, H, W) from 16 to 235, not rounded."""
    red, green, blue = levels.unbind(dim=1)
    return (16 + (65.481 * red + 128.553 * green + 24.966 * blue) / 255)[:, None]


def _check(prediction: Tensor, clean: Tensor) -> None:
    if prediction.shape != clean.shape:
        raise ValueError(
            f"the prediction is {tuple(prediction.shape)} and the clean image {tuple(clean.shape)}: "
            "scores compare images of one shape, and nothing is resized"
        )
    if prediction.ndim != 4 or prediction.shape[1] != 3:
        raise ValueError(f"scores need (B, 3, H, W) images, not {tuple(prediction.shape)}")
    for name, image in (("prediction", prediction), ("clean image", clean)):
        if not image.is_floating_point():
            raise ValueError(f"the {name} is {image.dtype}: scores need float images in [0, 1]")

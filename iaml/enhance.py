"""Inference on images of any size."""

import torch
from torch import Tensor
from torch.nn import functional as F

from iaml.network import STRIDE, AutoEncoder


@torch.inference_mode()
def enhance(network: AutoEncoder, low: Tensor) -> Tensor:
    """Enhance images of any size: padded by reflection to multiples of 32, run, cropped back.

    Args:
        network: in evaluation mode, on the device of ``low``.
        low: RGB in [0, 1], float32, shape (B, 3, H, W).

    Returns:
        Float32 tensor of the same shape in [0, 1].
    """
    height, width = low.shape[-2:]
    below, right = -height % STRIDE, -width % STRIDE
    # reflection needs more pixels than it adds; smaller images repeat their edge
    mode = "reflect" if below < height and right < width else "replicate"
    padded = F.pad(low, (0, right, 0, below), mode=mode)
    return network(padded)[..., :height, :width]  # type: ignore[no-any-return]

"""Inference on images of any size."""

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from iaml.network import STRIDE, AutoEncoder
from iaml.precision import Precision, autocast


@torch.inference_mode()
def enhance(
    network: AutoEncoder, low: Tensor, *, tile: int | None = None, overlap: int = 128, precision: Precision = "auto"
) -> Tensor:
    """Enhance images of any size: padded by reflection to multiples of 32, run, cropped back.

    Memory grows with the image unless `tile` bounds it: larger images are then enhanced one tile at a time,
    and the tiles are blended where they overlap. The network's attention pools over a tile instead of the
    whole image, so that the result differs slightly from the one without tiles.

    Args:
        network: in evaluation mode, on the device of ``low``.
        low: RGB in [0, 1], float32, shape (B, 3, H, W).
        tile: the most rows and columns that the network sees at once, a multiple of 32; None: the whole image.
        overlap: the least that neighbouring tiles share, in pixels, from 0 to ``tile`` - 32.
        precision: of the network's arithmetic. ``auto`` is bf16 where the processor multiplies it fast, which stays
            within 1/255 of float32; float32 gives all machines the same image to rounding.

    Returns:
        Float32 tensor of the same shape in [0, 1].

    Raises:
        ValueError: for other values of ``tile`` or ``overlap``.
    """
    with autocast(low.device, precision):
        return _enhance(network, low, tile, overlap)


def _enhance(network: AutoEncoder, low: Tensor, tile: int | None, overlap: int) -> Tensor:
    if tile is None:
        return _enhance_whole(network, low)
    if tile <= 0 or tile % STRIDE:
        raise ValueError(f"tile must be a positive multiple of {STRIDE}, not {tile}")
    if not 0 <= overlap <= tile - STRIDE:
        raise ValueError(f"overlap must be from 0 to tile - {STRIDE} = {tile - STRIDE}, not {overlap}")
    if max(low.shape[-2:]) <= tile:
        return _enhance_whole(network, low)
    return _enhance_in_tiles(network, low, tile, overlap)


def _enhance_whole(network: AutoEncoder, low: Tensor) -> Tensor:
    height, width = low.shape[-2:]
    below, right = -height % STRIDE, -width % STRIDE
    # reflection needs more pixels than it adds; smaller images repeat their edge
    mode = "reflect" if below < height and right < width else "replicate"
    padded = F.pad(low, (0, right, 0, below), mode=mode)
    enhanced: Tensor = network(padded.contiguous(memory_format=torch.channels_last))  # the fast layout
    return enhanced[..., :height, :width].float()


def _enhance_in_tiles(network: AutoEncoder, low: Tensor, tile: int, overlap: int) -> Tensor:
    enhanced = torch.zeros_like(low)
    for rows, row_weights in _spans(low.shape[-2], tile, overlap):
        for columns, column_weights in _spans(low.shape[-1], tile, overlap):
            weights = (row_weights[:, None] * column_weights).to(low)
            enhanced[..., rows, columns] += weights * _enhance_whole(network, low[..., rows, columns])
    return enhanced.clamp_(0, 1)  # the weights sum to 1 only to rounding


def _spans(size: int, tile: int, overlap: int) -> list[tuple[slice, Tensor]]:
    """Where the tiles lie along an axis of ``size`` pixels, and how much each counts at its pixels.

    Tiles start at multiples of 32, evenly spread, so that the network's strides meet the same pixels as without
    tiles. Weights rise and fall linearly over the overlaps and sum to 1 at each pixel.
    """
    starts = [0]
    if size > tile:
        last = math.ceil((size - tile) / STRIDE)  # in strides, as the step is
        gaps = math.ceil(last / ((tile - overlap) // STRIDE))
        starts = [gap * last // gaps * STRIDE for gap in range(gaps + 1)]
    spans = [slice(start, min(start + tile, size)) for start in starts]
    centres = torch.arange(size, dtype=torch.float64) + 0.5
    weights = torch.ones(len(spans), size, dtype=torch.float64)
    for i, (before, after) in enumerate(pairwise(spans)):
        rise = ((centres - after.start) / (before.stop - after.start)).clamp(0, 1)
        weights[i] *= 1 - rise
        weights[i + 1] *= rise
    weights /= weights.sum(dim=0)  # not 1 where more than two tiles overlap
    return [(span, weights[i, span]) for i, span in enumerate(spans)]

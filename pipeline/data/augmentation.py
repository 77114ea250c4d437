"""Crops, flips and quarter turns: drawn for each visit of a sample, the same on every layout of workers."""

import numpy as np
from numpy.typing import NDArray

from pipeline.data.order import SampleRefs

Bits = NDArray[np.uint64]
TURNS = 8  # of a square: mirrored or not, by four quarters


def uniform_draws(seed: int, refs: SampleRefs, count: int) -> NDArray[np.float64]:
    """``count`` uniform numbers in [0, 1) for each visit, [..., count]: a function of (seed, visit) alone."""
    pass_ = refs.epoch.astype(np.uint64) << np.uint64(16) | refs.dataset.astype(np.uint64)
    place = refs.shard.astype(np.uint64) << np.uint64(32) | refs.sample.astype(np.uint64)
    state = _mix(_mix(np.uint64(seed), pass_), place)
    numbers = _mix(state[..., None], np.arange(count, dtype=np.uint64))
    return (numbers >> np.uint64(11)).astype(np.float64) * 2.0**-53


def reflect_pad(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """The image, [height, width, 3], reflected at its right and lower edges until it holds a square of ``side``."""
    height, width, _ = image.shape
    missing = [(0, max(0, side - length)) for length in (height, width)]
    return np.pad(image, [*missing, (0, 0)], mode="reflect")


def copy_turned(image: NDArray[np.uint8], turn: int, out: NDArray[np.uint8]) -> None:
    """Write the square image, [S, S, 3], to ``out`` in the one of its 8 positions that ``turn`` names."""
    if turn & 1:
        image = image[:, ::-1]
    if turn & 2:
        image = image[::-1]
    if turn & 4:
        image = image.swapaxes(0, 1)
    if turn & 5:  # NumPy would copy three bytes at a time
        for channel in range(3):
            out[..., channel] = image[..., channel]
    else:
        out[...] = image


def _mix(state: Bits | np.uint64, value: Bits) -> Bits:
    """SplitMix64 (Steele, Lea, Flood 2014): the state moved on by ``value``, its bits well mixed."""
    state = state + (value + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))

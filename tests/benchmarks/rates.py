"""What the machine itself can do: convolutions and copies, as a step has them."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MEASURED_S = 0.5
# channels, side of the images, images: the network's levels at full width, crops of 256 pixels, and narrower ones
LAYERS = ((64, 128, 4), (128, 64, 4), (256, 32, 8), (512, 16, 16))
COPIED_MB = 256


class Rates(NamedTuple):
    """The best of several layers' convolutions, 3x3, forward, FLOP/s; bytes copied in a second."""

    float32: float
    bf16: float
    copy: float

    def __str__(self) -> str:
        return (
            f"convolutions at up to {self.float32 / 1e9:,.0f} GFLOP/s in float32 and {self.bf16 / 1e9:,.0f} in bf16, "
            f"copying at {self.copy / 1e9:.0f} GB/s"
        )


def measure(threads: int) -> Rates:
    """Measure them on the GPU, or on so many threads of the CPU."""
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    float32, bf16 = (
        max(convolution_rate(*layer, torch.device(device), dtype) for layer in LAYERS)
        for dtype in (torch.float32, torch.bfloat16)
    )
    source = torch.ones(COPIED_MB * 1_000_000, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Rates(float32, bf16, COPIED_MB * 1e6 / seconds_of(lambda: target.copy_(source)))


def convolution_rate(channels: int, side: int, images: int, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one layer."""
    if device.type == "cuda":
        images *= 16  # enough to fill it
    layout = torch.channels_last
    x = torch.rand(images, channels, side, side, device=device, dtype=dtype).contiguous(memory_format=layout)
    weight = torch.rand(channels, channels, 3, 3, device=device, dtype=dtype).contiguous(memory_format=layout)
    flops = 2 * images * side * side * channels**2 * 9
    return flops / seconds_of(lambda: F.conv2d(x, weight, padding=1))


def seconds_of(function: Callable[[], Tensor]) -> float:
    """How long a call takes, after a few."""
    repeats = 3
    while True:
        synchronize()
        began = time.perf_counter()
        for _ in range(repeats):
            function()
        synchronize()
        passed = time.perf_counter() - began
        if passed > MEASURED_S:
            return passed / repeats
        repeats *= 2


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()

"""What the networks compute in: float32, or bfloat16 under autocast where processors multiply it fast."""

from contextlib import AbstractContextManager
from typing import Literal

import torch

Precision = Literal["auto", "float32", "bf16"]
FAST_BF16 = ("amx_bf16", "avx512_bf16", "bf16")  # what torch calls a CPU's instructions for it
AMPERE = (8, 0)  # the first GPUs that have them


def multiplies_bf16_fast(device: torch.device) -> bool:
    """Whether bfloat16 is faster than float32 there."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= AMPERE
    found = torch.cpu.get_capabilities()
    return any(found.get(name) for name in FAST_BF16)


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[None]:
    """Computes in ``precision`` on ``device``; ``auto`` is bf16 where it is fast, else float32."""
    is_bf16 = precision == "bf16" or (precision == "auto" and multiplies_bf16_fast(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=is_bf16)

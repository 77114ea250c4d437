"""Why an image can't be scored: for what it is, which is final, or for the state of the machine, which may pass."""

import re
from typing import Literal

import torch

FAILURES = (ValueError, RuntimeError, OSError, MemoryError)  # of one image
DEVICE = re.compile("CUDA|CUDNN|CUBLAS|NVIDIA|HIP error", re.IGNORECASE)
NO_MEMORY = re.compile("out of memory|can't allocate memory|not enough memory|_ALLOC_FAILED", re.IGNORECASE)


class MachineError(OSError):
    """Scoring failed for a reason of the machine: short memory, a lost device, storage out of reach, dead actors."""


def cause_of(error: Exception) -> Literal["image", "memory", "machine"]:
    """What an error of one image is due to.

    ``image``: unreadable, too small: it fails on any machine. ``memory``: may pass once some has been freed.
    ``machine``: a device that failed, after which its process can't go on, or storage out of reach.
    """
    text = str(error) if isinstance(error, RuntimeError) else ""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or NO_MEMORY.search(text):
        return "memory"
    is_storage = isinstance(error, OSError) or isinstance(error.__cause__, OSError)
    if isinstance(error, torch.AcceleratorError) or DEVICE.search(text) or is_storage:
        return "machine"
    return "image"

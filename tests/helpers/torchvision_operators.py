"""Makes torchvision importable beside a CPU build of torch."""

import functools
import importlib.util
from pathlib import Path

import torch


def let_torchvision_import() -> None:
    """Declare the two operators without which ``import torchvision`` fails beside a CPU build of torch.

    There is no CPU wheel of torchvision for Linux, and the CUDA wheel's extension does not load there. Where the
    extension does load, nothing is declared.
    """
    torchvision = importlib.util.find_spec("torchvision")
    if torchvision is None or torchvision.origin is None or hasattr(torch.ops.torchvision, "nms"):
        return
    try:
        for extension in Path(torchvision.origin).parent.glob("_C.*"):
            torch.ops.load_library(extension)
    except OSError:
        _declare_operators()


@functools.cache  # keeps the library alive: its declarations end with it
def _declare_operators() -> torch.library.Library:
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library

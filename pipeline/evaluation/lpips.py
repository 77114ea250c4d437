"""LPIPS v0.1, whose backbone is a file with a known checksum, or there is no score.

The `lpips` package ships its linear heads only, and would download the backbone unchecked or, told not to, leave it
random. Here the backbone is found first (`find_backbone`), then loaded strictly into it (`Lpips`).
"""

import functools
import importlib
import importlib.util
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pipeline.evaluation.lpips_weights import Backbone, BackboneWeights, LpipsUnavailable

SMALLEST_SIDES: dict[Backbone, int] = {"alex": 31, "vgg": 16}  # below these, a pooling layer is left without pixels


class Lpips:
    """Perceptual distance between images: 0 for equal images, larger for less alike.

    Where PyTorch lets a GPU's convolutions run in TF32, its default, expect values that differ from the CPU's
    in the fourth decimal.

    Attributes:
        backbone: "alex" or "vgg".
        source: the path or URL that the backbone's weights came from.
        sha256: the checksum of the file there.
    """

    def __init__(self, weights: BackboneWeights, device: torch.device | str = "cpu") -> None:
        """Build the metric on `device`.

        Raises:
            ValueError: if the weights do not fit the backbone.
            LpipsUnavailable: if the `lpips` package cannot be imported.
        """
        self.backbone = weights.backbone
        self.source = weights.source
        self.sha256 = weights.sha256
        self._device = torch.device(device)
        self._model = _build(weights).to(self._device)

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        """LPIPS of whole images, none resized or clamped.

        Args:
            prediction: (B, 3, H, W), float, RGB in [0, 1]; H and W at least 31 for alex, 16 for vgg.
            target: as `prediction`, of the same shape.

        Returns:
            (B,), float32, on the metric's device.

        Raises:
            ValueError: for other shapes.
        """
        self._check(prediction, target)
        a, b = (image.to(self._device, torch.float32) * 2 - 1 for image in (prediction, target))
        with torch.no_grad(), torch.autocast(self._device.type, enabled=False):
            return _distance(self._model, a, b)

    def _check(self, prediction: Tensor, target: Tensor) -> None:
        smallest_side = SMALLEST_SIDES[self.backbone]
        if prediction.shape != target.shape or prediction.ndim != 4 or prediction.shape[1] != 3:
            raise ValueError(
                f"LPIPS compares two (B, 3, H, W) batches of one shape, not {tuple(prediction.shape)} "
                f"and {tuple(target.shape)}"
            )
        if min(prediction.shape[-2:]) < smallest_side:
            raise ValueError(
                f"LPIPS with {self.backbone} needs images of at least {smallest_side}x{smallest_side}, "
                f"not {prediction.shape[-2]}x{prediction.shape[-1]}"
            )


def _build(weights: BackboneWeights) -> torch.nn.Module:
    lpips = _import_lpips()
    # Constructing draws random weights, all replaced below: the caller's random state must not notice.
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # lpips calls torchvision in a deprecated way
        model: torch.nn.Module = lpips.LPIPS(net=weights.backbone, version="0.1", pnet_rand=True, verbose=False)
    trunk = model.get_submodule("net")
    # lpips cuts `features` into slices but keeps the positions: net.slice2.3.weight is features.3.weight.
    torchvision_name = {name: "features." + name.partition(".")[2] for name in trunk.state_dict()}
    try:
        trunk.load_state_dict({name: weights.state[key] for name, key in torchvision_name.items()}, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{weights.source} does not fit the backbone {weights.backbone}: {error}") from error
    return model.eval().requires_grad_(False)


def _distance(model: Any, a: Tensor, b: Tensor) -> Tensor:
    """What `model(a, b)` computes, (B,), layer by layer.

    The model itself would keep every layer of both images until the end: for vgg at 1280x720, 2.0 GiB, not 0.7.
    """
    a, b = model.scaling_layer(a), model.scaling_layer(b)
    total = a.new_zeros(len(a))
    for number, head in enumerate(model.lins, start=1):
        layers = getattr(model.net, f"slice{number}")
        a, b = layers(a), layers(b)
        difference = _of_unit_length(a).sub_(_of_unit_length(b)).square_()
        total += head(difference).mean(dim=(1, 2, 3))
    return total


def _of_unit_length(features: Tensor) -> Tensor:
    """Each pixel's feature vector divided by its length; (B, C, H, W)."""
    length: Tensor = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    return features / (length + 1e-10)


@functools.cache
def _import_lpips() -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            let_torchvision_import()
            return importlib.import_module("lpips")
    except ImportError as error:
        raise LpipsUnavailable(f"the package lpips cannot be imported ({error}): pip install lpips==0.1.4") from error


def let_torchvision_import() -> None:
    """Declare the two operators without which `import torchvision` fails beside a CPU build of torch.

    There is no CPU wheel of torchvision for Linux, and the CUDA wheel's extension does not load there. LPIPS
    uses none of its operators. Where the extension does load, nothing is declared.
    """
    torchvision = importlib.util.find_spec("torchvision")
    if torchvision is None or torchvision.origin is None or hasattr(torch.ops.torchvision, "nms"):
        return
    try:
        for extension in Path(torchvision.origin).parent.glob("_C.*"):
            torch.ops.load_library(extension)  # type: ignore[no-untyped-call]
    except OSError:
        _declare_torchvision_operators()


@functools.cache  # keeps the library alive: its declarations end with it
def _declare_torchvision_operators() -> torch.library.Library:
    library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for name in ("nms", "qnms"):
        schema = f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        library.define(schema)  # type: ignore[no-untyped-call]
    return library

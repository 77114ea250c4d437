"""What all tests share: one Ray cluster for the whole session."""

import shutil
import tempfile
from collections.abc import Iterator

import pytest
from commands import Command, RayHead


@pytest.fixture(scope="session")
def ray_head() -> Iterator[RayHead]:
    """The session's Ray cluster."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # sockets allow only short paths
    head = RayHead(folder)
    yield head
    head.stop()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def command(ray_head: RayHead) -> Command:
    """Runs the project's commands on the session's Ray cluster."""
    return Command(ray_head)

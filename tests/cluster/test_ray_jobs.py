"""The README's jobs on a Ray cluster in namespaces of its own, which is reached by the network alone."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import ROOT, copy_code, options

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="needs root, for namespaces"),
]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
DASHBOARD = "http://127.0.0.1:8265"


class Head:
    """A Ray head with a network, processes and mounts of its own."""

    def __init__(self, folder: str) -> None:
        self._environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        command = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command += ["sh", "-c", 'ip link set lo up && "$@" & read -r _', "sh"]  # ends with its input
        command += [*RAY, "start", "--head", "--block", "--num-cpus=8", f"--temp-dir={folder}"]
        self._process = subprocess.Popen(command, env=self._environment, stdin=subprocess.PIPE)
        deadline = time.monotonic() + 60
        while self.run(Path("/"), *RAY, "job", "list", f"--address={DASHBOARD}").returncode != 0:
            assert time.monotonic() < deadline, "Ray's head does not answer"

    def run(self, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
        inside = ["nsenter", f"--net=/proc/{self._process.pid}/ns/net", *command]
        return subprocess.run(inside, cwd=folder, env=self._environment, capture_output=True, text=True, timeout=500)

    def stop(self) -> None:
        self._process.stdin.close()
        self._process.wait(10)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    made = Head(folder)
    yield made
    made.stop()
    shutil.rmtree(folder)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    copy_code(tmp_path / "clone")
    shutil.copytree(ROOT / "cluster", tmp_path / "clone/cluster")
    shutil.copy(ROOT / "requirements.lock", tmp_path / "clone")
    return tmp_path / "clone"


def test_training_as_a_job(head, shards, clone, tmp_path):
    changes = {"--data.url": shards, "--run.root": str(tmp_path), "--run.name": "job", "--run.workers": "2"}
    submit = [*RAY, "job", "submit", f"--address={DASHBOARD}", "--working-dir", ".", "--"]
    done = head.run(clone, *submit, "python", "pipeline/train.py", *options(**changes))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^student +\d+\.\d\d", done.stdout, re.MULTILINE)
    assert (tmp_path / "job/checkpoint-00000004/student.safetensors").exists()


def test_search_as_a_job(head, shards, clone, tmp_path):
    changes = {"--data.url": shards, "--run.root": str(tmp_path), "--run.name": "job"}
    changes |= {"--search.trials": "2", "--search.top": "1", "--search.seeds": "2"}
    submit = [sys.executable, "cluster/ray/submit.py", f"--address={DASHBOARD}", "--"]
    done = head.run(clone, *submit, "python", "tune/search.py", *options(**changes))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^2 trials: ", done.stdout, re.MULTILINE)
    assert (tmp_path / "job-search/report.html").exists()


def test_a_job_that_fails_has_its_own_status(head, shards, clone, tmp_path):
    submit = [sys.executable, "cluster/ray/submit.py", f"--address={DASHBOARD}", "--"]
    changes = {"--data.url": "/no/such/data", "--run.root": str(tmp_path), "--run.name": "job"}
    done = head.run(clone, *submit, "python", "pipeline/train.py", *options(**changes))
    assert done.returncode == 2 and "/no/such/data/manifest.parquet: there is no manifest" in done.stdout

"""A Ray cluster for tests, and the project's commands as a user runs them."""

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
from terminals import IN_FOREGROUND

# a token of the tests' own, whatever the machine's Ray is set up to ask for; Ray reads it as it is imported
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
os.environ |= {"RAY_metrics_report_interval_ms": "1000"}  # a tenth of the usual, since tests wait for it
ROOT = Path(__file__).parents[2]
CPUS = 8  # more than the machine may have: the tests' workers and actors share its cores
START_S = 60
SMALL = {
    "--config": "demo",
    "--data.crop": "32",
    "--data.cache-gib": "0",
    "--network.width": "0.0625",
    "--run.workers": "1",
    "--run.cpus-per-worker": "1",
    "--train.steps": "4",
    "--train.log-every": "1",
    "--checkpoint.every": "2",
    "--optimizer.warmup-steps": "0",
    "--evaluation.grid-images": "2",
    "--evaluation.lpips": "none",
}
WEIGHTS = ("student.safetensors", "teacher.safetensors", "optimizer.safetensors", "state.json")


class RayHead:
    """A Ray head of its own: ``address`` for drivers, ``dashboard`` for jobs, ``metrics`` for Prometheus.

    Its ``environment`` is its workers' too.
    """

    def __init__(self, folder: str, environment: dict[str, str]) -> None:
        port, dashboard, agent, metrics = (_free_port() for _ in range(4))
        self.address = f"127.0.0.1:{port}"
        self.dashboard = f"http://127.0.0.1:{dashboard}"
        self.metrics = f"http://127.0.0.1:{metrics}/metrics"
        options = {"port": port, "dashboard-port": dashboard, "num-cpus": CPUS, "temp-dir": folder}
        options["dashboard-agent-listen-port"] = agent  # jobs need it, and its default may be another Ray's
        options["metrics-export-port"] = metrics
        self.environment = {
            **os.environ,
            **environment,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # `python` in a job is this one
            "OMP_NUM_THREADS": "1",  # rather than the CPUs that a worker takes, which are only counted
        }
        self._log = Path(folder, "head.log")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--node-ip-address=127.0.0.1"]
            + [f"--{name}={value}" for name, value in options.items()],
            stdout=self._log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=self.environment,
        )
        for wanted in (port, dashboard):
            self._wait_for(wanted)

    def processes(self) -> list[psutil.Process]:
        """All that run on the head now."""
        return psutil.Process(self._process.pid).children(recursive=True)

    def stop(self) -> None:
        """End the head and all that it started."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)

    def add_node(
        self, address: str = "127.0.0.1", environment: dict[str, str] | None = None, **options: int | str
    ) -> subprocess.Popen[bytes]:
        """Start another node in a process group of its own, with more of ``ray start``'s options, as ``num_gpus``."""
        given = {"address": self.address, "node-ip-address": address, "num-cpus": CPUS} | {
            name.replace("_", "-"): value for name, value in options.items()
        }
        return subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
            + [f"--{name}={value}" for name, value in given.items()],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env=self.environment | (environment or {}),
        )

    def _wait_for(self, port: int) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return
            assert self._process.poll() is None, f"ray start ended: {self._log.read_text()}"
            time.sleep(0.2)
        raise TimeoutError(f"nothing listens on port {port} after {START_S} s: {self._log.read_text()}")


class Command:
    """A command of the project, run from the root of the repository as a user would."""

    def __init__(self, head: RayHead) -> None:
        self.head = head
        self.environment = {
            **head.environment,
            "RAY_ADDRESS": head.address,
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process for each run, which takes seconds to start
            "PYTHONUNBUFFERED": "1",
        }

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start ``python ARGUMENTS`` in the foreground; its output, errors included, is on ``stdout``."""
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **IN_FOREGROUND,
        )

    def __call__(self, *arguments: str, status: int = 0, timeout_s: float = 300) -> str:
        """Run to the end, expect ``status``, and return the output."""
        process = self.start(*arguments)
        try:
            output = process.communicate(timeout=timeout_s)[0]
        finally:
            process.kill()
        assert process.returncode == status, output
        return output

    def without_cluster(self) -> "Command":
        """The same as where no cluster is named, so that commands start Ray by themselves."""
        alone = Command(self.head)
        del alone.environment["RAY_ADDRESS"], alone.environment["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"]
        return alone

    def submit(self, folder: Path, *arguments: str, timeout_s: float = 500) -> str:
        """Submit ``python ARGUMENTS`` as a job from a clone in ``folder``, wait for its end, and return the output."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", self.head.dashboard]
        command += ["--working-dir", ".", "--", "python", *arguments]
        done = subprocess.run(
            command, cwd=folder, env=self.environment, capture_output=True, text=True, timeout=timeout_s
        )
        output = without_colours(done.stdout + done.stderr)
        assert done.returncode == 0, output
        return output


def copy_code(folder: Path) -> None:
    """A clone of the code in ``folder``, without what is beside it."""
    for package in ("iaml", "pipeline", "tune"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))


def options(**changes: str) -> list[str]:
    """Options of a training of seconds, with changes."""
    return [part for option in (SMALL | changes).items() for part in option]


def without_colours(text: str) -> str:
    """The text without terminal escapes, which Ray puts before the lines of its workers."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

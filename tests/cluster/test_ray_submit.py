"""Jobs on a Ray cluster: what is refused before anything is sent, and how the command's end reaches the client."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from unittest.mock import Mock

import pytest
from commands import ROOT, Command, RayHead
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

VERSIONS = {"ray": "2.60.0", "python": "3.11.9"}


@pytest.fixture(scope="module")
def submit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ray_submit", ROOT / "cluster/ray/submit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("command", "refused"),
    [
        ("python pipeline/train.py --config lol_v1 --data.url shards", "--data.url shards"),
        ("python pipeline/train.py --config lol_v1 --run.root=./runs", "--run.root ./runs"),
        ("python pipeline/train.py --data.extra_urls [s3://bucket/a,b]", "--data.extra_urls b"),
        ("python pipeline/evaluate.py --compare /runs/a runs/b --split test", "--compare runs/b"),
    ],
)
def test_places_that_would_be_the_jobs_own_are_refused(submit: ModuleType, command: str, refused: str) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(refused)}: a job has a folder of its own"):
        submit.check_places(command.split())


def test_places_that_all_nodes_may_see_are_not(submit: ModuleType) -> None:
    places = "--data.url s3://bucket/a_b --run.root=/runs --data.extra-urls [s3://a,/b] --compare ~/a file:///b"
    submit.check_places(["python", "pipeline/train.py", "--config", "lol_v1", *places.split(), "--run.name", "a"])
    submit.check_places(["python", "pipeline/pack.py", "--source", "/my set, [clean] # 1", "--out", "s3://bucket/a b"])


def test_an_upgrade_of_ray_that_walks_the_working_directory_otherwise(submit: ModuleType, tmp_path: Path) -> None:
    (tmp_path / ".gitignore").write_text("runs/\n")
    for name in ("pipeline/train.py", "runs/weights"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    found = {path.relative_to(tmp_path).as_posix() for path in submit.files_to_upload(tmp_path)}
    assert found - {".gitignore"} == {"pipeline/train.py"}


def test_an_upgrade_of_ray_whose_client_asks_its_dashboard_otherwise(submit: ModuleType, ray_head: RayHead) -> None:
    client = submit.JobSubmissionClient(ray_head.dashboard)
    assert submit.ask_dashboard(client, "/api/version").json()["ray_version"] == version("ray")


def test_what_is_not_code_is_not_uploaded(submit: ModuleType, tmp_path: Path) -> None:
    for name in (".git", ".venv", "ignored", "shards", "pipeline"):
        (tmp_path / name).mkdir()
        with (tmp_path / name / "file").open("wb") as file:
            file.truncate(30_000_000)
    (tmp_path / ".gitignore").write_text("/ignored/\n")
    with pytest.raises(ValueError) as error:
        submit.check_size(tmp_path)
    assert "60 MB would be uploaded" in str(error.value)
    assert sorted(line.split()[-1] for line in str(error.value).splitlines()[1:3]) == ["pipeline", "shards"]
    (tmp_path / ".rayignore").write_text("/shards/\n/pipeline/\n")
    submit.check_size(tmp_path)
    submit.check_size(ROOT)


@pytest.mark.parametrize(
    ("locked", "here", "there"),
    [
        ({}, VERSIONS, {"ray": "2.59.0"}),
        ({}, VERSIONS, {"ray": "2.60.0", "python": "3.12.9"}),
        ({"ray": "2.59.0"}, VERSIONS, VERSIONS),
    ],
)
def test_another_ray_or_python_is_refused_with_all_versions(
    submit: ModuleType, locked: dict[str, str], here: dict[str, str], there: dict[str, str]
) -> None:
    with pytest.raises(
        ValueError, match=r"^versions differ, nothing was uploaded:\n +requirements.lock +here +cluster\n"
    ):
        submit.check_versions(locked, here, there)


def test_other_packages_than_those_of_the_lock_file_are_only_said(
    submit: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    submit.check_versions(VERSIONS | {"torch": "2.13.0", "numpy": "2"}, VERSIONS | {"torch": "2.12.0"}, VERSIONS)
    assert capsys.readouterr().err == "here, other versions than in requirements.lock: torch 2.12.0 instead of 2.13.0\n"
    submit.check_versions(submit.locked(), submit.installed(), {"ray": "2.60.0", "python": "3.11.99"})
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--no-wait -- python pipeline/train.py --data.url x", "error: --data.url x: a job has a folder of its own"),
        ("--address http://127.0.0.1:1 -- true", "error: Failed to connect to Ray at address: http://127.0.0.1:1"),
    ],
)
def test_mistakes_end_with_status_2(
    submit: ModuleType, options: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # which the command sets
    monkeypatch.setattr(sys, "argv", ["submit.py", *options.split()])
    assert submit.main() == 2
    assert capsys.readouterr().err.startswith(message)


def test_the_log_and_the_commands_status_reach_the_client(command: Command) -> None:
    script = "import os, sys; print('commit', os.environ['IAML_REVISION']); sys.exit(75)"
    done = subprocess.run(
        arguments("--address", command.head.dashboard, command=["python", "-c", script]),
        cwd="/", env=command.environment | {"RAY_ADDRESS": "127.0.0.1:1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 75, done.stdout + done.stderr
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert f"\ncommit {git}" in done.stdout and done.stderr == "the job has failed: status 75\n"
    assert "RAY_AUTH_TOKEN" not in done.stdout and os.environ["RAY_AUTH_TOKEN"] not in done.stdout + done.stderr


def test_a_log_whose_connection_breaks_is_shown_whole_and_once(
    submit: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(submit, "PAUSE_S", 0.0)
    connections = iter([["one\n", "tw", None], [None], ["one\ntwo\n", "three"]])

    class Client:
        async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
            for text in next(connections):
                if text is None:
                    raise RuntimeError("closed")
                yield text

        def get_job_status(self, job: str) -> JobStatus:
            return JobStatus.SUCCEEDED

    submit.follow(Client(), "job")
    assert capsys.readouterr().out == "one\ntwo\nthree"


@pytest.mark.parametrize(
    ("details", "status"),
    [
        ({"status": "SUCCEEDED", "driver_exit_code": 0}, 0),
        ({"status": "FAILED", "driver_exit_code": 3}, 3),
        ({"status": "STOPPED", "driver_exit_code": -15}, 143),
        ({"status": "FAILED", "message": "the environment could not be made"}, 1),
    ],
)
def test_the_exit_status_is_what_a_shell_would_give(
    submit: ModuleType, details: dict[str, object], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    client = Mock()
    client.get_job_info.return_value = JobDetails(type="SUBMISSION", entrypoint="", **details)
    assert submit.exit_status(client, "job") == status
    assert str(details.get("message", "")) in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_leaves_the_job_running_and_says_how_to_stop_it(command: Command) -> None:
    script = "import time; print('begun', flush=True); time.sleep(300)"
    client = subprocess.Popen(
        arguments(command=["python", "-c", script]),
        env=command.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    lines = iter(client.stdout.readline, "begun\n")
    (job,) = (line.split()[1] for line in lines if line.startswith("job "))
    client.send_signal(signal.SIGINT)
    _, errors = client.communicate(timeout=20)
    assert client.returncode == 130 and f"to stop it: ray job stop --address {command.head.dashboard} {job}" in errors
    jobs = JobSubmissionClient(command.head.dashboard)
    assert jobs.get_job_status(job) == JobStatus.RUNNING
    jobs.stop_job(job)


def arguments(*options: str, command: list[str]) -> list[str]:
    return [sys.executable, str(ROOT / "cluster/ray/submit.py"), *options, "--", *command]

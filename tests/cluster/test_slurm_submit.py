"""The Slurm job's script, as the submit command makes it; tests/cluster/test_slurm.py runs it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT

# the functions are called by their names on other nodes
SHELLCHECK = [Path(sys.executable).with_name("shellcheck"), "--shell=bash", "--exclude=SC2329"]
TRAIN = ["python", "pipeline/train.py", "--config", "lol_v1", "--data.url", "s3://bucket/a b"]


def submit(*options: str, command: list[str] = TRAIN, path: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "cluster/slurm/submit.py", *options, "--", *command],
        cwd=ROOT,
        env={**os.environ, "PATH": path or os.environ["PATH"]},
        capture_output=True,
        text=True,
    )


def printed(*options: str, command: list[str] = TRAIN) -> str:
    done = submit(*options, "--print", command=command)
    assert done.returncode == 0, done.stderr
    return done.stdout


def start_ray_node(folder: Path, job: str) -> subprocess.CompletedProcess[str]:
    """Run the part of the job's script that starts Ray on a node, with a Ray that ends at once."""
    (folder.parent / "ray").write_text("#!/bin/sh\n")
    (folder.parent / "ray").chmod(0o755)
    slurm = {"SLURM_JOB_ID": job, "SLURM_NODEID": "0", "SLURM_CPUS_ON_NODE": "1", "SLURM_LAUNCH_NODE_IPADDR": "n1"}
    path = f"{folder.parent}:{os.environ['PATH']}"
    script = "source <(sed -n '/^ray_node()/,/^}/p' cluster/slurm/job.sh); ray_node"
    return subprocess.run(
        ["bash", "-c", script],
        cwd=ROOT,
        env={"PATH": path, "RAY_FOLDER": str(folder), "PORT": "20000", "LOST": "76", **slurm},
        capture_output=True,
        text=True,
    )


def test_a_node_deletes_what_its_own_job_left_there_and_nothing_else(tmp_path):
    folder = tmp_path / "node"
    folder.mkdir()
    (folder / "notes").write_text("a user's")
    (folder / "job-12").touch()  # that of another job
    refused = start_ray_node(folder, "123")
    assert refused.returncode == 1 and "File exists" in refused.stderr
    assert {path.name for path in folder.iterdir()} == {"notes", "job-12"}
    started = start_ray_node(folder, "12")
    assert "Ray ended" in started.stdout and not folder.exists()


def header_of(script: str) -> list[str]:
    """Options of sbatch, in the order in which it reads them."""
    lines = script.splitlines()
    end = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return [line.removeprefix("#SBATCH --") for line in lines[:end] if line.startswith("#SBATCH --")]


def test_options_come_after_those_of_the_script_and_the_command_is_quoted():
    options = ["--nodes", "4", "--gpus-per-node", "8", "--cpus-per-node", "64", "--time", "12:00:00"]
    script = printed(*options, "--partition", "gpu", "--account", "dark", "--sbatch=--signal=B:USR1@600")
    header = header_of(script)
    assert {"requeue", "open-mode=append", f"chdir={ROOT}"} < set(header)
    assert {"nodes=4", "gpus-per-node=8", "cpus-per-task=64", "time=12:00:00", "partition=gpu"} < set(header)
    assert "account=dark" in header and header[-1] == "signal=B:USR1@600"
    assert header.index("signal=B:USR1@180") < header.index("signal=B:USR1@600")
    assert "\nset -- python pipeline/train.py --config lol_v1 --data.url 's3://bucket/a b' --run.workers 32\n" in script


@pytest.mark.parametrize(
    ("options", "command"),
    [
        (["--nodes", "2"], TRAIN),
        (["--gpus-per-node", "8"], [*TRAIN, "--run.workers=4"]),
        (["--gpus-per-node", "8"], ["python", "tune/search.py"]),
    ],
)
def test_workers_are_the_gpus_only_where_a_training_does_not_say_how_many(options, command):
    assert "--run.workers 8" not in printed(*options, command=command)


@pytest.mark.parametrize(
    ("options", "command", "message"),
    [
        (["--nodes", "0"], TRAIN, "argument --nodes: must be at least 1: 0"),
        (["--gpus", "8"], TRAIN, "unrecognized arguments: --gpus"),
        ([], [], "the following arguments are required: -- COMMAND"),
        ([], ["python", "train.py"], "train.py: there is no such script in"),
    ],
)
def test_mistakes_are_said_before_anything_is_queued(options, command, message):
    done = submit(*options, command=command)
    assert done.returncode == 2 and message in done.stderr


def test_without_slurm_it_says_where_to_run_it(tmp_path):
    done = submit("--output", str(tmp_path / "%j.log"), path=str(tmp_path))
    assert done.returncode == 2 and "there is no sbatch here; run this on a login node" in done.stderr


def test_scripts_pass_shellcheck(tmp_path):
    script = tmp_path / "job.sh"
    script.write_text(printed("--nodes", "2"))
    example = ROOT / "cluster/slurm/site.example.sh"
    checked = subprocess.run([*SHELLCHECK, script, example], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    script.write_text(script.read_text().replace('-- "$@"', "-- $@"))
    assert subprocess.run([*SHELLCHECK, script], capture_output=True).returncode == 1

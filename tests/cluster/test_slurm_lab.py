"""The Slurm cluster of the tests does what other tests expect of it."""

import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from s3 import S3Server
from slurm import ADDRESSES, Slurm

pytestmark = pytest.mark.slurm

# each start writes a line; the first is told of its end, puts the job back into the queue and so is ended
REQUEUED_WHEN_TOLD = """#!/bin/bash
trap 'echo told; kill $!; scontrol requeue "$SLURM_JOB_ID"' USR1
echo "start ${SLURM_RESTART_COUNT:-0}"
[ "$SLURM_RESTART_COUNT" ] && exit
sleep 600 &
wait
"""
DOWNLOAD = """
import botocore.session
client = botocore.session.get_session().create_client("s3")
print(client.get_object(Bucket="greetings", Key="one")["Body"].read().decode())
"""


def submit(slurm: Slurm, *arguments: str) -> str:
    return slurm.run("sbatch", "--parsable", "--open-mode=append", *arguments).stdout.strip()


def time_limit_nears(slurm: Slurm, job: str) -> None:
    slurm.wait(job, "PENDING", timeout_s=40)  # Slurm looks at time limits every 30 s


def user_signals(slurm: Slurm, job: str) -> None:
    slurm.run("scancel", "--batch", "--signal=USR1", job)


def urgent_job_comes(slurm: Slurm, job: str) -> None:
    slurm.wait(submit(slurm, "--nodes=2", "--exclusive", "--partition=urgent", "--wrap=true"), "COMPLETED")


def test_srun_runs_on_both_nodes_with_their_gpus(slurm):
    command = ("srun", "--nodes=2", "--gres=gpu:2", "sh", "-c", 'echo "$(uname -n) $SLURM_GPUS_ON_NODE"')
    assert sorted(slurm.run(*command).stdout.splitlines()) == ["n1 2", "n2 2"]


@pytest.mark.parametrize(
    ("happens", "options"),
    [
        (time_limit_nears, ["--time=1", "--signal=B:USR1@50"]),
        (user_signals, []),
        (urgent_job_comes, ["--signal=B:USR1"]),
    ],
)
def test_job_is_told_of_its_end_and_starts_again(
    slurm: Slurm, happens: Callable[[Slurm, str], None], options: list[str]
):
    script = slurm.shared / "requeued.sh"
    script.write_text(REQUEUED_WHEN_TOLD)
    job = submit(slurm, "--nodes=2", "--exclusive", *options, str(script))
    slurm.wait_for_output(job, "start 0")
    happens(slurm, job)
    assert slurm.wait(job, "COMPLETED")["Restarts"] == "1"
    lines = slurm.output(job).splitlines()
    assert [line for line in lines if not line.startswith("slurmstepd")] == ["start 0", "told", "start 1"]


def test_node_shows_what_runs_on_it_and_what_it_keeps(slurm):
    server = f"touch /tmp/mine /dev/shm/mine; {sys.executable} -u -m http.server 8000 --bind {ADDRESSES['n1']}"
    job = submit(slurm, "--nodelist=n1", f"--wrap={server}")
    slurm.wait_for_output(job, "Serving HTTP")
    assert any("http.server" in line for line in slurm.processes("n1"))
    assert slurm.listening("n1") == [(ADDRESSES["n1"], 8000)]
    assert slurm.files("n1") == ["/tmp/mine", "/dev/shm/mine"]
    assert not slurm.processes("n2") and not slurm.listening("n2") and not slurm.files("n2")
    slurm.run("scancel", job)
    slurm.wait_for_nodes(n1="idle")
    assert not slurm.processes("n1") and not slurm.listening("n1")
    assert slurm.files("n1") == ["/tmp/mine", "/dev/shm/mine"]


def test_node_that_loses_its_power_goes_down_and_comes_back_empty(slurm):
    slurm.run("srun", "--nodelist=n2", "touch", "/tmp/mine", "/dev/shm/mine")
    slurm.kill_node("n2")
    slurm.wait_for_nodes(n2="down*", timeout_s=100)
    slurm.start_node("n2")
    slurm.wait_for_nodes(n1="idle", n2="idle")
    assert not slurm.files("n2")
    assert "n2" in slurm.run("srun", "--nodelist=n2", "uname", "-n").stdout


def test_nodes_share_an_s3_server_with_the_tests(slurm: Slurm, slurm_s3: S3Server):
    with slurm.network():
        slurm_s3.make_bucket("greetings")
        slurm_s3.client.put_object(Bucket="greetings", Key="one", Body=b"good morning")
    read = slurm.run("srun", "--nodes=2", sys.executable, "-c", DOWNLOAD, env=slurm_s3.environment)
    assert read.stdout.splitlines() == ["good morning"] * 2


def test_cluster_leaves_nothing_and_bears_others_beside_it(slurm):
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    other = Slurm(folder)
    job = submit(other, "--nodes=2", "--wrap=sleep 600")
    other.wait(job, "RUNNING")
    other.stop()
    commands = [path.read_text() for path in Path("/proc").glob("[0-9]*/cmdline")]
    assert not [command for command in commands if str(folder) in command]
    shutil.rmtree(folder)  # nothing is mounted there any more
    assert slurm.nodes() == {"n1": "idle", "n2": "idle"}

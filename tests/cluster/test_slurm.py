"""Training and search on a real Slurm of two nodes: as they should go, and all that may come between."""

import os
import re
import sys
import time
from pathlib import Path

import pytest
from commands import ROOT, WEIGHTS, options
from datasets import write_pairs

pytestmark = pytest.mark.slurm
REAL_PAIRS = ROOT.parent / "shared/data/lol-v1-part"
STEPS, EVERY = 600, 200
LONG = {
    "--data.crop": "64",
    "--network.width": "0.125",
    "--train.steps": str(STEPS),
    "--train.log-every": "10",
    "--checkpoint.every": str(EVERY),
    "--run.workers": "2",
    "--run.cpus-per-worker": "2",  # a node has three, so that the second worker is on the other one
}


class Cluster:
    """The login node: commands of the project and jobs, whose data and runs lie on S3."""

    def __init__(self, slurm, s3, bucket: str) -> None:
        self.slurm, self.s3, self.bucket = slurm, s3, bucket
        self.data, self.runs = f"{bucket}/shards", f"{bucket}/runs"
        self.environment = {
            **s3.environment,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "IAML_SITE": str(slurm.shared / "site.sh"),
        }
        (slurm.shared / "site.sh").write_text("GRACE_S=20\n")

    def run(self, *arguments: str, check: bool = True):
        return self.slurm.run(sys.executable, *arguments, cwd=ROOT, env=self.environment, check=check)

    def submit(self, *command: str, cpus: int = 3, **sbatch: str) -> str:
        """Queue a job on both nodes; its number."""
        given = [f"--{name.replace('_', '-')}={value}" for name, value in sbatch.items()]
        log = f"--output={self.slurm.shared}/%j.log"
        place = ["--nodes=2", f"--cpus-per-node={cpus}", log, *given, "--", "python"]
        return self.run("cluster/slurm/submit.py", *place, *command).stdout.split()[-1]

    def train(self, name: str, **sbatch: str) -> str:
        changes = {"--data.url": self.data, "--run.root": self.runs, "--run.name": name}
        return self.submit("pipeline/train.py", *options(**LONG | changes), **sbatch)

    def log(self, job: str) -> str:
        path = self.slurm.shared / f"{job}.log"
        return re.sub(r"\x1b\[[0-9;]*m", "", path.read_text()) if path.exists() else ""

    def wait_for_line(self, job: str, pattern: str, timeout_s: float = 150) -> None:
        deadline = time.monotonic() + timeout_s
        while not re.search(pattern, self.log(job)):
            assert time.monotonic() < deadline, f"{pattern} is not in the log of job {job}:\n{self.log(job)}"
            time.sleep(0.3)

    def weights(self, name: str, step: int = STEPS) -> list[bytes]:
        """The bytes of a checkpoint's files."""
        key = f"runs/{name}/checkpoint-{step:08d}"
        bucket = self.bucket.removeprefix("s3://")
        with self.slurm.network():
            get = self.s3.client.get_object
            return [get(Bucket=bucket, Key=f"{key}/{file}")["Body"].read() for file in WEIGHTS]

    def is_clean(self, timeout_s: float = 20) -> bool:
        """Whether nothing of a job is left on the nodes, files or processes, soon."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if not any(self.slurm.processes(node) + self.slurm.files(node) for node in ("n1", "n2")):
                return True
            time.sleep(0.5)
        return False


@pytest.fixture(scope="module")
def cluster(slurm, slurm_s3) -> Cluster:
    with slurm.network():
        bucket = slurm_s3.make_bucket()
    made = Cluster(slurm, slurm_s3, bucket)
    source = REAL_PAIRS
    if not source.exists():
        source = slurm.shared / "pairs"
        write_pairs(source, 40)
    made.run("pipeline/pack.py", "--source", str(source), "--out", made.data, "--dev-fraction", "0.15")
    return made


@pytest.fixture(scope="module")
def undisturbed(cluster) -> str:
    """The name of a run that nothing comes between; its job's log lies beside it."""
    job = cluster.train("undisturbed")
    assert cluster.slurm.wait(job, "COMPLETED", "FAILED", timeout_s=300)["JobState"] == "COMPLETED", cluster.log(job)
    assert cluster.is_clean()
    return job


def test_training_over_two_nodes_ends_in_scores(cluster, undisturbed):
    log = cluster.log(undisturbed)
    assert "Ray runs on 2 nodes: n1, n2" in log
    assert re.search(rf"checkpoint-{STEPS:08d} scored: dev_student_psnr \d+\.\d+", log)
    assert re.search(r"^student +\d+\.\d\d +0\.\d{4}", log, re.MULTILINE)


def test_the_time_limit_and_an_urgent_job_interrupt_a_training_that_ends_with_the_same_bits(cluster, undisturbed):
    job = cluster.train("interrupted", time="2", sbatch="--signal=B:USR1@55")
    cluster.wait_for_line(job, r"job is requeued")
    cluster.slurm.wait(job, "RUNNING", timeout_s=60)
    cluster.wait_for_line(job, r"resuming from \S+/interim-\d+ at step")
    cluster.slurm.run("sbatch", "--partition=urgent", "--nodes=2", "--ntasks-per-node=4", "--wrap=sleep 1")
    deadline = time.monotonic() + 400
    while (state := cluster.slurm.wait(job, "COMPLETED", "FAILED", "PENDING", "RUNNING"))["JobState"] != "COMPLETED":
        assert time.monotonic() < deadline and state["JobState"] != "FAILED", cluster.log(job)
        time.sleep(1)
    log = cluster.log(job)
    assert int(state["Restarts"]) >= 2, state
    assert log.count("interrupted; run the same command again to resume") >= 2
    assert cluster.weights("interrupted") == cluster.weights("undisturbed")
    assert cluster.is_clean()


def test_a_lost_node_requeues_the_job_which_ends_with_the_same_bits(cluster, undisturbed):
    job = cluster.train("lost")
    cluster.wait_for_line(job, rf"step {EVERY + 10}/")
    cluster.slurm.kill_node("n2")
    cluster.wait_for_line(job, r"Ray has lost n2")
    cluster.wait_for_line(job, r"a node was lost; the job is requeued")
    # until Slurm notices, it may give the job the lost node again, and show it as one that has failed
    time.sleep(20)
    cluster.slurm.start_node("n2")
    cluster.wait_for_line(job, "(?s)Ray runs on 2 nodes.*Ray runs on 2 nodes")
    state = cluster.slurm.wait(job, "COMPLETED", "FAILED", timeout_s=300)
    assert state["JobState"] == "COMPLETED", cluster.log(job)
    assert re.search(rf"resuming from \S+/checkpoint-{EVERY:08d} at step {EVERY}", cluster.log(job))
    assert cluster.weights("lost") == cluster.weights("undisturbed")


def test_a_cancelled_job_leaves_nothing_behind(cluster):
    job = cluster.train("cancelled")
    cluster.wait_for_line(job, r"step 10/")
    cluster.slurm.run("scancel", job)
    assert cluster.slurm.wait(job, "CANCELLED", "COMPLETED", "FAILED", timeout_s=60)["JobState"] == "CANCELLED"
    assert cluster.is_clean(timeout_s=45)


@pytest.mark.parametrize(
    ("site", "message"),
    [
        # a container that does not start on one of the nodes
        ("IN_CONTAINER=(bash -c '[ $(hostname) != n2 ] && exec \"$@\"' -)\nSTART_S=20", "Ray has not started on n2"),
        ("RAY_FOLDER=/no/such/folder", "cannot create directory"),
    ],
)
def test_a_job_whose_nodes_do_not_start_ray_fails_and_says_why(cluster, monkeypatch, site, message):
    file = cluster.slurm.shared / "broken.sh"
    file.write_text(f"{site}\n")
    monkeypatch.setitem(cluster.environment, "IAML_SITE", str(file))
    job = cluster.submit("-c", "print('ran')")
    state = cluster.slurm.wait(job, "FAILED", "COMPLETED", timeout_s=90)
    assert (state["ExitCode"], state["Restarts"]) == ("1:0", "0"), cluster.log(job)
    assert message in cluster.log(job) and "ran\n" not in cluster.log(job)
    assert cluster.is_clean()


def test_a_search_and_a_command_that_fails_share_the_nodes(cluster):
    """Two jobs at once: neither sees the other's Ray, and each ends with its own command's status."""
    small = options(**{"--data.url": cluster.data, "--run.root": cluster.runs, "--run.name": "small"})
    changes = ["--search.trials", "2", "--search.top", "1", "--search.seeds", "2"]
    changes += ["--search.database", f"sqlite:///{cluster.slurm.shared}/study.db"]
    search = cluster.submit("tune/search.py", *small, *changes, cpus=2)
    script = cluster.slurm.shared / "fails.py"
    script.write_text(
        "import ray, sys, time\n"
        "ray.init(logging_level='ERROR')\n"
        "time.sleep(5)\n"
        "print(sorted((n['NodeManagerHostname'], n['Resources']['CPU'], n['Resources']['GPU']) for n in ray.nodes()))\n"
        "sys.exit(3)\n"
    )
    failing = cluster.submit(str(script), cpus=2, gpus_per_node="2")
    cluster.wait_for_line(failing, "Ray runs on 2 nodes")
    assert cluster.slurm.state(search)["JobState"] == "RUNNING"
    port = 20000 + int(failing) % 1000 * 10
    stranger = cluster.run("-m", "ray.scripts.scripts", "status", f"--address=n1:{port}", check=False)
    assert stranger.returncode != 0 and "uthenticat" in stranger.stdout + stranger.stderr
    state = cluster.slurm.wait(failing, "FAILED", "COMPLETED", timeout_s=90)
    assert state["ExitCode"] == "3:0" and state["Restarts"] == "0", cluster.log(failing)
    assert "[('n1', 2.0, 2.0), ('n2', 2.0, 2.0)]" in cluster.log(failing)
    ended = cluster.slurm.wait(search, "COMPLETED", "FAILED", timeout_s=300)
    assert ended["JobState"] == "COMPLETED", cluster.log(search)
    assert re.search(r"^2 trials: 2 finished", cluster.log(search), re.MULTILINE), cluster.log(search)
    assert cluster.is_clean()

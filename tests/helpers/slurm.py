"""A Slurm cluster for tests: real daemons on a login node and two compute nodes, all on this machine.

Each of the three has namespaces of its own for network, host name, mounts and processes, so a node can be looked at
and lost like a machine of its own. Nothing has a name outside of them: labs can't collide, and end with the tests.
"""

import contextlib
import ctypes
import os
import re
import secrets
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parents[2]
COMMANDS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "ss", "nsenter", "unshare")
PACKAGES = "slurm-wlm munge iproute2"
ADDRESSES = {"ctl": "10.77.0.1", "n1": "10.77.0.11", "n2": "10.77.0.12"}
NODES = ("n1", "n2")
SLURMD_PORT = 6818
START_S = 30
NAMESPACES = {"net": "net", "uts": "uts", "mount": "mnt", "pid": "pid_for_children"}

# What makes it quick: the scheduler looks every second, a requeued job waits for cred_expire alone, and a node that is
# silent for SlurmdTimeout is down. linuxproc, unlike cgroups, loses sight of processes whose parents end before them:
# what a job's script does not end itself may stay. Slurm looks at time limits every 30 s, which can't be set.
CONFIGURATION = """\
ClusterName=lab
SlurmctldHost=ctl({ctl})
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmdPort={port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
SlurmdTimeout=60
ReturnToService=2
KillWait=30
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobcomp.txt
GresTypes=gpu
NodeName=n1 NodeAddr={n1} CPUs=4 Gres=gpu:2
NodeName=n2 NodeAddr={n2} CPUs=4 Gres=gpu:2
PartitionName=main Nodes=n1,n2 Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=urgent Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF
"""

# Process 1 of each machine is its script's shell: it adopts and reaps orphans, and as its input ends, that is when
# the tests let go of it or die, it ends too, and all of the machine with it.
BOOT = """
set -eu
folder=$1 name=$2 address=$3
echo "$name" > /proc/sys/kernel/hostname
mount --bind "$folder/hosts" /etc/hosts
ip link set lo up
export SLURM_CONF="$folder/slurm.conf"
ready() { echo; exec >&2; } # the tests wait for a line
"""
CONTROLLER = f"""{BOOT}
ip link add bridge type bridge
ip address add "$address/24" dev bridge
ip link set bridge up
ready
munged --foreground --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" \\
    --pid-file="$folder/munged.pid" --seed-file="$folder/munged.seed" --log-file="$folder/munged.log" &
slurmctld -D &
read -r || true
"""
# what the tests need of the machine's /tmp is put into the node's own before that takes its place
NODE = f"""{BOOT}
ready
read -r # the cable is plugged in
ip address add "$address/24" dev eth0
ip link set eth0 up
mount -t tmpfs -o size=2g tmpfs /dev/shm
mkdir -p "$folder/tmp.$name"
mount -t tmpfs tmpfs "$folder/tmp.$name"
shift 3
for path in "$@"; do
    mkdir -p "$folder/tmp.$name${{path#/tmp}}"
    mount --bind "$path" "$folder/tmp.$name${{path#/tmp}}"
done
mount --rbind "$folder/tmp.$name" /tmp
slurmd -D -N "$name" &
read -r || true
"""


def available() -> str | None:
    """Why there can be no such cluster here, or None."""
    missing = [command for command in COMMANDS if shutil.which(command) is None]
    if missing:
        return f"the Slurm of the tests needs {', '.join(missing)}: apt-get install --no-install-recommends {PACKAGES}"
    return None if os.geteuid() == 0 else "the Slurm of the tests needs root, for its namespaces"


class Slurm:
    """A cluster whose state is in ``folder``; all nodes see ``shared``, but each has a /tmp and /dev/shm of its own.

    It has the nodes n1 and n2, of 4 CPUs and 2 GPUs each that Slurm hands out but nobody can use, and the partitions
    ``main`` and ``urgent``, whose jobs take the place of those in ``main``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.shared = self.folder / "shared"
        self._machines: dict[str, subprocess.Popen[str]] = {}
        paths = [self.folder, ROOT, Path(sys.prefix), Path(sys.base_prefix)]
        self._in_tmp = [path for path in paths if path.is_relative_to("/tmp")]
        self._configure()
        try:
            self._boot("ctl", CONTROLLER)
            for node in NODES:
                self.start_node(node)
            self.wait_for_nodes(n1="idle", n2="idle")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End all that runs in the cluster."""
        for name in list(self._machines):
            self.kill_node(name)

    def reset(self) -> None:
        """Cancel all jobs, and start the nodes that are off; those that a job has left something on, anew."""
        self.run("scancel", "--user=root")
        for node in set(NODES) - set(self._machines):
            self.start_node(node)
        self.wait_for_nodes(n1="idle", n2="idle")
        for node in NODES:
            if self.processes(node) or self.files(node):
                self.kill_node(node)
                self.start_node(node)

    def run(
        self,
        *command: str,
        check: bool = True,
        env: dict[str, str] | None = None,
        cwd: Path | None = None,
        timeout_s: float = 120,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the login node, in ``shared`` by default, with ``env`` and little else around it."""
        environment = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        environment |= {"SLURM_CONF": f"{self.folder}/slurm.conf", **(env or {})}
        done = subprocess.run(
            [*self._enter("ctl", *NAMESPACES), "env", f"--chdir={cwd or self.shared}", *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert not check or done.returncode == 0, f"{command}: status {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    @contextlib.contextmanager
    def network(self) -> Iterator[None]:
        """Within it, new sockets and processes of this thread, and no other, are in the login node's network."""
        there = Path(f"/proc/{self._machines['ctl'].pid}/ns/net")
        with Path("/proc/thread-self/ns/net").open() as home, there.open() as lab:
            _set_namespace(lab)
            try:
                yield
            finally:
                _set_namespace(home)

    def state(self, job: str) -> dict[str, str]:
        """What ``scontrol show job`` says: JobState, ExitCode, Restarts, Reason, NodeList and so on."""
        text = self.run("scontrol", "--oneliner", "show", "job", job).stdout
        return dict(re.findall(r"(?:^|\s)([\w:/]+)=(\S*)", text))

    def output(self, job: str) -> str:
        """What the job has written so far."""
        log = Path(self.state(job)["StdOut"])
        return log.read_text() if log.exists() else ""

    def wait(self, job: str, *states: str, timeout_s: float = 60) -> dict[str, str]:
        """Wait until the job is in one of ``states``."""
        for _ in _polls(timeout_s):
            state = self.state(job)
            if state["JobState"] in states:
                return state
        raise AssertionError(f"job {job} is not {states} after {timeout_s} s: {state}\n{self.output(job)[-5000:]}")

    def wait_for_output(self, job: str, text: str, timeout_s: float = 60) -> None:
        """Wait until the job has written ``text``."""
        for _ in _polls(timeout_s):
            if text in self.output(job):
                return
        raise AssertionError(f"no {text!r} after {timeout_s} s: {self.state(job)}\n{self.output(job)[-5000:]}")

    def kill_node(self, node: str) -> None:
        """Cut the node's power."""
        self._machines.pop(node).communicate(timeout=START_S)  # process 1 is gone when all others are

    def start_node(self, node: str) -> None:
        """Start the node, with nothing in its /tmp and /dev/shm."""
        machine = self._boot(node, NODE)
        cable = f"veth{machine.pid}"  # a name of its own: that of a node just killed may be there for a moment
        command = ["ip", "link", "add", cable, "up", "master", "bridge", "type", "veth"]
        command += ["peer", "name", "eth0", "netns", str(machine.pid)]
        subprocess.run([*self._enter("ctl", "net"), *command], check=True)
        print(file=machine.stdin, flush=True)
        for _ in _polls(START_S):
            if SLURMD_PORT in (port for _, port in self._listeners(node)):
                return
        raise AssertionError(f"slurmd of {node} did not start: {self._log(node)}")

    def nodes(self) -> dict[str, str]:
        """Each node's state as ``sinfo`` tells it: idle, allocated, down* and so on."""
        command = ["sinfo", "--noheader", "--partition", "main", "--Node", "--format", "%N %T"]
        return dict(line.split() for line in self.run(*command, check=False).stdout.splitlines())

    def wait_for_nodes(self, *, timeout_s: float = START_S, **states: str) -> None:
        """Wait until the nodes are in these states, as in ``wait_for_nodes(n2="idle")``."""
        for _ in _polls(timeout_s):
            nodes = self.nodes()
            if states.items() <= nodes.items():
                return
        raise AssertionError(f"nodes are {nodes}, not {states}, after {timeout_s} s: {self._log('ctl')}")

    def processes(self, node: str) -> list[str]:
        """Command lines of what runs on the node besides Slurm's own."""
        namespace = Path(f"/proc/{self._machines[node].pid}/ns/pid_for_children").readlink()
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has just ended, or may not be looked at
                if (process / "ns/pid").readlink() == namespace:
                    found.append((process / "cmdline").read_text().replace("\0", " ").strip())
        own = ("slurmd", "slurmstepd", f"bash {self.folder}/")
        return [line for line in found if line and not line.startswith(own)]

    def files(self, node: str) -> list[str]:
        """What lies in the node's own /tmp and /dev/shm."""
        command = [*self._enter(node, "mount"), "find", "/tmp", "/dev/shm", "-xdev", "-mindepth", "1"]
        found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        return [path for path in found if not any(seen.is_relative_to(path) for seen in self._in_tmp)]

    def listening(self, node: str) -> list[tuple[str, int]]:
        """Addresses and ports that something on the node listens at, besides slurmd."""
        return [(address, port) for address, port in self._listeners(node) if port != SLURMD_PORT]

    def _configure(self) -> None:
        for name in ("shared", "state", "n1", "n2"):
            (self.folder / name).mkdir()
        settings = {**ADDRESSES, "folder": self.folder, "port": SLURMD_PORT}
        (self.folder / "slurm.conf").write_text(CONFIGURATION.format(**settings))
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-1]\n")
        for gpu in ("gpu0", "gpu1"):
            os.mknod(self.folder / gpu, stat.S_IFCHR, os.makedev(1, 3))  # what /dev/null is
        hosts = {"localhost": "127.0.0.1", **ADDRESSES}
        (self.folder / "hosts").write_text("".join(f"{address} {name}\n" for name, address in hosts.items()))
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))

    def _boot(self, name: str, script: str) -> subprocess.Popen[str]:
        boot = self.folder / f"{name}.sh"
        boot.write_text(script)
        command = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc"]
        command += ["bash", str(boot), str(self.folder), name, ADDRESSES[name], *map(str, self._in_tmp)]
        with (self.folder / f"{name}.log").open("a") as log:
            machine = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        self._machines[name] = machine
        assert machine.stdout is not None
        assert machine.stdout.readline(), f"{name} did not start: {self._log(name)}"
        return machine

    def _listeners(self, node: str) -> list[tuple[str, int]]:
        command = [*self._enter(node, "net"), "ss", "--listening", "--tcp", "--numeric", "--no-header"]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
        found = [line.split()[3].rsplit(":", 1) for line in lines]
        return [(address, int(port)) for address, port in found]

    def _log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()[-2000:]

    def _enter(self, name: str, *namespaces: str) -> list[str]:
        here = f"/proc/{self._machines[name].pid}/ns"
        return ["nsenter", *(f"--{kind}={here}/{NAMESPACES[kind]}" for kind in namespaces)]


def _polls(timeout_s: float) -> Iterator[None]:
    """A turn every so often, until the time is over."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        yield
        time.sleep(0.1)


def _set_namespace(file: IO[str]) -> None:
    # Python has os.setns from 3.12 on; 0 stands for whatever kind of namespace it is
    if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0) != 0:
        raise OSError(ctypes.get_errno(), "setns", file.name)

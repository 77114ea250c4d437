"""Runs a command on the Ray cluster of a Slurm job, from its first node, once all nodes are in.

The job's script tells it by SIGUSR2 that the time is nearly over. The exit status is the command's, or INTERRUPTED
when it was preempted, or LOST when a node was lost.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from types import FrameType

import ray

INTERRUPTED, LOST = 75, 76
POLL_S = 1.0


class Interruption:
    """Notes when the job's script says that the time is nearly over."""

    def __init__(self) -> None:
        self.since: float | None = None
        signal.signal(signal.SIGUSR2, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.since = self.since or time.monotonic()


def main() -> int:
    """Wait, run, watch; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--address", required=True, help="HOST:PORT of Ray's head")
    parser.add_argument("--hosts", required=True, help="host names of the job's nodes, with commas")
    parser.add_argument("--start-s", type=float, required=True, help="seconds within which all nodes must be in")
    parser.add_argument("--grace-s", type=float, required=True, help="seconds to shut down")
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    hosts = set(arguments.hosts.split(","))
    interruption = Interruption()
    absent = wait_for(hosts, arguments.address, time.monotonic() + arguments.start_s)
    if absent:
        print(f"after {arguments.start_s:g} s Ray has not started on {absent}; what it said there stands above")
        return LOST if int(os.environ.get("SLURM_RESTART_COUNT", "0")) else 1  # it had started on all before
    print(f"Ray runs on {len(hosts)} nodes: {', '.join(sorted(hosts))}", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the job is cancelled
    process = start(arguments.command, arguments.address)
    try:
        return watch(process, hosts, interruption, arguments.grace_s)
    finally:
        process.kill()


def wait_for(hosts: set[str], address: str, deadline: float) -> str:
    """Connect to Ray and wait until all nodes are in; names those that are not when the time is over."""
    absent = f"its head node ({address})"
    while absent and time.monotonic() < deadline:
        if ray.is_initialized():
            absent = missing(hosts)
        elif _answers(address):
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
            continue
        time.sleep(POLL_S)
    return absent


def missing(hosts: set[str]) -> str:
    """Names of the hosts that are not in Ray's cluster, or not any more."""
    alive = {node["NodeManagerHostname"].split(".")[0] for node in ray.nodes() if node["Alive"]}
    return ", ".join(sorted(host for host in hosts if host.split(".")[0] not in alive))


def start(command: list[str], address: str) -> subprocess.Popen[bytes]:
    """Start the command; it inherits that SIGUSR2, which Slurm sends to all processes, is none of its business."""
    handler = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    try:
        return subprocess.Popen(command, env={**os.environ, "RAY_ADDRESS": address})
    finally:
        signal.signal(signal.SIGUSR2, handler)


def watch(process: subprocess.Popen[bytes], hosts: set[str], interruption: Interruption, grace_s: float) -> int:
    """Wait for the command, asking it once to stop when it is time; returns the exit status."""
    asked = False
    while process.poll() is None:
        time.sleep(POLL_S)
        if lost := missing(hosts):
            print(f"Ray has lost {lost}", flush=True)
            return LOST
        if interruption.since and not asked:
            process.terminate()
            asked = True
        if interruption.since and time.monotonic() > interruption.since + grace_s:
            print(f"the command did not stop within {grace_s:g} s", flush=True)
            process.kill()
    if asked and process.returncode < 0:  # before it could handle the signal, or killed
        return INTERRUPTED
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


if __name__ == "__main__":
    sys.exit(main())

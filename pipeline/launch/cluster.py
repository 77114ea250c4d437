"""The way to Ray: the cluster that RAY_ADDRESS names, or one on this machine for the time being."""

import contextlib
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import ray
import ray.train
from ray.exceptions import RayError, RayTaskError

from pipeline import interruption, ray_internals, terminal

LIMIT_S = 30.0  # Ray itself tries for a quarter of an hour
SOCKET = "ray/session_2000-01-01_00-00-00_000000_0000000/sockets/plasma_store"  # the longest path below Ray's folder
SOCKET_BYTES = 107  # that a path may have on Linux
OWN = ("", "local")  # what RAY_ADDRESS is for a Ray that ends with the command
HOW = "set it to HOST:PORT of a Ray head (port 6379 by default), or unset it for a Ray on this machine"


@contextmanager
def session(cpus: int, log: str | None, *, quiet: bool = False) -> Iterator[None]:
    """Within, Ray runs: the cluster that RAY_ADDRESS names, or one on this machine for the time being.

    On this machine Ray's count of CPUs is raised to the ``cpus`` that are asked for, since they may be shared.
    SIGTERM and Ctrl-C shut down gracefully what runs within, and end the process with ``interruption.STATUS``.

    Args:
        cpus: CPU cores that are needed.
        log: URL of the file for all that is not meant for the terminal; none keeps it only where something fails.
        quiet: leave what tasks and actors say to the log.

    Raises:
        ValueError: no Ray head answers at RAY_ADDRESS, or Ray can't start here.
        SystemExit: something failed in Ray that the caller has no answer to; says why in a line.
    """
    with terminal.session(log):
        connect(cpus)
        try:
            # Ray has put its own handlers in place by now
            with terminal.relay(shown=not quiet), interruption.graceful_shutdown():
                yield
        except (RayError, ray.train.TrainingFailedError) as error:
            raise SystemExit(f"failed: {describe_failure(error)}") from error
        finally:
            ray.shutdown()


def describe_failure(error: Exception) -> str:
    """Why something failed in Ray, in one line for each cause."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, ray.train.WorkerGroupError):
        causes = {_last_line(failure) for failure in cause.worker_failures.values()}
        return "; ".join(sorted(causes))
    return _last_line(cause)


def connect(cpus: int) -> None:
    """Connect to the cluster that RAY_ADDRESS names, or start Ray on this machine, and say which.

    Args:
        cpus: how many Ray is to count at least where it is started, since they may be shared.

    Raises:
        ValueError: no Ray head answers at RAY_ADDRESS within ``LIMIT_S``, or Ray can't start here.
    """
    named = os.environ.get("RAY_ADDRESS", "")
    if named in OWN:
        check_socket_paths()
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # a node of one's own is not taken away
        try:
            context, place = ray.init("local", num_cpus=max(cpus, ray_internals.count_cores())), "on this machine"
        except Exception as error:  # Ray names its reasons in no class of its own
            raise ValueError(f"Ray did not start on this machine: {' '.join(str(error).split())}") from error
    else:
        check_address(named)
        context = ray.init()
        place = f"at {ray.get_runtime_context().gcs_address}"
    dashboard = f", dashboard http://{context.dashboard_url}" if context.dashboard_url else ""
    terminal.log(f"Ray {ray.__version__} {place}{dashboard}")


def is_own() -> bool:
    """Whether this process has started the Ray that it uses, which ends with it."""
    return os.environ.get("RAY_ADDRESS", "") in OWN and not ray_internals.is_worker()


def check_socket_paths() -> None:
    """``ValueError`` when the folder for temporary files is too deep for Ray's sockets."""
    variable = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    folder = os.environ.get(variable, "/tmp")
    room = SOCKET_BYTES - len(f"/{SOCKET}")
    if len(os.fsencode(folder)) > room:
        raise ValueError(
            f"{variable}={folder}: too long a path for Ray's sockets, which leave it {room} bytes; "
            "set RAY_TMPDIR to a shorter one, such as /tmp"
        )


def check_address(named: str) -> None:
    """``ValueError`` when no Ray head answers at ``named``, the value of RAY_ADDRESS; says what to do."""
    scheme = named.partition("://")[0] if "://" in named else ""
    if scheme in ("http", "https"):
        raise ValueError(
            f"RAY_ADDRESS={named}: is a dashboard's, which takes jobs: "
            f"ray job submit --address {named} --working-dir . -- python ...; else {HOW}"
        )
    if scheme:
        what = "Ray Client, by which training can't be started" if scheme == "ray" else f"{scheme}://"
        raise ValueError(f"RAY_ADDRESS={named}: is an address for {what}; {HOW}, or submit the command as a job")
    address = named
    if named == "auto":
        try:
            address = ray_internals.find_local_head()
        except ConnectionError as error:
            raise ValueError(f"RAY_ADDRESS=auto: no Ray runs on this machine; {HOW}") from error
    parts = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[\w.-]+):(\d{1,5})", address)
    if not parts or not 0 < int(parts[2]) < 2**16:
        raise ValueError(f"RAY_ADDRESS={named}: is no address; {HOW}")
    reason = _problem(address, parts[1].strip("[]"), int(parts[2]))
    if reason:
        at = f" ({address})" if named == "auto" else ""
        raise ValueError(f"RAY_ADDRESS={named}{at}: {reason}; start Ray there, {HOW}")


def _problem(address: str, host: str, port: int) -> str:
    """Why no Ray head answers there within ``LIMIT_S``; empty when one does."""
    with contextlib.closing(ray_internals.open_head_channel(address)) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=LIMIT_S)
            ray_internals.ask_head(channel, LIMIT_S)
        except grpc.FutureTimeoutError:
            try:
                socket.create_connection((host, port), timeout=1).close()
            except OSError as error:
                return f"no Ray head answers there in {LIMIT_S:g} s ({error})"
            return f"what listens there is no Ray head, or doesn't answer in {LIMIT_S:g} s"
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNIMPLEMENTED:
                return "what listens there is no Ray head, though it may be of Ray"
            if error.code() != grpc.StatusCode.UNAUTHENTICATED:  # Ray itself finds tokens, and says where it looks
                return f"the Ray head doesn't answer: {error.details()}"
    return ""


def _last_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__


@contextmanager
def propagate_address() -> Iterator[None]:
    """Within, Ray Train tells its processes of this Ray; they would look for any on the machine, and find several."""
    with ray_internals.propagate_variable("RAY_ADDRESS", ray.get_runtime_context().gcs_address):
        yield

"""What this project needs of Ray and no public interface gives: each of Ray's private interfaces behind one function.

The version looked at is 2.60.0. A test of each function is named after the upgrade that would break it. Ray, which
takes long to import, is imported by those who call.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

HANDLER = "iaml"


def is_worker() -> bool:
    """Whether this is a process that Ray has started for a task or an actor; imports no Ray.

    The public context of a driver tells it from a worker by warnings alone.
    """
    ray = sys.modules.get("ray")  # commands that do without it ask as well
    return ray is not None and ray._private.worker.global_worker.mode == ray.WORKER_MODE


def set_mark(key: str) -> None:
    """Leave a mark in the cluster's key-value store, which all its processes can see as long as it lives.

    The public way to share a word among processes is an actor, which would take a process and may be away.
    """
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(key, b"")


def has_mark(key: str) -> bool:
    """Whether a process of the cluster has left this mark; costs a call to Ray's head, and is false without Ray."""
    from ray.experimental.internal_kv import _internal_kv_exists, _internal_kv_initialized

    return _internal_kv_initialized() and bool(_internal_kv_exists(key))


def free_resources_by_node() -> dict[str, dict[str, float]]:
    """What each node has that nothing takes, by resource, by the node's id; in public there is but their sum."""
    from ray._private.state import available_resources_per_node

    return {node: dict(free) for node, free in available_resources_per_node().items()}


def has_autoscaler() -> bool:
    """Whether the cluster may get further nodes by itself; Ray only takes requests for them, and says nothing."""
    from ray.autoscaler.v2.utils import is_autoscaler_v2

    return bool(is_autoscaler_v2())


def count_cores() -> int:
    """Cores of this machine that this process may use, as Ray counts them: a container's limit and affinity apply."""
    from ray._private.utils import get_num_cpus

    return max(1, min(int(get_num_cpus(override_docker_cpu_warning=True)), len(os.sched_getaffinity(0))))


@contextmanager
def redirect_worker_output(receive: Callable[[str, str], None]) -> Iterator[None]:
    """Within, what the job's processes print comes to ``receive`` instead of this driver's output.

    In public, Ray's printing can be turned off, and no more. It is not turned on again after.

    Args:
        receive: takes whose words these are (task or actor, process, node) and a line, in a thread of Ray.
    """
    from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher

    def receive_batch(batch: dict[str, Any]) -> None:
        name = batch.get("actor_name") or batch.get("task_name") or ""
        source = f"{name} pid={batch['pid']} ip={batch['ip']}".strip()
        lines = batch["lines"]
        for line in keep_autoscaler_events(lines) if batch["pid"] == "autoscaler" else lines:
            receive(source, line)

    dispatcher.remove_handler("ray_print_logs")
    dispatcher.add_handler(HANDLER, receive_batch)
    try:
        yield
    finally:
        dispatcher.remove_handler(HANDLER)


def keep_autoscaler_events(lines: Iterable[str]) -> Iterator[str]:
    """What Ray itself would show of the autoscaler's lines, which say all that it knows every few seconds."""
    from ray._private.worker import filter_autoscaler_events

    yield from filter_autoscaler_events(lines)


def start_resource_coordinator() -> None:
    """Start the actor that Ray Train's controller asks for room, and waits for, before it starts workers.

    The controller would start it itself, but only once it stands, which takes seconds, and in a process of its own,
    for its environment variables differ. So it starts beside the controller, in a process that Ray has at hand: 2 s
    less to wait, and 1 s less of CPU time. Like the controller, it finds the actor by name where it exists.
    """
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        get_or_create_autoscaling_coordinator,
    )

    get_or_create_autoscaling_coordinator()


def start_fewer_actors(trainer: Any, *, keep_cleaner: bool) -> None:
    """Have a trainer of Ray Train start no actors that are of no use to it; each takes 2 s to 3 s of CPU time.

    Args:
        trainer: one without datasets, so that it needs nothing that hands them out.
        keep_cleaner: whether to keep what clears the trainer's room away where its controller dies.
    """
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    create = trainer._create_default_callbacks
    useless = (DatasetsCallback,) if keep_cleaner else (DatasetsCallback, PlacementGroupCleanerCallback)
    trainer._create_default_callbacks = lambda: [each for each in create() if not isinstance(each, useless)]


@contextmanager
def propagate_variable(name: str, value: str) -> Iterator[None]:
    """Within, the processes of Ray Train that this one starts have this environment variable, as it has itself.

    Ray Train's own list has no public way to add to it, and the controller's environment none to be set.
    """
    from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE

    before = os.environ.get(name)
    os.environ[name] = value
    ENV_VARS_TO_PROPAGATE.add(name)
    try:
        yield
    finally:
        ENV_VARS_TO_PROPAGATE.discard(name)
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def find_local_head() -> str:
    """HOST:PORT of the Ray head that ``ray.init("auto")`` would take; in public it is known only once connected.

    Raises:
        ConnectionError: none is known on this machine.
    """
    from ray._private.services import canonicalize_bootstrap_address

    return str(canonicalize_bootstrap_address("auto"))


def open_head_channel(address: str) -> Any:
    """A gRPC channel to HOST:PORT, with Ray's TLS and token, and past any proxy; to be closed by the caller."""
    from ray._private.grpc_utils import init_grpc_channel

    return init_grpc_channel(address, [("grpc.enable_http_proxy", 0)])


def ask_head(channel: Any, limit_s: float) -> None:
    """Ask a Ray head for a sign of life; ``ray.init`` would try for a quarter of an hour, and then end the process.

    Raises:
        grpc.RpcError: no Ray head answers within ``limit_s``; its code and details say why.
    """
    from ray.core.generated.gcs_service_pb2 import CheckAliveRequest
    from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

    NodeInfoGcsServiceStub(channel).CheckAlive(CheckAliveRequest(), timeout=limit_s)

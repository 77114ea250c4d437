"""What room a Ray cluster has: the devices of a run, the nodes of its parts, and how many runs fit at the same time."""

import time
from collections.abc import Mapping, Sequence

import ray
from ray._private.state import available_resources_per_node
from ray.autoscaler.sdk import request_resources
from ray.autoscaler.v2.utils import is_autoscaler_v2

from pipeline import interruption, terminal
from pipeline.data.manifest import Manifest
from pipeline.evaluation.pool import sized
from pipeline.settings.config import AnyConfig, Config

AUTOSCALER_S = 600.0  # in which a cloud has brought up a node with a GPU and its image, or has none
POLL_S = 1.0


def cpus_needed(config: Config) -> int:
    """CPU cores that a run takes at least."""
    run, evaluation = config.run, config.evaluation
    return run.workers * run.cpus_per_worker + (evaluation.actors or 1) * evaluation.cpus_per_actor


def with_devices(config: AnyConfig, manifests: Sequence[Manifest], runs: int = 1) -> AnyConfig:
    """The settings with ``run.use_gpu`` and the evaluation actors decided by what the cluster has.

    Waits for nodes that ``runs`` such runs at the same time need, if the cluster may get them.

    Raises:
        ValueError: the cluster has too little for one.
    """
    evaluation, run = config.evaluation, config.run
    needed = (evaluation.actors or 1) * (evaluation.gpus_per_actor or 0.0)
    use_gpu = (
        run.use_gpu if run.use_gpu is not None else ray.cluster_resources().get("GPU", 0.0) >= run.workers + needed
    )
    config = config.model_copy(update={"run": run.model_copy(update={"use_gpu": use_gpu})})
    worker, actor = _parts(config)
    wait_for(([worker] * run.workers + [actor] * (evaluation.actors or 1)) * runs, run.wait_s)
    check(cpus_needed(config), run.workers * use_gpu + needed)
    free = free_on_nodes()
    for name, part in (("run.workers", worker), ("evaluation.actors", actor)):
        if not any(_take({"": node}, [part]) for node in _nodes().values()):
            raise ValueError(
                f"each of {name} needs {part['CPU']:g} CPUs and {part['GPU']:g} GPUs of one node; none has so many"
            )
    beside = list(free.values()) if _take(free, [worker] * run.workers) else []
    images = int(manifests[0].split(config.checkpoint.split).pairs.sum())
    return config.model_copy(update={"evaluation": sized(evaluation, images, beside)})


def wait_for(parts: Sequence[dict[str, float]], limit_s: float | None = None) -> None:
    """Ask Ray's autoscaler for nodes that hold ``parts``, and wait until they are there or the time is over.

    Args:
        parts: what each worker and actor takes of a node, by resource.
        limit_s: seconds to wait; by default ``AUTOSCALER_S`` where there is an autoscaler, else 0.

    Raises:
        JobInterruptedError: the job is asked to make way.
    """
    limit_s = AUTOSCALER_S * is_autoscaler_v2() if limit_s is None else limit_s
    if not limit_s or _take(_nodes(), parts):
        return
    totals = {name: sum(part.get(name, 0.0) for part in parts) for name in ("CPU", "GPU")}
    wanted = " and ".join(f"{amount:g} {name}s" for name, amount in totals.items() if amount)
    terminal.say(f"waiting up to {limit_s:g} s for nodes with {wanted} (run.wait_s)")
    request_resources(bundles=[{name: amount for name, amount in part.items() if amount} for part in parts])
    deadline = time.monotonic() + limit_s
    try:
        while not _take(_nodes(), parts) and time.monotonic() < deadline:
            interruption.check()
            time.sleep(POLL_S)
    finally:
        request_resources(bundles=[])  # from here on what runs asks for itself


def check(cpus: float, gpus: float) -> None:
    """``ValueError`` when the Ray cluster has fewer CPUs or GPUs, for which a run would wait in vain."""
    present = ray.cluster_resources()
    for name, amount in (("CPU", cpus), ("GPU", gpus)):
        if amount > present.get(name, 0.0):
            raise ValueError(
                f"the run needs {amount:g} {name}s, the Ray cluster has {present.get(name, 0.0):g}; lower run.workers, "
                "run.cpus_per_worker, evaluation.actors or evaluation.gpus_per_actor, or add nodes"
            )


def free_on_nodes() -> dict[str, dict[str, float]]:
    """What each node has that nothing takes, by resource, by the node's id."""
    return {node: dict(free) for node, free in sorted(available_resources_per_node().items())}


def _nodes() -> dict[str, dict[str, float]]:
    """What each node has in all, by resource, by the node's id."""
    return {node["NodeID"]: dict(node["Resources"]) for node in ray.nodes() if node["Alive"]}


def beside_training(config: Config) -> list[str]:
    """A node for each evaluation actor, so that all workers find room beside them; none where there is no such room."""
    worker, actor = _parts(config)
    taken = _take(free_on_nodes(), [worker] * config.run.workers + [actor] * (config.evaluation.actors or 1))
    return taken[config.run.workers :]


def runs_at_once(config: Config) -> int:
    """How many runs of these settings, as ``with_devices`` gave them, the cluster has room for at the same time.

    Each worker and each actor must fit into a node; one run is taken to have room.
    """
    worker, actor = _parts(config)
    parts = [worker] * config.run.workers + [actor] * (config.evaluation.actors or 1)
    free, count = free_on_nodes(), 0
    while _take(free, parts):
        count += 1
    return max(1, count)


def _parts(config: Config) -> tuple[dict[str, float], dict[str, float]]:
    """What each worker and each evaluation actor takes of a node."""
    run, evaluation = config.run, config.evaluation
    worker = {"CPU": float(run.cpus_per_worker), "GPU": float(bool(run.use_gpu))}
    return worker, {"CPU": float(evaluation.cpus_per_actor), "GPU": evaluation.gpus_per_actor or 0.0}


def _take(nodes: Mapping[str, dict[str, float]], parts: Sequence[dict[str, float]]) -> list[str]:
    """Take each of ``parts`` from the first of ``nodes`` that has it; which these are, or none if one finds no room."""
    taken: list[str] = []
    for part in parts:
        for name, free in nodes.items():
            if all(free.get(resource, 0.0) >= amount for resource, amount in part.items()):
                for resource, amount in part.items():
                    free[resource] = free.get(resource, 0.0) - amount
                taken.append(name)
                break
        else:
            return []
    return taken

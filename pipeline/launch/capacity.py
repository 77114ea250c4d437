"""Capacity, which is decided here alone: what a run takes of a Ray cluster, and how much of it fits.

A run is made of parts, its workers and its evaluation actors, each of which must fit into one node.
"""

import math
import time
from collections.abc import Mapping, Sequence

import ray
from ray.autoscaler.sdk import request_resources

from pipeline import interruption, ray_internals, terminal
from pipeline.data.manifest import Manifest
from pipeline.settings.config import AnyConfig, Config
from pipeline.settings.evaluation import EvaluationSettings

AUTOSCALER_S = 600.0  # in which a cloud has brought up a node with a GPU and its image, or has none
POLL_S = 1.0
IMAGES_PER_ACTOR = 4  # fewer are not worth an actor's start
GPU_SHARE = 0.5
SHARED_CORES = 2  # up to which training would lose half or more of a machine whose evaluation actors have cores alone


def cpus_needed(config: Config, runs: int = 1) -> int:
    """CPUs that a Ray of this machine alone is to count at least, for ``runs`` such runs at the same time.

    Where the machine has one or two cores, evaluation actors are counted beside them: they share what training uses.
    """
    least = int(sum(part["CPU"] for part in _parts(config))) * runs
    cores = ray_internals.count_cores()
    if config.run.cpus_per_worker is None and cores <= SHARED_CORES:
        return max(least, cores + cpus_for_actors(config.evaluation))
    return least


def cpus_for_actors(evaluation: EvaluationSettings) -> int:
    """CPU cores that the evaluation actors take at least."""
    return (evaluation.actors or 1) * evaluation.cpus_per_actor


def choose_devices(config: AnyConfig, manifests: Sequence[Manifest]) -> AnyConfig:
    """The settings of a run with devices, threads and evaluation actors decided by what the cluster has.

    Waits for nodes that the run needs, if the cluster may get them.

    Raises:
        ValueError: the cluster has too little.
    """
    return _choose_actors(choose_threads(_choose_gpus(config, 1), 1), manifests)


def fit_to_cluster(
    config: AnyConfig, manifests: Sequence[Manifest], concurrent: int | None = None
) -> tuple[AnyConfig, int]:
    """The settings of many runs with devices, as each run takes them, and how many run at the same time.

    Args:
        config: of one of the runs. Each would count on the same free cores for its actors, so that one actor is taken
            where their number is left open.
        manifests: of the data sets.
        concurrent: runs at the same time; by default as many as fit.

    Raises:
        ValueError: the cluster has too little for one, or for so many.
    """
    evaluation = config.evaluation.model_copy(update={"actors": config.evaluation.actors or 1})
    config = _choose_gpus(config.model_copy(update={"evaluation": evaluation}), concurrent or 1)
    config = _choose_actors(config, manifests)
    room = count_runs(config)
    if concurrent and concurrent > room:
        raise ValueError(
            f"{concurrent} runs at the same time are asked for, the Ray cluster has room for {room}; ask for fewer, "
            "lower run.workers or run.cpus_per_worker, or add nodes"
        )
    return choose_threads(config, concurrent or room), concurrent or room


def choose_threads(config: AnyConfig, runs: int) -> AnyConfig:
    """The settings with ``run.cpus_per_worker`` decided: the most with which ``runs`` such runs fit at the same time.

    Each run's evaluation actors keep their cores. Where the runs must wait for what others take, that counts as well.
    """
    if config.run.cpus_per_worker is not None:
        return config
    nodes = free_on_nodes()
    if not _take(_copy(nodes), _parts(config) * runs):
        nodes = _nodes()
    most = int(max(node.get("CPU", 0.0) for node in nodes.values()))
    if config.run.use_gpu:  # more would be idle: the loader's threads, and the one that feeds the GPU
        most = min(most, config.data.threads + 1)
    for cpus in range(most, 1, -1):
        chosen = _with_cpus(config, cpus)
        if _take(_copy(nodes), _parts(chosen) * runs):
            return chosen
    return _with_cpus(config, 1)


def describe(config: Config, concurrent: int = 1) -> str:
    """What was chosen in a line, as ``1 worker with 2 threads; 1 evaluation actor beside it``.

    Args:
        config: as ``choose_devices`` or ``fit_to_cluster`` gave it.
        concurrent: runs at the same time.
    """
    run, evaluation = config.run, config.evaluation
    assert run.cpus_per_worker is not None and evaluation.actors is not None
    each = " each" * (run.workers > 1)
    has = f"{'a GPU and ' * bool(run.use_gpu)}{_count(run.cpus_per_worker, 'thread')}{each}"
    share = f" with {evaluation.gpus_per_actor:g} of a GPU" if evaluation.gpus_per_actor else ""
    line = (
        f"{_count(run.workers, 'worker')} with {has}; "
        f"{_count(evaluation.actors, 'evaluation actor')}{share} beside {'them' if run.workers > 1 else 'it'}"
    )
    return f"{concurrent} runs at the same time, each: {line}" if concurrent > 1 else line


def copy_devices(source: Config, config: Config) -> Config:
    """The settings of a run with the devices and threads of another one, as ``fit_to_cluster`` gave them."""
    actors = source.evaluation.model_dump(include={"actors", "gpus_per_actor"})
    return config.model_copy(
        update={
            "run": config.run.model_copy(update=source.run.model_dump(include={"use_gpu", "cpus_per_worker"})),
            "evaluation": config.evaluation.model_copy(update=actors),
        }
    )


def choose_actors(evaluation: EvaluationSettings, images: int) -> EvaluationSettings:
    """The settings with as many evaluation actors for ``images`` images as have room where nothing is trained.

    Waits for nodes that the actors need, if the cluster may get them.

    Raises:
        ValueError: the cluster has too little.
    """
    parts = [_actor(evaluation)] * (evaluation.actors or 1)
    wait_for(parts)
    check(parts)
    return choose_actor_count(evaluation, images, list(free_on_nodes().values()))


def choose_actor_count(
    settings: EvaluationSettings, images: int, free: Sequence[Mapping[str, float]]
) -> EvaluationSettings:
    """The settings with the number of actors and their GPU share decided by what each node has beside training."""
    share = settings.gpus_per_actor
    if share is None:
        share = GPU_SHARE if any(node.get("GPU", 0.0) >= 1 for node in free) else 0.0
    actors = settings.actors
    if actors is None:
        rooms = [node.get("CPU", 0.0) / settings.cpus_per_actor for node in free]
        if share:
            rooms = [min(room, node.get("GPU", 0.0) / share) for room, node in zip(rooms, free, strict=True)]
        actors = max(1, min(sum(map(int, rooms)), math.ceil(images / IMAGES_PER_ACTOR)))
    return settings.model_copy(update={"actors": actors, "gpus_per_actor": share})


def wait_for(parts: Sequence[dict[str, float]], limit_s: float | None = None) -> None:
    """Ask Ray's autoscaler for nodes that hold ``parts``, and wait until they are there or the time is over.

    Args:
        parts: what each worker and actor takes of a node, by resource.
        limit_s: seconds to wait; by default ``AUTOSCALER_S`` where there is an autoscaler, else 0.

    Raises:
        JobInterruptedError: the job is asked to stop.
    """
    limit_s = AUTOSCALER_S * ray_internals.has_autoscaler() if limit_s is None else limit_s
    if not limit_s or _take(_nodes(), parts):
        return
    totals = {name: sum(part.get(name, 0.0) for part in parts) for name in ("CPU", "GPU")}
    wanted = " and ".join(f"{amount:g} {name}s" for name, amount in totals.items() if amount)
    terminal.log(f"waiting up to {limit_s:g} s for nodes with {wanted} (run.wait_s)")
    request_resources(bundles=[{name: amount for name, amount in part.items() if amount} for part in parts])
    deadline = time.monotonic() + limit_s
    try:
        while not _take(_nodes(), parts) and time.monotonic() < deadline:
            interruption.check()
            time.sleep(POLL_S)
    finally:
        request_resources(bundles=[])  # from here on what runs asks for itself


def check(parts: Sequence[dict[str, float]]) -> None:
    """``ValueError`` when the Ray cluster has too few CPUs or GPUs for all ``parts``, which would wait in vain."""
    present = ray.cluster_resources()
    for name in ("CPU", "GPU"):
        amount = sum(part[name] for part in parts)
        if amount > present.get(name, 0.0):
            raise ValueError(
                f"the run needs {amount:g} {name}s, the Ray cluster has {present.get(name, 0.0):g}; lower run.workers, "
                "run.cpus_per_worker, evaluation.actors or evaluation.gpus_per_actor, or add nodes"
            )


def free_on_nodes() -> dict[str, dict[str, float]]:
    """What each node has that nothing takes, by resource, by the node's id."""
    return dict(sorted(ray_internals.free_resources_by_node().items()))


def _nodes() -> dict[str, dict[str, float]]:
    """What each node has in all, by resource, by the node's id."""
    return {node["NodeID"]: dict(node["Resources"]) for node in ray.nodes() if node["Alive"]}


def nodes_for_actors(config: Config) -> list[str]:
    """A node for each evaluation actor, so that all workers find room beside them; none where there is no such room."""
    return _take(free_on_nodes(), _parts(config))[config.run.workers :]


def count_runs(config: Config) -> int:
    """How many such runs the cluster has room for at the same time; one is taken to have room.

    Where threads are left open, each worker counts as one.
    """
    free, count = free_on_nodes(), 0
    while _take(free, _parts(config)):
        count += 1
    return max(1, count)


def _choose_gpus(config: AnyConfig, runs: int) -> AnyConfig:
    """The settings with ``run.use_gpu`` decided, once the cluster is known to have room for a run.

    Waits for nodes that ``runs`` such runs at the same time need, if the cluster may get them.
    """
    evaluation, run = config.evaluation, config.run
    needed = run.workers + (evaluation.actors or 1) * (evaluation.gpus_per_actor or 0.0)
    use_gpu = run.use_gpu if run.use_gpu is not None else ray.cluster_resources().get("GPU", 0.0) >= needed
    config = config.model_copy(update={"run": run.model_copy(update={"use_gpu": use_gpu})})
    wait_for(_parts(config) * runs, run.wait_s)
    check(_parts(config))
    for name, part in (("run.workers", _worker(config)), ("evaluation.actors", _actor(evaluation))):
        if not any(_take({"": node}, [part]) for node in _nodes().values()):
            raise ValueError(
                f"each of {name} needs {part['CPU']:g} CPUs and {part['GPU']:g} GPUs of one node; none has so many"
            )
    return config


def _choose_actors(config: AnyConfig, manifests: Sequence[Manifest]) -> AnyConfig:
    """The settings with the evaluation actors decided by what the workers leave free."""
    free = free_on_nodes()
    beside = list(free.values()) if _take(free, [_worker(config)] * config.run.workers) else []
    images = int(manifests[0].split(config.checkpoint.split).pairs.sum())
    return config.model_copy(update={"evaluation": choose_actor_count(config.evaluation, images, beside)})


def _parts(config: Config) -> list[dict[str, float]]:
    """What each worker, then each evaluation actor takes of a node."""
    return [_worker(config)] * config.run.workers + [_actor(config.evaluation)] * (config.evaluation.actors or 1)


def _worker(config: Config) -> dict[str, float]:
    return {"CPU": float(config.run.cpus_per_worker or 1), "GPU": float(bool(config.run.use_gpu))}


def _actor(evaluation: EvaluationSettings) -> dict[str, float]:
    return {"CPU": float(evaluation.cpus_per_actor), "GPU": evaluation.gpus_per_actor or 0.0}


def _with_cpus(config: AnyConfig, cpus: int) -> AnyConfig:
    return config.model_copy(update={"run": config.run.model_copy(update={"cpus_per_worker": cpus})})


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _copy(nodes: Mapping[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {name: dict(free) for name, free in nodes.items()}


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

"""Many runs: each trained in a Ray task, as many at the same time as the cluster has room for."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from pipeline import interruption, storage, terminal
from pipeline.data.manifest import load_manifest
from pipeline.launch import capacity, cluster, preflight, trainer
from pipeline.launch.provenance import collect_provenance, find_initial_weights
from pipeline.run import history, lease, record
from pipeline.settings.config import Config


@dataclass(frozen=True)
class Training:
    """Trains and scores a run, called with its settings inside a Ray task.

    Attributes:
        provenance: what ``collect_provenance`` gave.
        lpips: reference to what ``preflight.find_lpips_weights`` gave.
    """

    provenance: dict[str, Any]
    lpips: ray.ObjectRef

    def __call__(self, config: Config) -> None:
        """Returns when the last step is done and every checkpoint is scored; raises what ``trainer.train`` raises."""
        manifests = [load_manifest(url) for url in config.data.urls]
        config = capacity.choose_devices(config, manifests)
        with lease.hold(config.run.url) as lease_id:
            trainer.train(config, manifests, self.provenance, ray.get(self.lpips), lease_id)


def train_all(configs: Sequence[Config], concurrent: int | None) -> dict[str, str]:
    """Train all runs that are not finished, as many at the same time as the cluster has room for.

    Args:
        configs: the runs, which differ in anything but their data.
        concurrent: how many; by default as many as fit.

    Returns:
        The reason of each run that failed, by its name; the same call tries it again.

    Raises:
        ValueError: a run can't be started.
        JobInterruptedError: the job is asked to stop; the same call resumes.
    """
    manifests = preflight.check_data(configs[0])
    provenance = collect_provenance(manifests, find_initial_weights(configs[0]))
    for config in configs:
        record.check_run(config, provenance)
    waiting = [each for each in configs if not history.is_finished(each.run.url, each.train.steps)]
    if not waiting:
        return {}
    lpips = preflight.find_lpips_weights(configs[0].evaluation, configs[0].checkpoint.metric)
    failed = {}
    log = storage.join(configs[0].run.root, terminal.LOG)
    with cluster.session(capacity.cpus_needed(configs[0], concurrent or 1), log, quiet=True):
        # once, since what is free changes as runs start, and runs scored on different devices don't compare
        first, concurrent = capacity.fit_to_cluster(configs[0], manifests, concurrent)
        waiting = [capacity.copy_devices(first, config) for config in waiting]
        terminal.log(capacity.describe(first, concurrent))
        preflight.check_cluster(first, manifests)
        training = Training(provenance, ray.put(lpips))
        with terminal.bar(title=f"runs, {concurrent} at a time", total=len(waiting), unit="run") as bar:
            for name, failure in _in_turn(waiting, concurrent, training):
                terminal.log(f"{name}: {failure or 'trained and scored'}")
                bar.update()
                if failure:
                    failed[name] = failure
        interruption.check()
    return failed


def start(train: Callable[[Config], None], config: Config, max_retries: int = 0) -> ray.ObjectRef:
    """Start ``train(config)`` in a task that takes no CPU of its own; the reference is ready when it ends.

    The task is none of a placement group's that this is called in, where it might wait for ever.

    Args:
        train: such as a ``Training``.
        config: the settings of the run.
        max_retries: how often it is started again when its process or its node is lost.
    """
    options = {"num_cpus": 0, "max_retries": max_retries, "scheduling_strategy": "SPREAD"}
    return ray.remote(**options)(_call).remote(train, config)


def _in_turn(configs: Sequence[Config], concurrent: int, training: Training) -> Iterator[tuple[str, str | None]]:
    """Train the runs, ``concurrent`` at a time; each one's name as it ends, with the reason where it failed."""
    waiting = deque(configs)
    running: dict[ray.ObjectRef, str] = {}
    while running or (waiting and not interruption.requested()):
        while waiting and len(running) < concurrent and not interruption.requested():
            config = waiting.popleft()
            running[start(training, config)] = config.run.name
        (done,), _ = ray.wait(list(running), num_returns=1)
        name = running.pop(done)
        try:
            ray.get(done)
        except RayError as error:
            yield name, cluster.describe_failure(error)
        else:
            yield name, None


def _call(train: Callable[[Config], None], config: Config) -> None:
    train(config)

"""The ablations of the method: what each part of it is worth, over seeds.

Each arm is the reference with one thing changed; all else, the sample order included, is the same for all arms.
"""

import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from tqdm import tqdm

from iaml import ObjectiveSettings
from iaml.network import SCALES
from pipeline import launch
from pipeline.config import Config
from pipeline.data.manifest import load_manifest
from pipeline.evaluation import results
from pipeline.evaluation.backbone import BackboneWeights

REFERENCE = "reference"
DEFAULTS = ObjectiveSettings()
# what has no effect without the mirror loss must not be set
NO_MIRROR = {"mirror_weight": 0.0} | DEFAULTS.model_dump(include={"scale_weights", "beta", "gamma"})
ARMS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    REFERENCE: {},
    "no-mirror": {"objective": NO_MIRROR},
    "reconstruction-only": {"objective": NO_MIRROR | {"ssim_weight": 0.0}},
    "no-illumination": {"objective": {"beta": 0.0, "gamma": DEFAULTS.gamma}},
    **{
        f"scale-{scale + 1}-only": {"objective": {"scale_weights": [float(index == scale) for index in range(SCALES)]}}
        for scale in range(SCALES)
    },
    "no-ema": {"teacher": {"ema_rate": 0.0}},
    "frozen-teacher": {"teacher": {"ema_rate": 1.0}},
    **{f"norm-{norm}": {"teacher": {"norm": norm}} for norm in ("running", "batch", "separate")},
}


def configs_of(base: Config, arms: Sequence[str], seeds: Sequence[int]) -> list[Config]:
    """A run's settings for each arm and seed, the reference first, stored below ``<base.run.url>``.

    Arms that change nothing of the base are left out, since the reference is them.
    """
    configs = []
    for arm in dict.fromkeys([REFERENCE, *arms]):
        settings = base.model_dump(mode="json")
        for part, changes in ARMS[arm].items():
            settings[part].update(changes)
        if arm != REFERENCE and Config.model_validate(settings) == base:
            continue
        for seed in seeds:
            settings["run"].update(name=f"{arm}-seed{seed}", storage=base.run.url, seed=seed)
            # runs that start side by side would each count on the same free cores
            settings["evaluation"]["actors"] = base.evaluation.actors or 1
            configs.append(Config.model_validate(settings))
    return configs


def train_all(configs: Sequence[Config], at_once: int | None) -> None:
    """Train all runs that are not finished, as many at the same time as the cluster has room for.

    Args:
        configs: the runs, which differ in anything but their data.
        at_once: how many; by default as many as fit.

    Raises:
        ValueError: a run can't be started, or one failed; the others are finished all the same.
    """
    manifests = launch.check_data(configs[0])
    provenance = launch.provenance_of(manifests)
    for config in configs:
        launch.check_run(config, provenance)
    waiting = [each for each in configs if not results.is_finished(each.run.url, each.train.steps)]
    if not waiting:
        return
    lpips = launch.check_scores(configs[0].evaluation, configs[0].checkpoint.metric)
    cpus = launch.cpus_needed(configs[0])
    failed = []
    with launch.cluster(cpus * (at_once or 1)):
        limit = at_once or max(1, int(ray.available_resources().get("CPU", 0) // cpus))
        shared = [provenance, ray.put(lpips)]
        with tqdm(desc=f"runs, {limit} at a time", total=len(waiting), unit="run", file=sys.stdout) as bar:
            for name, failure in _in_turn(waiting, limit, shared):
                bar.write(f"{name}: {failure or 'trained and scored'}", file=sys.stdout)
                bar.update()
                failed += [f"  {name}: {failure}"] if failure else []
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(configs)} runs failed; the same command tries them again:\n" + "\n".join(failed)
        )


def _in_turn(configs: Sequence[Config], limit: int, shared: Sequence[Any]) -> Iterator[tuple[str, str | None]]:
    """Train the runs, ``limit`` at a time; each one's name as it ends, with the reason where it failed."""
    waiting, task = deque(configs), ray.remote(num_cpus=0, max_retries=0)(_train)
    running: dict[ray.ObjectRef, str] = {}
    while waiting or running:
        while waiting and len(running) < limit:
            config = waiting.popleft()
            running[task.remote(config, *shared)] = config.run.name
        (done,), _ = ray.wait(list(running), num_returns=1)
        name = running.pop(done)
        try:
            ray.get(done)
        except RayTaskError as error:
            yield name, str(error.cause)
        except RayError as error:
            yield name, str(error)
        else:
            yield name, None


def _train(config: Config, provenance: dict[str, Any], lpips: BackboneWeights | str) -> None:
    manifests = [load_manifest(url) for url in config.data.urls]
    launch.train(launch.with_devices(config, manifests), manifests, provenance, lpips)

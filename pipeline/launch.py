"""Launches a run: checks everything that can be checked, then hands it to Ray Train."""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig, ValidationConfig
from ray.train.torch import TorchTrainer

from pipeline import storage
from pipeline.checkpoint import PROVENANCE, SETTINGS, name_at
from pipeline.config import Config, read_settings
from pipeline.data.loader import check_crops_fit
from pipeline.data.manifest import Manifest, load_manifest
from pipeline.evaluation.pool import Pool, Validation
from pipeline.evaluation.scoring import load_lpips

SNAPSHOT = "checkpoint_manager_snapshot.json"  # Ray Train's list of a run's checkpoints
LIBRARIES = ("torch", "ray", "deepspeed", "numpy", "pillow")


class TrainingStoppedError(Exception):
    """Training gave up before its last step; the message says why."""


def check_data(config: Config) -> Manifest:
    """The manifest of the data, once it is known to serve; ``ValueError`` with what to do otherwise."""
    manifest = load_manifest(config.data.url)
    check_crops_fit(manifest.split("train"), config.data.crop)
    manifest.split("dev")
    _refuse_leaks(manifest)
    return manifest


def check_scores(config: Config) -> str:
    """Where the LPIPS weights come from, or why there is no LPIPS; refuses to rank by a missing score."""
    note = load_lpips(config.evaluation, "cpu")[1]
    if "missing" not in note:
        return f"LPIPS {note['backbone']} from {note['source']} (sha256 {note['sha256'][:12]})"
    if config.checkpoint.metric == "lpips":
        raise ValueError(f"checkpoint.metric is lpips, but LPIPS is not available: {note['missing']}")
    return f"no LPIPS: {note['missing']}"


@contextmanager
def cluster(config: Config) -> Iterator[None]:
    """Within, Ray runs: the cluster that RAY_ADDRESS names, or one on this machine for the time being.

    On this machine Ray's count of CPUs is raised to what the run asks for, since they may be shared.
    """
    if "RAY_ADDRESS" in os.environ:
        ray.init()
    else:
        ray.init(num_cpus=max(_cpus_needed(config), os.cpu_count() or 1))
    try:
        yield
    finally:
        ray.shutdown()


def with_devices(config: Config) -> Config:
    """The settings with ``run.use_gpu`` decided by what the cluster has; ``ValueError`` when it has too little."""
    present = ray.cluster_resources()
    gpus = present.get("GPU", 0.0)
    needed = config.evaluation.actors * config.evaluation.gpus_per_actor
    use_gpu = config.run.use_gpu if config.run.use_gpu is not None else gpus >= config.run.workers + needed
    wanted = {"CPU": _cpus_needed(config), "GPU": config.run.workers * use_gpu + needed}
    for name, amount in wanted.items():
        if amount > present.get(name, 0.0):
            raise ValueError(
                f"the run needs {amount:g} {name}s, the Ray cluster has {present.get(name, 0.0):g}; lower run.workers, "
                "run.cpus_per_worker or evaluation.actors, or add nodes"
            )
    return config.model_copy(update={"run": config.run.model_copy(update={"use_gpu": use_gpu})})


def claim(config: Config, provenance: dict[str, Any]) -> None:
    """Take the run's name: store settings and provenance, or check that they are those of the run to continue.

    Raises:
        ValueError: a run of this name has other settings or data, or its storage can't be written to.
    """
    url = config.run.url
    storage.check_writable(url)
    known = storage.join(url, SETTINGS)
    if storage.exists(known):
        _refuse_another_run(config, provenance, url)
        _set_torn_snapshot_aside(url)
        return
    storage.write_text(storage.join(url, PROVENANCE), json.dumps(provenance, indent=2))
    storage.write_text(known, config.to_yaml())


def provenance_of(manifest: Manifest) -> dict[str, Any]:
    """What the weights come from besides the settings: code, data and libraries."""
    return {
        "git": _git_hash(),
        "data": manifest.url,
        "manifest_sha256": manifest.checksum,
        "libraries": {name: version(name) for name in LIBRARIES},
    }


def fit(config: Config, manifest: Manifest, provenance: dict[str, Any]) -> None:
    """Train, scoring each checkpoint on the way; returns when all are scored.

    Raises:
        TrainingStoppedError: training gave up before its last step.
        ray.train.TrainingFailedError: the run failed more often than ``run.max_failures`` allows.
    """
    from pipeline.training.loop import train  # brings DeepSpeed, which takes seconds and is not needed before

    filesystem, path = storage.arrow_filesystem(config.run.storage)
    # checkpoints are chosen by the development split; the test split is scored by evaluate.py alone
    validation = Validation(config, Pool.start(config, manifest, "dev"))
    trainer = TorchTrainer(
        train,
        train_loop_config={"config": config.model_dump(mode="json"), "provenance": provenance},
        scaling_config=ScalingConfig(
            num_workers=config.run.workers,
            use_gpu=bool(config.run.use_gpu),
            resources_per_worker={"CPU": config.run.cpus_per_worker, **({"GPU": 1} if config.run.use_gpu else {})},
        ),
        run_config=RunConfig(
            name=config.run.name,
            storage_path=path,
            storage_filesystem=filesystem,
            logging_config=LoggingConfig(log_level="WARNING"),
            failure_config=FailureConfig(max_failures=config.run.max_failures),
            checkpoint_config=CheckpointConfig(
                checkpoint_score_attribute=config.checkpoint.ranking,
                checkpoint_score_order="max" if config.checkpoint.higher_is_better else "min",
            ),
        ),
        # its own scheduling strategy keeps the task out of a placement group that this driver may run in
        validation_config=ValidationConfig(
            fn=validation, ray_remote_kwargs={"num_cpus": 0, "scheduling_strategy": "SPREAD"}
        ),
    )
    trainer.fit()
    if not storage.exists(storage.join(config.run.url, name_at(config.train.steps))):
        raise TrainingStoppedError(
            f"{config.train.nonfinite_limit} steps in a row (train.nonfinite_limit) had a loss or gradient that is not "
            "finite; lower optimizer.learning_rate, set optimizer.clip, or inspect the data, under another run.name"
        )


def _refuse_leaks(manifest: Manifest) -> None:
    trained = {record.high_sha256: record.key for record in manifest.split("train")}
    held_out = [record for record in manifest.records if record.split != "train" and record.high_sha256 in trained]
    if held_out:
        names = ", ".join(f"{record.key} ({record.split}) is {trained[record.high_sha256]}" for record in held_out[:5])
        raise ValueError(
            f"{manifest.url}: {len(held_out)} held-out images are training images as well: {names}; pack again"
        )


def _cpus_needed(config: Config) -> int:
    return config.run.workers * config.run.cpus_per_worker + config.evaluation.actors * config.evaluation.cpus_per_actor


def _refuse_another_run(config: Config, provenance: dict[str, Any], url: str) -> None:
    before = Config.model_validate(read_settings(storage.join(url, SETTINGS)))
    differences = _differences(before.identity(), config.identity())
    checksum = json.loads(storage.read_text(storage.join(url, PROVENANCE)))["manifest_sha256"]
    if checksum != provenance["manifest_sha256"]:
        differences.append(f"data: manifest {checksum[:12]} before, {provenance['manifest_sha256'][:12]} now")
    if differences:
        raise ValueError(
            f"{url}: a run of this name exists with other settings or data; choose another run.name\n  "
            + "\n  ".join(differences)
        )


def _differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name in before:
        if isinstance(before[name], dict):
            found += _differences(before[name], now[name], f"{prefix}{name}.")
        elif before[name] != now[name]:
            found.append(f"{prefix}{name}: {before[name]} before, {now[name]} now")
    return found


def _set_torn_snapshot_aside(url: str) -> None:
    """Ray writes its list of checkpoints in place; a driver killed meanwhile leaves one that can't be read."""
    snapshot = storage.join(url, SNAPSHOT)
    if storage.exists(snapshot):
        try:
            json.loads(storage.read_text(snapshot))
        except json.JSONDecodeError:
            storage.delete(snapshot)


def _git_hash() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown (not a git checkout)"

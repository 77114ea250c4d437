"""One run: handed to Ray Train once it has been checked, its checkpoints scored meanwhile."""

from collections.abc import Sequence
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, ValidationConfig
from ray.train.torch import TorchTrainer

from pipeline import interruption, ray_internals, storage, terminal
from pipeline.data.manifest import Manifest
from pipeline.evaluation.lpips_weights import BackboneWeights
from pipeline.evaluation.pool import Pool
from pipeline.evaluation.validation import Validation
from pipeline.launch import capacity
from pipeline.launch.cluster import is_own, propagate_address
from pipeline.run import record
from pipeline.run.checkpoint import DamagedCheckpointError, invalidate
from pipeline.run.history import unscored_checkpoints
from pipeline.settings.config import Config
from pipeline.training import worker


class TrainingStoppedError(Exception):
    """Training gave up before its last step; the message says why."""


def train(
    config: Config,
    manifests: Sequence[Manifest],
    provenance: dict[str, Any],
    lpips: BackboneWeights | str,
    lease_id: str,
) -> None:
    """Train a run that has been checked, on all data sets, scoring each checkpoint on the first one's.

    Returns when the last step is done and every checkpoint is scored.

    Args:
        config: its settings, as ``capacity.choose_devices`` gave them.
        manifests: of the data sets.
        provenance: what ``collect_provenance`` gave.
        lpips: what ``preflight.find_lpips_weights`` gave.
        lease_id: what ``lease.hold`` gave.

    Raises:
        TrainingStoppedError: training gave up before its last step.
        JobInterruptedError: the job is asked to stop; the same call resumes.
        ray.train.TrainingFailedError: the run failed more often than ``run.max_failures`` allows.
    """
    record.claim(config, provenance)
    ray_internals.start_resource_coordinator()
    # checkpoints are chosen by the development split; the test split is scored by evaluate.py alone
    nodes = capacity.nodes_for_actors(config)
    pool = Pool.start(config.evaluation, manifests[0], config.checkpoint.split, lpips, nodes)
    validation = Validation(config, pool)
    trainer = make_trainer(config, provenance, validation, lease_id)
    try:
        with propagate_address():
            interruption.run_shielded(trainer.fit)
        interruption.check()
        # Ray forgets a checkpoint whose scoring was cut off together with its driver; others were scored elsewhere
        for url in unscored_checkpoints(config.run.url, config.evaluation.conditions):
            _score(validation, url)
    except ray.train.TrainingFailedError as error:
        if reason := record.stop_reason(config.run.url):
            raise TrainingStoppedError(reason) from error
        raise
    finally:
        pool.stop()
    if reason := record.stop_reason(config.run.url):
        raise TrainingStoppedError(reason)


def make_trainer(config: Config, provenance: dict[str, Any], validation: Validation, lease_id: str) -> TorchTrainer:
    """Ray Train's trainer of a run."""
    filesystem, path = storage.arrow_filesystem(config.run.root)
    trainer = TorchTrainer(
        worker.train,
        train_loop_config={"config": config.model_dump(mode="json"), "provenance": provenance, "lease": lease_id},
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
        ),
        # its own scheduling strategy keeps the task out of a placement group that this driver may run in
        validation_config=ValidationConfig(
            fn=validation, ray_remote_kwargs={"num_cpus": 0, "scheduling_strategy": "SPREAD"}
        ),
    )
    ray_internals.start_fewer_actors(trainer, keep_cleaner=not is_own())
    return trainer


def _score(validation: Validation, url: str) -> None:
    try:
        validation.score(url)
    except DamagedCheckpointError as error:
        terminal.log(f"{error}; this checkpoint is not scored")
        invalidate(url)

"""Checkpoints beside training: of a step, only the copy to host memory takes time.

all workers, in a step:    wait for the last checkpoint -> copy the state to host memory -> report to Ray Train
rank 0, beside training:   lease still ours -> metrics -> files -> upload -> older interim checkpoints freed
Ray Train, once written:   has it scored; an error in writing it ends the run
"""

import tempfile
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import ray.train
from ray.train import CheckpointUploadMode

from iaml import TeacherStudent
from pipeline import storage
from pipeline.run import checkpoint, lease, record
from pipeline.run.checkpoint import Progress, Snapshot
from pipeline.settings.config import Config
from pipeline.terminal import log
from pipeline.training.engine import Engine
from pipeline.training.monitor import Monitor


class CheckpointWriter(AbstractContextManager["CheckpointWriter"]):
    """Writes a run's checkpoints one after the other; every worker has one, and rank 0's writes.

    When the context ends, for whatever reason, what is being written is written first.

    Args:
        config: the run's settings.
        provenance: stored with each checkpoint.
        lease_id: of the driver's lease.
    """

    def __init__(self, config: Config, provenance: Mapping[str, Any], lease_id: str) -> None:
        self._config = config
        self._provenance = provenance
        self._lease_id = lease_id
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()

    def wait(self) -> None:
        """Return once the last checkpoint is written; raises what has kept it from being.

        Raises:
            LeaseLostError: another process trains the run by now.
            ValueError: of the storage; it is stored as why the run gives up.
            OSError: of the storage.
        """
        if self._pending:
            self._pending.result()

    def write(
        self, task: TeacherStudent, engine: Engine, progress: Progress, prefix: str, monitor: Monitor | None
    ) -> None:
        """Have a checkpoint written beside training and, unless it is an interim one, scored.

        All workers must call this together. It waits for the checkpoint before, so that host memory holds one copy of
        the state, and raises what ``wait`` does.

        Args:
            task: the method, after ``progress``.
            engine: that trains it.
            progress: how far the run has come.
            prefix: the kind of checkpoint.
            monitor: rank 0's; none on the other workers.
        """
        self.wait()
        optimizer = engine.optimizer_state()
        name = checkpoint.name_at(progress.step, prefix)
        if monitor is None:  # each worker reports equally often
            ray.train.report({}, checkpoint_dir_name=name, checkpoint_upload_mode=CheckpointUploadMode.ASYNC)
            return
        snapshot = Snapshot.take(task, optimizer)
        self._pending = self._thread.submit(self._store, snapshot, progress, prefix, monitor)
        _report(name, self._pending, is_scored=prefix == checkpoint.PREFIX)

    def _store(self, snapshot: Snapshot, progress: Progress, prefix: str, monitor: Monitor) -> None:
        run, name = self._config.run.url, checkpoint.name_at(progress.step, prefix)
        # Ray ends the workers at an error here, perhaps before one that waits could store the reason
        with record.stop_on_value_error(run), tempfile.TemporaryDirectory() as folder:
            lease.check(run, self._lease_id)
            monitor.save()
            checkpoint.write(Path(folder), snapshot, progress, self._config, self._provenance)
            url = storage.join(run, name)
            storage.upload_folder(Path(folder), url, last=checkpoint.STATE, stale=checkpoint.SCORED)
            if prefix == checkpoint.PREFIX:
                monitor.note_checkpoint(progress.step)
            for older in checkpoint.complete_checkpoints(run, checkpoint.INTERIM):
                if storage.name_of(older) != name:
                    checkpoint.delete_weights(older)
            log(f"checkpoint {url}")


def _report(name: str, pending: Future[None], *, is_scored: bool) -> None:
    """Tell Ray Train of a checkpoint that is being written; its own thread waits for it, and for those before."""

    def wait_until_written(place: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        pending.result()
        return place

    place = ray.train.get_context().get_storage()
    ray.train.report(
        {},
        checkpoint=ray.train.Checkpoint(f"{place.experiment_fs_path}/{name}", filesystem=place.storage_filesystem),
        checkpoint_dir_name=name,
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        checkpoint_upload_fn=wait_until_written,
        delete_local_checkpoint_after_upload=False,  # it lies where it stays
        validation=is_scored,
    )

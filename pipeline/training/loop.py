"""The training loop, as each of Ray Train's workers runs it.

resume from the newest checkpoint, if there is one
for each step:
read this worker's part of the global batch
losses of student and teacher -> gradients -> optimizer step -> teacher's average
now and then: record metrics; copy the state to host memory, for a checkpoint to be written and scored beside training
when asked to stop: have a checkpoint written, wait for it and return
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import ray.train
import ray.train.collective
import ray.train.torch
import torch
import torch.distributed as dist

from iaml import TeacherStudent, kernels
from pipeline.data.loader import Loader
from pipeline.data.manifest import load_manifest
from pipeline.data.order import WorkerShare
from pipeline.run import checkpoint, lease, record
from pipeline.run.checkpoint import Progress
from pipeline.settings.config import Config
from pipeline.telemetry import Telemetry
from pipeline.terminal import log
from pipeline.training import topology
from pipeline.training.checkpointing import CheckpointWriter
from pipeline.training.engine import Engine, StepResult
from pipeline.training.feed import feed
from pipeline.training.memory import keep_freed_memory
from pipeline.training.monitor import Monitor
from pipeline.training.preemption import Notices

NOT_FINITE = (
    "steps in a row (train.nonfinite_limit) had a loss or gradient that is not finite; lower optimizer.learning_rate, "
    "set optimizer.clip, or inspect the data, under another run.name"
)


def train(settings: dict[str, Any]) -> None:
    """Train one worker's share of a run; every worker of the group runs this.

    What the user must change (a ``ValueError``, such as bad data), and too many steps in a row that are not finite, end
    the run early. The reason is stored with it, since workers that were started again would come to the same end.

    Args:
        settings: ``config`` (the run's settings), ``provenance`` (stored with each checkpoint) and ``lease`` (the id
            of the driver's, see ``pipeline.run.lease``).
    """
    logging.getLogger().setLevel(logging.WARNING)  # Ray logs each report, which the monitor has said already
    config = Config.model_validate(settings["config"])
    if record.stop_reason(config.run.url):
        return
    if lease.is_lost(config.run.url, settings["lease"]):
        return  # the driver says it; workers that were started again would lose their checkpoints again
    provenance, lease_id = settings["provenance"], settings["lease"]
    with record.stop_on_value_error(config.run.url), CheckpointWriter(config, provenance, lease_id) as writer:
        _train(config, provenance, lease_id, writer)


def _train(config: Config, provenance: dict[str, Any], lease_id: str, writer: CheckpointWriter) -> None:
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    share = WorkerShare(rank, workers, config.micro_batch, config.train.accumulation)
    device = ray.train.torch.get_device()
    if config.run.cpus_per_worker:  # Ray leaves an OMP_NUM_THREADS that the node already has as it is
        torch.set_num_threads(config.run.cpus_per_worker)
    keep_freed_memory()
    if rank == 0:
        lease.check(config.run.url, lease_id)  # before checkpoints are invalidated
    task, engine, progress = _build(config, provenance.get("start_from"), device)
    manifests = [load_manifest(url) for url in config.data.urls]
    loader = Loader(manifests, config.data, share, config.run.seed, pinned=device.type == "cuda")
    monitor = Monitor(config.run.url, config.train.steps, progress.step, share.global_batch) if rank == 0 else None
    places = topology.gather()
    if monitor:
        caches = [str(reader.cache) for reader in loader.readers if reader.cache]
        _log_all([*topology.describe(places), *_describe_arithmetic(engine), *caches])
    window, notices = _Window(progress, share), Notices(share.rank, device)
    telemetry = Telemetry(run=config.run.name, rank=str(share.rank))
    for step, batches in feed(loader.steps(progress.step, config.train.steps), device):
        checkpoint.seed_random_numbers(config.run.seed, step, share.rank)
        rate = config.optimizer.rate_at(step, config.train.steps)
        window.add(engine.step(batches, rate))
        notice = notices.poll()
        done = step + 1
        last = done == config.train.steps
        is_logged, is_saved = (last or done % every == 0 for every in (config.train.log_every, config.checkpoint.every))
        # whether a step was applied is known once the device has computed it, which is waited for only where it matters
        if is_logged or is_saved or notice or window.may_reach(config.train.nonfinite_limit):
            progress = window.settle()
            if progress.nonfinite_in_a_row == config.train.nonfinite_limit:
                if monitor:
                    record.stop(config.run.url, f"{config.train.nonfinite_limit} {NOT_FINITE}")
                break
        if is_logged:
            metrics = window.means(rate)
            if config.data.on_bad_data == "skip":
                metrics["skipped_pairs"] = _sum_over_workers(loader.skipped, device)
            telemetry.record(loader.state()._asdict())
            if monitor:
                monitor.record(progress.step, metrics)
        if is_saved:
            writer.write(task, engine, progress, checkpoint.PREFIX, monitor)
        elif notice:
            writer.write(task, engine, progress, checkpoint.INTERIM, monitor)
        if notice == "stop":
            break
    writer.wait()
    if monitor:
        monitor.close()


def _build(
    config: Config, start: Mapping[str, Any] | None, device: torch.device
) -> tuple[TeacherStudent, Engine, Progress]:
    """The method and its engine, with the state of the newest checkpoint, else as ``start`` or the seed has it."""
    torch.manual_seed(config.run.seed)
    task = TeacherStudent(config.network, config.objective, config.teacher)
    rank = ray.train.get_context().get_world_rank()
    newest = _newest_checkpoint(config.run.url, rank)
    progress = Progress()
    if newest:
        progress = checkpoint.load_weights(newest, task)
    elif start:
        progress = checkpoint.load_start(start, task)
    task.to(device)
    engine = Engine(task, config.optimizer, config.micro_batch, config.train.accumulation, config.train.batch_norm)
    if newest:
        engine.load_optimizer_state(checkpoint.load_optimizer(newest), progress.updates)
    if rank == 0 and newest:
        log(f"resuming from {newest} at step {progress.step}")
    elif rank == 0 and start:
        log(f"starting from {start['url']}")
    return task, engine, progress


def _newest_checkpoint(run: str, rank: int) -> str | None:
    """The checkpoint to resume from, which rank 0 finds for all: what Ray knows may be gone, or not the newest."""
    newest = None
    if rank == 0:
        newest = checkpoint.newest(run, log)
        checkpoint.invalidate_after(run, checkpoint.read_progress(newest).step if newest else 0)
    found: str | None = ray.train.collective.broadcast_from_rank_zero(newest)
    return found


def _sum_over_workers(number: float, device: torch.device) -> float:
    total = torch.tensor(float(number), device=device)
    dist.all_reduce(total)
    return float(total)


class _Window:
    """The steps since the last record, and how far they have brought the run.

    Args:
        progress: where the run is.
        share: this worker's part of each step.
    """

    def __init__(self, progress: Progress, share: WorkerShare) -> None:
        self._progress = progress
        self._share = share
        self._new: list[StepResult] = []  # of which it is not known yet whether they were applied
        self._applied: list[StepResult] = []

    def add(self, result: StepResult) -> None:
        self._new.append(result)

    def may_reach(self, limit: int) -> bool:
        """Whether so many steps in a row may have been skipped by now."""
        return self._progress.nonfinite_in_a_row + len(self._new) >= limit

    def settle(self) -> Progress:
        """Wait for the steps that were added, name those that were skipped, and return where the run is."""
        new, self._new = self._new, []
        applied = torch.stack([result.applied for result in new]).tolist() if new else []
        for result, is_applied in zip(new, applied, strict=True):
            self._progress = self._progress.after_step(self._share.global_batch, is_applied)
            if is_applied:
                self._applied.append(result)
            else:
                _log_skipped_step(self._progress, result, self._share.rank)
        return self._progress

    def means(self, learning_rate: float) -> dict[str, float]:
        """Means over the applied steps since the last record and all workers; all workers must call this together."""
        results, self._applied = self._applied, []
        if not results:
            return {"learning_rate": learning_rate}
        names = list(results[0].losses)
        losses = torch.stack([torch.stack([result.losses[name] for name in names]) for result in results]).mean(dim=0)
        dist.all_reduce(losses)
        losses /= dist.get_world_size()
        return {
            **dict(zip(names, losses.tolist(), strict=True)),
            "learning_rate": learning_rate,
            "grad_norm": float(torch.stack([result.grad_norm for result in results]).mean()),
            "ema_rate": float(results[-1].ema_rate),
        }


def _describe_arithmetic(engine: Engine) -> list[str]:
    lines = [f"networks in {'bf16' if engine.is_bf16 else 'float32'}"]
    if problem := kernels.problem():
        lines.append(f"no fused kernels, so that CPUs train more slowly: {problem}")
    return lines


def _log_all(lines: Sequence[str]) -> None:
    for line in lines:
        log(line)


def _log_skipped_step(progress: Progress, result: StepResult, rank: int) -> None:
    if rank == 0:
        terms = "  ".join(f"{name} {float(value):.4g}" for name, value in result.losses.items())
        log(f"step {progress.step} skipped: the loss or its gradient is not finite on some worker (here: {terms})")

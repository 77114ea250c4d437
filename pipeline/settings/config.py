"""The settings of a run: composed from the parts', read from presets, files and the command line."""

from typing import Any, Self, TypeVar

import yaml
from pydantic import model_validator

from iaml import NetworkSettings, ObjectiveSettings, Settings, TeacherSettings
from iaml.network import STRIDE
from pipeline.settings.checkpoint import CheckpointSettings
from pipeline.settings.data import DataSettings
from pipeline.settings.evaluation import EvaluationSettings
from pipeline.settings.optimizer import OptimizerSettings
from pipeline.settings.run import RunSettings
from pipeline.settings.train import TrainSettings

MAY_CHANGE = (
    ("data", "url"),  # where data sets lie is not what they hold: their checksums are compared instead
    ("data", "extra_urls"),
    ("data", "on_bad_data"),  # a run that bad data stopped may resume without them
    ("data", "cache"),  # how fast samples come, not which
    ("data", "cache_gib"),
    ("data", "threads"),
    ("data", "fetches"),
    ("data", "ahead"),
    ("train", "log_every"),  # only what is shown
    ("train", "nonfinite_limit"),  # when to give up, not what to do before
    ("optimizer", "zero_stage"),  # who keeps which moments; checkpoints hold them whole
    ("optimizer", "channels_last"),  # how feature maps lie in memory
)


class Config(Settings):
    """All settings of a run."""

    run: RunSettings
    data: DataSettings
    train: TrainSettings
    optimizer: OptimizerSettings = OptimizerSettings()
    network: NetworkSettings = NetworkSettings()
    objective: ObjectiveSettings = ObjectiveSettings()
    teacher: TeacherSettings = TeacherSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    evaluation: EvaluationSettings = EvaluationSettings()

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Self:
        parts = self.run.workers * self.train.accumulation
        if self.train.global_batch % parts:
            raise ValueError(
                f"train.global_batch ({self.train.global_batch}) must be a multiple of "
                f"run.workers x train.accumulation ({self.run.workers} x {self.train.accumulation})"
            )
        self._check_batch_norm()
        if self.optimizer.warmup_steps >= self.train.steps:
            raise ValueError(
                f"optimizer.warmup_steps ({self.optimizer.warmup_steps}) must be below train.steps ({self.train.steps})"
            )
        if self.checkpoint.metric == "lpips" and self.evaluation.lpips == "none":
            raise ValueError("checkpoint.metric is lpips, which evaluation.lpips: none turns off")
        return self

    def _check_batch_norm(self) -> None:
        own = self.train.batch_norm == "worker"
        if own and self.run.workers == 1:
            raise ValueError(
                "train.batch_norm: worker has no effect with one worker; raise run.workers or leave it out"
            )
        parts, named, whose = self.train.accumulation, f"train.accumulation ({self.train.accumulation})", "all workers"
        if own:
            parts, whose = parts * self.run.workers, "a worker"
            named = f"run.workers x train.accumulation ({self.run.workers} x {self.train.accumulation})"
        # at the coarsest level, each channel has as many values for its statistics
        if self.train.global_batch // parts * (self.data.crop // STRIDE) ** 2 < 2:
            raise ValueError(
                f"batch normalisation needs more than one pair of {STRIDE}-pixel crops in a forward pass of {whose}: "
                f"raise data.crop ({self.data.crop}), or train.global_batch ({self.train.global_batch}) above {named}"
            )

    @property
    def micro_batch(self) -> int:
        """Pairs in one forward pass of one worker."""
        return self.train.global_batch // (self.run.workers * self.train.accumulation)

    @property
    def rankings(self) -> frozenset[str]:
        """The metrics that checkpoints are ranked by."""
        return frozenset({self.checkpoint.metric})

    def to_yaml(self) -> str:
        """The resolved settings as YAML that ``--config`` takes."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def identity(self) -> dict[str, Any]:
        """The settings that decide the weights, rounding apart; a run may only be resumed with the same ones."""
        parts = {"data", "train", "optimizer", "network", "objective", "teacher"}
        identity: dict[str, Any] = {"seed": self.run.seed, **self.model_dump(mode="json", include=parts)}
        # of `run` all but the seed may change: batches and their global statistics are the same on any number of
        # workers; what stays though it looks like a matter of speed: train.accumulation, since batch normalisation
        # spans one forward pass, and optimizer.precision, which is more than rounding
        for part, name in MAY_CHANGE:
            del identity[part][name]
        if self.train.batch_norm == "worker":
            identity["run"] = {"workers": self.run.workers}
        return identity


AnyConfig = TypeVar("AnyConfig", bound=Config)


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """The settings in which two identities differ: dotted name, value before, value now, None where missing."""
    found: list[tuple[str, Any, Any]] = []
    for name in before | now:
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{name}.")
        elif old != new:
            found.append((f"{prefix}{name}", old, new))
    return found

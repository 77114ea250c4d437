"""The settings of a run: composed from the parts', read from presets, files and the command line."""

import argparse
from pathlib import Path
from typing import Any, Self, TypeVar

import yaml
from pydantic import model_validator

from iaml import NetworkSettings, ObjectiveSettings, Settings, TeacherSettings
from iaml.network import STRIDE
from pipeline import storage
from pipeline.settings import command_line, plain_yaml
from pipeline.settings.data import DataSettings
from pipeline.settings.evaluation import EvaluationSettings
from pipeline.settings.training import CheckpointSettings, OptimizerSettings, RunSettings, TrainSettings

PRESETS = Path(__file__).parent / "presets"


MAY_CHANGE = (
    ("data", "url"),  # where data sets lie is not what they hold: their checksums are compared instead
    ("data", "extra_urls"),
    ("data", "on_bad_data"),  # a run that bad data stopped may go on without them
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
        # batch normalisation, whose statistics span all workers, has this much of each channel at the coarsest level
        values = self.train.global_batch // self.train.accumulation * (self.data.crop // STRIDE) ** 2
        if values < 2:
            raise ValueError(
                f"batch normalisation needs more than one pair of {STRIDE}-pixel crops in a forward pass over all "
                f"workers: raise data.crop ({self.data.crop}), or train.global_batch ({self.train.global_batch}) above "
                f"train.accumulation ({self.train.accumulation})"
            )
        if self.optimizer.warmup_steps >= self.train.steps:
            raise ValueError(
                f"optimizer.warmup_steps ({self.optimizer.warmup_steps}) must be below train.steps ({self.train.steps})"
            )
        if self.checkpoint.metric == "lpips" and self.evaluation.lpips == "none":
            raise ValueError("checkpoint.metric is lpips, which evaluation.lpips: none turns off")
        return self

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
        """The settings that decide the weights, rounding apart; a run may only be continued with the same ones."""
        parts = {"data", "train", "optimizer", "network", "objective", "teacher"}
        identity: dict[str, Any] = {"seed": self.run.seed, **self.model_dump(mode="json", include=parts)}
        # of `run` all but the seed may change: batches and their statistics are the same on any number of workers;
        # what stays though it looks like a matter of speed: train.accumulation, since batch normalisation spans one
        # forward pass of all workers, and optimizer.precision, which is more than rounding
        for part, name in MAY_CHANGE:
            del identity[part][name]
        return identity


AnyConfig = TypeVar("AnyConfig", bound=Config)


def preset_names() -> list[str]:
    """The presets that ``--config`` knows by name."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def parse_config(
    parser: argparse.ArgumentParser, model: type[AnyConfig], argv: list[str] | None = None
) -> tuple[AnyConfig, dict[str, Any]]:
    """The settings from ``--config`` overridden by options; also the options that ``parser`` had of its own."""
    parser.add_argument(
        "--config", required=True, metavar="NAME|FILE", help=f"a preset ({', '.join(preset_names())}) or a YAML file"
    )
    command_line.add_options(parser, model)
    options = vars(parser.parse_args(command_line.normalise(argv)))
    base = read_settings(_settings_file(options.pop("config")))
    overrides = {name: value for name, value in options.items() if "." in name}
    parts: dict[str, Any] = {name: {} for name in model.model_fields}  # so that a missing field is named in full
    settings = _merged(_merged(parts, base), command_line.nested(overrides))
    return model.model_validate(settings), {name: options[name] for name in options.keys() - overrides.keys()}


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


def read_settings(url: str) -> dict[str, Any]:
    """The mapping in a YAML file, values as they were written; ``ValueError`` naming the file when there is none."""
    try:
        text = storage.read_text(url)
    except FileNotFoundError as error:
        raise ValueError(f"{url}: no such settings file ({error})") from error
    except OSError as error:
        raise ValueError(f"{url}: cannot be read ({error})") from error
    try:
        settings = plain_yaml.load(text)
    except ValueError as error:
        raise ValueError(f"{url}: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{url}: must hold settings by name, such as 'train: {{steps: 1000}}'")
    return settings


def _settings_file(name: str) -> str:
    preset = PRESETS / f"{name}.yaml"
    if preset.exists():
        return str(preset)
    if not name.endswith((".yaml", ".yml")):
        raise ValueError(f"--config {name}: not a preset ({', '.join(preset_names())}) nor a .yaml file")
    return name


def _merged(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in overrides.items():
        below = merged.get(name)
        merged[name] = _merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged

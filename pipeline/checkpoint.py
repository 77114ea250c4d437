"""Checkpoints: everything that advances in training, written whole or not at all.

<run>/checkpoint-00001000/      or interim-00001234/, written out of turn to continue from, and never scored
student.safetensors     the student, loadable into iaml.AutoEncoder as it is
teacher.safetensors     the averaged decoder and the statistics of clean images
optimizer.safetensors   Adam's moments, whole, so that any number of workers can load them
settings.yaml           the resolved settings
provenance.json         git hash, manifest checksum, library versions
state.json              the integers that place the run; written last, so it marks a whole checkpoint
scores-dev.parquet, pictures-dev/, grid-dev.png   added when the checkpoint has been scored
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load, save_file
from torch import Tensor, nn

from iaml import AutoEncoder, NetworkSettings, TeacherStudent
from pipeline import storage
from pipeline.config import Config, read_settings

PREFIX, INTERIM = "checkpoint-", "interim-"
STUDENT, TEACHER, OPTIMIZER = "student.safetensors", "teacher.safetensors", "optimizer.safetensors"
SETTINGS, PROVENANCE, STATE = "settings.yaml", "provenance.json", "state.json"
STOPPED = "stopped.txt"  # in a run's folder: why it gave up
WEIGHT_FILES = (STUDENT, TEACHER, OPTIMIZER)


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        step: steps taken, those left out included; the schedule and random numbers follow from it.
        samples: position in the stream of samples.
        updates: steps that moved the weights, and with them the teacher.
        nonfinite_in_a_row: steps left out since the last one that moved the weights.
    """

    step: int = 0
    samples: int = 0
    updates: int = 0
    nonfinite_in_a_row: int = 0

    def after_step(self, samples: int, applied: bool) -> "Progress":
        """The progress after one more step of ``samples`` samples."""
        return replace(
            self,
            step=self.step + 1,
            samples=self.samples + samples,
            updates=self.updates + applied,
            nonfinite_in_a_row=0 if applied else self.nonfinite_in_a_row + 1,
        )


def name_at(step: int, prefix: str = PREFIX) -> str:
    """The folder name of the checkpoint after ``step`` steps."""
    return f"{prefix}{step:08d}"


def step_of(name: str, prefix: str = PREFIX) -> int | None:
    """The step in a folder's name as ``name_at`` gives it; none for other names, such as a copy's."""
    digits = name.removeprefix(prefix)
    return int(digits) if digits.isdecimal() and name_at(int(digits), prefix) == name else None


def write(
    folder: Path,
    task: TeacherStudent,
    optimizer: dict[str, Tensor],
    progress: Progress,
    config: Config,
    provenance: dict[str, Any],
) -> None:
    """Write a checkpoint's files into a local folder, to be uploaded by ``storage.upload_folder``."""
    save_file(_tensors(task.student), folder / STUDENT)
    save_file(_tensors(_teacher_parts(task)), folder / TEACHER)
    save_file(optimizer, folder / OPTIMIZER)
    (folder / SETTINGS).write_text(config.to_yaml())
    (folder / PROVENANCE).write_text(json.dumps(provenance, indent=2))
    (folder / STATE).write_text(json.dumps(asdict(progress), indent=2))


def load_weights(url: str, task: TeacherStudent) -> Progress:
    """Put a checkpoint's student and teacher into ``task``; returns how far that run had come."""
    task.student.load_state_dict(_read_tensors(url, STUDENT))
    _teacher_parts(task).load_state_dict(_read_tensors(url, TEACHER))
    progress = read_progress(url)
    task.updates = progress.updates
    return progress


def read_progress(url: str) -> Progress:
    """How far the run had come at a checkpoint."""
    return Progress(**json.loads(storage.read_text(storage.join(url, STATE))))


def load_optimizer(url: str) -> dict[str, Tensor]:
    """Adam's moments of a checkpoint, as ``Engine.load_optimizer_state`` takes them."""
    return _read_tensors(url, OPTIMIZER)


def kind_of(url: str) -> Literal["run", "checkpoint"] | None:
    """What lies in the folder ``url`` by what it holds, whatever it is called; none where it is neither."""
    names = set(storage.listdir(url))
    if names & {STUDENT, STATE}:
        return "checkpoint"
    return "run" if SETTINGS in names else None


def load_candidates(url: str, network: NetworkSettings) -> dict[str, AutoEncoder]:
    """The networks of a checkpoint for inference: ``student``, and ``averaged`` where it holds a teacher's decoder."""
    student = AutoEncoder(network)
    student.load_state_dict(_read_tensors(url, STUDENT))
    if not storage.exists(storage.join(url, TEACHER)):
        return {"student": student.eval()}
    averaged = AutoEncoder(network)
    averaged.encoder.load_state_dict(student.encoder.state_dict())
    teacher = _read_tensors(url, TEACHER)
    averaged.decoder.load_state_dict(
        {name.removeprefix("decoder."): value for name, value in teacher.items() if name.startswith("decoder.")}
    )
    return {"student": student.eval(), "averaged": averaged.eval()}


def read_config(url: str) -> Config:
    """The settings beside a checkpoint or in a run's folder; ``ValueError`` when there are none."""
    return Config.model_validate(read_settings(storage.join(url, SETTINGS)))


def complete_checkpoints(run: str, prefix: str = PREFIX) -> list[str]:
    """URLs of the run's checkpoints of a kind that still hold whole weights, oldest first."""
    urls = [storage.join(run, name) for name in storage.listdir(run) if step_of(name, prefix) is not None]
    return [url for url in urls if {STATE, *WEIGHT_FILES} <= set(storage.listdir(url))]


def newest(run: str) -> str | None:
    """URL of the run's newest whole checkpoint of any kind."""
    whole = complete_checkpoints(run) + complete_checkpoints(run, INTERIM)
    return max(whole, key=lambda url: read_progress(url).step, default=None)


def delete_weights(url: str) -> None:
    """Free a checkpoint's space; its scores, grid and settings stay for the report."""
    for name in WEIGHT_FILES:
        storage.delete(storage.join(url, name))


def _teacher_parts(task: TeacherStudent) -> nn.ModuleDict:
    return nn.ModuleDict({"decoder": task.teacher_decoder, "clean_statistics": task.clean_statistics})


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}


def _read_tensors(url: str, name: str) -> dict[str, Tensor]:
    where = storage.join(url, name)
    try:
        return load(storage.read_bytes(where))
    except FileNotFoundError as error:
        raise ValueError(
            f"{where}: not found; give a checkpoint's folder whose weights were kept, or the run's folder"
        ) from error


def seed_random_numbers(seed: int, step: int, rank: int) -> None:
    """Make torch's random numbers a function of (seed, step, rank), so that none need be saved."""
    torch.manual_seed((seed * 1_000_003 + step) * 4_096 + rank)

"""Checkpoints: everything that advances in training, written whole or not at all.

<run>/checkpoint-00001000/      or interim-00001234/, written out of turn to resume from, and never scored
student.safetensors     the student, loadable into iaml.AutoEncoder as it is
teacher.safetensors     the averaged decoder and the statistics of clean images
optimizer.safetensors   Adam's moments, whole, so that any number of workers can load them
settings.yaml           the resolved settings
provenance.json         git hash, manifest checksum, library versions
state.json              the integers that place the run, and the weight files' SHA-256; written last, so it marks a
                        whole checkpoint
scores-dev.parquet, pictures-dev/, grid-dev.png   added when the checkpoint has been scored
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn

from iaml import AutoEncoder, NetworkSettings, TeacherStudent
from pipeline import storage
from pipeline.settings.config import Config
from pipeline.settings.files import read_settings

PREFIX, INTERIM = "checkpoint-", "interim-"
STUDENT, TEACHER, OPTIMIZER = "student.safetensors", "teacher.safetensors", "optimizer.safetensors"
SETTINGS, PROVENANCE, STATE = "settings.yaml", "provenance.json", "state.json"
WEIGHT_FILES = (STUDENT, TEACHER, OPTIMIZER)
SCORED = r"(scores|grid)-(train|dev|test)\.(parquet|png)"  # what scoring adds, and holds for these weights alone
CHECKSUMS = "sha256"  # in state.json: of the weight files, and of all else that it holds


class DamagedCheckpointError(ValueError):
    """A file of a checkpoint is missing or not what was written; the message names it."""


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        step: steps taken, skipped ones included; the schedule and random numbers follow from it.
        samples: position in the stream of samples.
        updates: steps that moved the weights, and with them the teacher.
        nonfinite_in_a_row: steps skipped since the last one that moved the weights.
        updates_before: how often the teacher had moved where the run took it over, so that its warm-up is not repeated.
    """

    step: int = 0
    samples: int = 0
    updates: int = 0
    nonfinite_in_a_row: int = 0
    updates_before: int = 0

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


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint's tensors, copied to host memory: training may go on while they are written.

    Attributes:
        student: the student's.
        teacher: the averaged decoder and the statistics of clean images.
        optimizer: Adam's moments, whole.
    """

    student: dict[str, Tensor]
    teacher: dict[str, Tensor]
    optimizer: dict[str, Tensor]

    @classmethod
    def take(cls, task: TeacherStudent, optimizer: Mapping[str, Tensor]) -> "Snapshot":
        """Copy what ``task`` holds now, and ``optimizer`` as ``Engine.optimizer_state`` gave it."""
        return cls(_copies(task.student.state_dict()), _copies(_teacher_parts(task).state_dict()), _copies(optimizer))


def write(folder: Path, snapshot: Snapshot, progress: Progress, config: Config, provenance: Mapping[str, Any]) -> None:
    """Write a checkpoint's files into a local folder, to be uploaded by ``storage.upload_folder``."""
    save_file(snapshot.student, folder / STUDENT)
    save_file(snapshot.teacher, folder / TEACHER)
    save_file(snapshot.optimizer, folder / OPTIMIZER)
    (folder / SETTINGS).write_text(config.to_yaml())
    (folder / PROVENANCE).write_text(json.dumps(provenance, indent=2))
    checksums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in WEIGHT_FILES}
    state = {**asdict(progress), CHECKSUMS: checksums}
    checksums[STATE] = _checksum_of_state(state)
    (folder / STATE).write_text(json.dumps(state, indent=2))


def load_weights(url: str, task: TeacherStudent) -> Progress:
    """Put a checkpoint's student and teacher into ``task``; returns how far that run had come."""
    task.student.load_state_dict(_read_tensors(url, STUDENT))
    _teacher_parts(task).load_state_dict(_read_tensors(url, TEACHER))
    progress = read_progress(url)
    task.updates = progress.updates_before + progress.updates
    return progress


@dataclass(frozen=True)
class Networks:
    """Weights to begin with.

    Attributes:
        student: the student's.
        teacher: the averaged decoder and, where the teacher kept its own, the statistics of clean images; empty where
            there is no teacher.
        updates: how often the teacher had moved.
        sha256: of the files, by the name that they have in a checkpoint.
    """

    student: Mapping[str, Tensor]
    teacher: Mapping[str, Tensor]
    updates: int
    sha256: Mapping[str, str]


def read_networks(url: str) -> Networks:
    """The networks in a checkpoint's folder, or in a bare file of a student; ``ValueError`` where there are none."""
    files: dict[str, bytes] = {}
    try:
        if kind_of(url) == "checkpoint":
            there = storage.listdir(url)
            files = {name: _read(url, name) for name in (STUDENT, TEACHER) if name == STUDENT or name in there}
        else:
            files = {STUDENT: storage.read_bytes(url)}
        tensors = {name: load(data) for name, data in files.items()}
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ValueError(f"run.start_from: {url}: there is no run, no checkpoint with weights, and no file") from error
    except SafetensorError as error:
        raise ValueError(f"run.start_from: {url}: is not a safetensors file ({error})") from error
    state = _read_state(url) if STATE in storage.listdir(url) else {}
    checksums = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    updates = state.get("updates_before", 0) + state.get("updates", 0)
    return Networks(tensors[STUDENT], tensors.get(TEACHER, {}), updates, checksums)


def load_start(start: Mapping[str, Any], task: TeacherStudent) -> Progress:
    """Put the networks that a run begins with into ``task``; without a teacher's its decoder is the student's.

    Args:
        start: as ``pipeline.launch.provenance.find_initial_weights`` found them.
        task: of the run.
    """
    networks = read_networks(start["url"])
    if networks.sha256 != start["sha256"]:
        raise ValueError(f"{start['url']}: holds other weights than when this run began; choose another run.name")
    task.student.load_state_dict(networks.student)
    decoder = _below("decoder.", networks.teacher)
    task.teacher_decoder.load_state_dict(decoder or task.student.decoder.state_dict())
    statistics = _below("clean_statistics.", networks.teacher)
    if statistics and len(task.clean_statistics):
        task.clean_statistics.load_state_dict(statistics)
    task.updates = networks.updates
    return Progress(updates_before=networks.updates)


def read_progress(url: str) -> Progress:
    """How far the run had come at a checkpoint."""
    state = _read_state(url)
    return Progress(**{name: value for name, value in state.items() if name != CHECKSUMS})


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
    averaged.decoder.load_state_dict(_below("decoder.", teacher))
    return {"student": student.eval(), "averaged": averaged.eval()}


def read_config(url: str) -> Config:
    """The settings beside a checkpoint or in a run's folder; ``ValueError`` when there are none."""
    return Config.model_validate(read_settings(storage.join(url, SETTINGS)))


def complete_checkpoints(run: str, prefix: str = PREFIX) -> list[str]:
    """URLs of the run's checkpoints of a kind that still hold whole weights, oldest first."""
    urls = [storage.join(run, name) for name in storage.listdir(run) if step_of(name, prefix) is not None]
    return [url for url in urls if {STATE, *WEIGHT_FILES} <= set(storage.listdir(url))]


def newest(run: str, log: Callable[[str], None]) -> str | None:
    """URL of the run's newest checkpoint of any kind whose files are all there and as they were written.

    Args:
        run: the run's URL.
        log: is called with each newer one that is skipped, and why.

    Raises:
        ValueError: a checkpoint was written without checksums.
    """
    names = storage.listdir(run)
    found = [
        (step, name) for prefix in (PREFIX, INTERIM) for name in names if (step := step_of(name, prefix)) is not None
    ]
    for _, name in sorted(found, reverse=True):
        url = storage.join(run, name)
        try:
            verify(url)
        except DamagedCheckpointError as error:
            log(f"{error}; this checkpoint is skipped")
        else:
            return url
    return None


def verify(url: str) -> None:
    """Read a checkpoint through: ``DamagedCheckpointError`` unless every weight file is the one that was written."""
    missing = {STATE, *WEIGHT_FILES} - set(storage.listdir(url))
    if missing:
        raise DamagedCheckpointError(f"{url}: lacks {', '.join(sorted(missing))}")
    if CHECKSUMS not in _read_state(url):
        raise ValueError(
            f"{url}: {STATE} has no checksums, as an older version of this program wrote it; resume the run with "
            "that version"
        )
    for name in WEIGHT_FILES:
        _read(url, name)


def invalidate(url: str) -> None:
    """Have a checkpoint count no longer, nor its scores; what there is of its weights stays."""
    for name in storage.listdir(url):
        if name == STATE or re.fullmatch(SCORED, name):
            storage.delete(storage.join(url, name))


def invalidate_after(run: str, step: int) -> None:
    """Invalidate all checkpoints after ``step``, from which a run resumes: it writes others in their place."""
    for name in storage.listdir(run):
        if any((step_of(name, prefix) or 0) > step for prefix in (PREFIX, INTERIM)):
            invalidate(storage.join(run, name))


def delete_weights(url: str) -> None:
    """Free a checkpoint's space; its scores, grid and settings stay for the report."""
    for name in WEIGHT_FILES:
        storage.delete(storage.join(url, name))


def _teacher_parts(task: TeacherStudent) -> nn.ModuleDict:
    return nn.ModuleDict({"decoder": task.teacher_decoder, "clean_statistics": task.clean_statistics})


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    layout = torch.contiguous_format  # all that safetensors writes
    return {name: value.to("cpu", copy=True, memory_format=layout) for name, value in tensors.items()}


def _read_tensors(url: str, name: str) -> dict[str, Tensor]:
    try:
        return load(_read(url, name))
    except FileNotFoundError as error:
        raise ValueError(
            f"{storage.join(url, name)}: not found; give a checkpoint's folder whose weights were kept, or the run's "
            "folder"
        ) from error


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _read(url: str, name: str) -> bytes:
    """A weight file, which is compared with its checksum where state.json has one."""
    data = storage.read_bytes(storage.join(url, name))
    known = _read_state(url).get(CHECKSUMS, {}).get(name)
    if known not in (None, hashlib.sha256(data).hexdigest()):
        raise DamagedCheckpointError(f"{storage.join(url, name)}: is damaged, its SHA-256 is not that of {STATE}")
    return data


def _read_state(url: str) -> dict[str, Any]:
    """What state.json holds; nothing where weights were copied without it."""
    where = storage.join(url, STATE)
    try:
        state: dict[str, Any] = json.loads(storage.read_text(where))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DamagedCheckpointError(f"{where}: is damaged ({error})") from error
    if CHECKSUMS in state and state[CHECKSUMS].get(STATE) != _checksum_of_state(state):
        raise DamagedCheckpointError(f"{where}: is damaged, its SHA-256 is not the one that it holds")
    return state


def _checksum_of_state(state: dict[str, Any]) -> str:
    others = {name: checksum for name, checksum in state[CHECKSUMS].items() if name != STATE}
    return hashlib.sha256(json.dumps({**state, CHECKSUMS: others}).encode()).hexdigest()


def seed_random_numbers(seed: int, step: int, rank: int) -> None:
    """Make torch's random numbers a function of (seed, step, rank), so that none need be saved."""
    torch.manual_seed((seed * 1_000_003 + step) * 4_096 + rank)

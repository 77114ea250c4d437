"""What a run begins with: found, checked against the network, recorded, and loaded the same on every worker."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from iaml import NetworkSettings, TeacherSettings, TeacherStudent
from pipeline import storage
from pipeline.launch.provenance import collect_provenance, find_initial_weights
from pipeline.run import checkpoint, record
from pipeline.run.checkpoint import Progress, Snapshot
from pipeline.settings.config import Config

NETWORK = NetworkSettings(width=1 / 16)
SEPARATE = TeacherSettings(norm="separate")


def config(folder: Path, name: str, start_from: str | None, **parts: Any) -> Config:
    settings = {
        "run": {"name": name, "root": str(folder), "start_from": start_from},
        "data": {"url": "/data"},
        "train": {"steps": 3},
        "network": {"width": 1 / 16},
        "optimizer": {"warmup_steps": 0},
    }
    return Config.model_validate(settings | parts)


@pytest.fixture
def source(tmp_path: Path) -> tuple[str, TeacherStudent]:
    """URL of a checkpoint whose teacher moved 7 times and is not the student's decoder, and what it holds."""
    torch.manual_seed(1)
    task = TeacherStudent(NETWORK, teacher=SEPARATE)
    with torch.no_grad():
        for value in (*task.teacher_decoder.parameters(), *task.clean_statistics.buffers()):
            value.add_(torch.rand_like(value))
    local, url = tmp_path / "local", str(tmp_path / "old/checkpoint-00000009")
    local.mkdir()
    checkpoint.write(local, Snapshot.take(task, {}), Progress(9, 72, 5, 0, 2), config(tmp_path, "old", None), {})
    storage.upload_folder(local, url, last=checkpoint.STATE)
    return url, task


def started(settings: Config, teacher: TeacherSettings | None = None) -> tuple[TeacherStudent, Progress]:
    task = TeacherStudent(NETWORK, teacher=teacher)
    start = find_initial_weights(settings)
    assert start
    return task, checkpoint.load_start(start, task)


def equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    before, after = one.state_dict(), other.state_dict()
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_student_teacher_and_the_teacher_s_warm_up_are_taken_over(
    source: tuple[str, TeacherStudent], tmp_path: Path
) -> None:
    url, old = source
    task, progress = started(config(tmp_path, "new", url), SEPARATE)
    assert equal(task, old)
    assert progress == Progress(updates_before=7) and task.updates == 7 and task.ema_rate > 0.5
    plain, _ = started(config(tmp_path, "new", url))  # whose teacher keeps no statistics
    assert equal(plain.teacher_decoder, old.teacher_decoder)


def test_a_bare_file_gives_the_teacher_the_student_s_decoder(
    source: tuple[str, TeacherStudent], tmp_path: Path
) -> None:
    url, old = source
    (tmp_path / "weights.safetensors").write_bytes(storage.read_bytes(storage.join(url, checkpoint.STUDENT)))
    task, progress = started(config(tmp_path, "new", str(tmp_path / "weights.safetensors")))
    assert equal(task.student, old.student) and equal(task.teacher_decoder, old.student.decoder)
    assert progress == Progress()


def test_it_is_recorded_and_the_source_may_move_once_the_run_has_begun(
    source: tuple[str, TeacherStudent], tmp_path: Path
) -> None:
    url, _ = source
    settings = config(tmp_path, "new", url)
    data: Any = [SimpleNamespace(url="/data", checksum="c")]
    start = find_initial_weights(settings)
    assert start and start["url"] == url and set(start["sha256"]) == {checkpoint.STUDENT, checkpoint.TEACHER}
    provenance = collect_provenance(data, start)
    record.claim(settings, provenance)
    assert json.loads((tmp_path / "new/provenance.json").read_text())["start_from"] == start
    moved = str(tmp_path / "old/moved")
    Path(url).rename(moved)
    assert find_initial_weights(settings) == start  # wherever it is by now
    record.check_run(
        config(tmp_path, "new", moved), collect_provenance(data, find_initial_weights(config(tmp_path, "new", moved)))
    )
    with pytest.raises(ValueError, match=r"run.start_from: weights \w{12}, \w{12} before, nothing now"):
        record.check_run(config(tmp_path, "new", None), collect_provenance(data))


def test_other_weights_than_those_that_were_recorded_are_not_loaded(
    source: tuple[str, TeacherStudent], tmp_path: Path
) -> None:
    start = find_initial_weights(config(tmp_path, "new", source[0]))
    assert start
    storage.delete(storage.join(source[0], checkpoint.TEACHER))
    with pytest.raises(ValueError, match=r"checkpoint-00000009: holds other weights than when this run began"):
        checkpoint.load_start(start, TeacherStudent(NETWORK))


@pytest.mark.parametrize(
    ("network", "bare", "message"),
    [
        ({"width": 0.125}, False, r"has width 0.0625 and head clamp, this run's has width 0.125 and head clamp"),
        ({"width": 0.125}, True, r"has width 0.0625 .*; give --network.width 0.0625 --network.head clamp$"),
        ({"width": 1 / 16, "head": "sigmoid"}, False, r"has .* and head clamp, this run's has .* and head sigmoid"),
    ],
)
def test_weights_of_another_network_are_refused(
    network: dict[str, Any], bare: bool, message: str, source: tuple[str, TeacherStudent], tmp_path: Path
) -> None:
    given = source[0]
    if bare:
        given = str(tmp_path / "weights.safetensors")
        Path(given).write_bytes(storage.read_bytes(storage.join(source[0], checkpoint.STUDENT)))
    with pytest.raises(ValueError, match=rf"^run.start_from: {given}: its network {message}"):
        find_initial_weights(config(tmp_path, "new", given, network=network))


@pytest.mark.parametrize("content", [b"no tensors", None])
def test_what_holds_no_weights_is_refused(content: bytes | None, tmp_path: Path) -> None:
    given = tmp_path / "weights.safetensors"
    if content:
        given.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^run.start_from: {given}: (is not a safetensors file|there is no run)"):
        find_initial_weights(config(tmp_path, "new", str(given)))


def test_a_longer_schedule_is_refused_with_the_way_to_go_on(tmp_path: Path) -> None:
    provenance = collect_provenance([])
    record.claim(config(tmp_path, "old", None), provenance)
    hint = rf"choose another run.name, and --run.start-from {tmp_path}/old to begin with its weights\n  train.steps: 3"
    with pytest.raises(ValueError, match=hint):
        record.check_run(config(tmp_path, "old", None, train={"steps": 9}), provenance)
    with pytest.raises(ValueError, match=r"choose another run.name\n  network.width"):
        record.check_run(config(tmp_path, "old", None, network={"width": 0.25}), provenance)

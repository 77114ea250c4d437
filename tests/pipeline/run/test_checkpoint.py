"""Checkpoints: they hold all that advances, load without pickle, and count only when whole."""

import dataclasses
import functools
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from iaml import AutoEncoder, NetworkSettings, TeacherSettings, TeacherStudent
from pipeline import storage
from pipeline.run import checkpoint
from pipeline.run.checkpoint import Progress, Snapshot
from pipeline.settings.config import Config

NETWORK = NetworkSettings(width=1 / 16)


def make_config(run: Path) -> Config:
    return Config.model_validate(
        {
            "run": {"name": run.name, "root": str(run.parent)},
            "data": {"url": "/data"},
            "train": {"steps": 3},
            "network": {"width": 1 / 16},
        }
    )


@functools.cache
def trained_task() -> TeacherStudent:
    torch.manual_seed(0)
    task = TeacherStudent(NETWORK, teacher=TeacherSettings(norm="separate"))
    clean = torch.rand(4, 3, 32, 32)
    for _ in range(2):
        task(clean * 0.1, clean)
        task.after_optimizer_step()
    return task


@pytest.fixture
def written(tmp_path):
    """A run's URL, the URL of its checkpoint after 2 steps, and the task that it holds."""
    task, run = trained_task(), tmp_path / "run"
    local = tmp_path / "local"
    local.mkdir()
    run.mkdir()
    moments = {"student.x.exp_avg": torch.ones(3)}
    checkpoint.write(local, Snapshot.take(task, moments), Progress(2, 16, 2, 0), make_config(run), {"git": "abc"})
    url = storage.join(str(run), checkpoint.name_at(2))
    storage.upload_folder(local, url, last=checkpoint.STATE)
    return str(run), url, task


def test_weights_average_and_statistics_return(written):
    _, url, task = written
    fresh = TeacherStudent(NETWORK, teacher=TeacherSettings(norm="separate"))
    assert checkpoint.load_weights(url, fresh) == Progress(2, 16, 2, 0)
    assert fresh.updates == 2
    before, after = task.state_dict(), fresh.state_dict()
    assert any(name.startswith("clean_statistics") for name in before)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(checkpoint.load_optimizer(url)["student.x.exp_avg"], torch.ones(3))


def test_candidates_enhance_as_the_task_does(written):
    _, url, task = written
    low = torch.rand(1, 3, 32, 32)
    found = checkpoint.load_candidates(url, NETWORK)
    with torch.no_grad():
        assert torch.equal(found["student"](low), task.student.eval()(low))
        assert torch.equal(found["averaged"](low), task.averaged_student().eval()(low))
    assert not torch.equal(found["student"](low), found["averaged"](low))


def test_student_file_loads_into_the_network_as_it_is(written):
    from safetensors.torch import load_file

    found = AutoEncoder(NETWORK).load_state_dict(load_file(f"{written[1]}/student.safetensors"))
    assert found.missing_keys == found.unexpected_keys == []


def test_settings_and_provenance_lie_beside_the_weights(written):
    run, url, _ = written
    assert checkpoint.read_config(url) == make_config(Path(run))
    assert json.loads(storage.read_text(storage.join(url, checkpoint.PROVENANCE))) == {"git": "abc"}


@pytest.mark.parametrize("missing", ["student.safetensors", "optimizer.safetensors", "state.json"])
def test_a_checkpoint_in_part_does_not_count(written, missing):
    run, url, _ = written
    assert checkpoint.complete_checkpoints(run) == [url]
    storage.delete(storage.join(url, missing))
    assert checkpoint.complete_checkpoints(run) == []


def test_a_users_copy_is_neither_counted_nor_thinned_out_with_the_runs_own(written):
    run, url, _ = written
    copies = [f"{url}-best", f"{run}/checkpoint-2", f"{run}/{checkpoint.INTERIM}00000002.kept"]
    for copy in copies:
        shutil.copytree(url, copy)
    storage.write_text(f"{url}/notes.txt", "a user's")
    assert checkpoint.complete_checkpoints(run) == [url]
    assert checkpoint.complete_checkpoints(run, checkpoint.INTERIM) == []
    checkpoint.delete_weights(url)
    assert storage.listdir(url) == ["notes.txt", "provenance.json", "settings.yaml", "state.json"]
    assert all(storage.exists(f"{copy}/{name}") for copy in copies for name in checkpoint.WEIGHT_FILES)


@pytest.fixture
def three(written):
    """A run with whole checkpoints after 2, 3 and 4 steps, the second one an interim one; their URLs, oldest first."""
    run, url, _ = written
    urls = [url, storage.join(run, checkpoint.name_at(3, checkpoint.INTERIM)), storage.join(run, checkpoint.name_at(4))]
    for other in urls[1:]:
        shutil.copytree(url, other)
        storage.write_text(storage.join(other, "scores-dev.parquet"), "")
    return run, urls


def cut_off(url: str) -> None:
    storage.write_bytes(url, storage.read_bytes(url)[:-1])


def flip_a_bit(url: str) -> None:
    data = bytearray(storage.read_bytes(url))
    data[len(data) // 2] ^= 1
    storage.write_bytes(url, data)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("student.safetensors", flip_a_bit),
        ("teacher.safetensors", storage.delete),
        ("optimizer.safetensors", cut_off),
        *(("state.json", damage) for damage in (cut_off, storage.delete, flip_a_bit)),
    ],
)
def test_the_newest_checkpoint_whose_files_are_as_written_is_found(three, name, damage):
    run, (first, interim, last) = three
    assert checkpoint.newest(run, pytest.fail) == last
    storage.delete_folder(first)  # which nobody misses
    assert checkpoint.newest(run, pytest.fail) == last
    told = []
    damage(storage.join(last, name))
    assert checkpoint.newest(run, told.append) == interim
    assert len(told) == 1 and re.match(rf"{last}.*{name}.*; this checkpoint is skipped$", told[0])
    storage.delete_folder(interim)
    assert checkpoint.newest(run, told.append) is None


def test_weights_that_are_not_what_was_written_are_not_loaded(written):
    _, url, task = written
    flip_a_bit(storage.join(url, checkpoint.STUDENT))
    with pytest.raises(checkpoint.DamagedCheckpointError, match=r"student.safetensors: is damaged"):
        checkpoint.load_weights(url, task)
    with pytest.raises(checkpoint.DamagedCheckpointError, match=r"student.safetensors: is damaged"):
        checkpoint.load_candidates(url, NETWORK)


def test_a_run_is_not_continued_from_weights_that_nothing_vouches_for(written):
    run, url, _ = written
    storage.write_text(storage.join(url, checkpoint.STATE), '{"step": 2}')
    with pytest.raises(ValueError, match=r"00000002: state.json has no checksums, as an older version"):
        checkpoint.newest(run, pytest.fail)


def test_checkpoints_past_the_step_that_a_run_continues_from_count_no_longer(three):
    run, (first, interim, last) = three
    checkpoint.invalidate_after(run, 2)
    assert checkpoint.newest(run, lambda line: None) == first
    for url in (interim, last):
        assert {*checkpoint.WEIGHT_FILES, checkpoint.SETTINGS} <= set(storage.listdir(url))
        assert not {checkpoint.STATE, "scores-dev.parquet"} & set(storage.listdir(url))


def test_missing_weights_are_named(written):
    _, url, _ = written
    checkpoint.delete_weights(url)
    with pytest.raises(ValueError, match=r"student.safetensors: not found; give a checkpoint's folder whose weights"):
        checkpoint.load_candidates(url, NETWORK)


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["settings.yaml", "provenance.json", "scores.parquet"], "run"),
        (["settings.yaml", "student.safetensors"], "checkpoint"),  # all that is needed to use it
        (["settings.yaml", "student.safetensors", "state.json"], "checkpoint"),
        (["settings.yaml", "state.json", "scores-dev.parquet"], "checkpoint"),  # its weights were not kept
        (["student.safetensors"], "checkpoint"),
        (["1.png", "scores-dev.parquet"], None),
        ([], None),
    ],
)
@pytest.mark.parametrize("name", ["checkpoint-best", "interim-1", "best"])
def test_runs_and_checkpoints_are_known_by_what_they_hold(tmp_path, name, names, kind):
    for file in names:
        storage.write_text(str(tmp_path / name / file), "")
    assert checkpoint.kind_of(str(tmp_path / name)) == kind


def test_progress_counts_steps_left_out():
    progress = Progress()
    for applied in (True, False, False, True, False):
        progress = progress.after_step(8, applied)
    assert dataclasses.astuple(progress) == (5, 40, 2, 1, 0)

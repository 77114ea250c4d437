"""Checkpoints are written beside training, one after the other, and what goes wrong ends the run."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import ray.train
import torch

from iaml import NetworkSettings, TeacherStudent
from pipeline import storage
from pipeline.run import checkpoint, lease, record
from pipeline.run.checkpoint import INTERIM, PREFIX, Progress
from pipeline.settings.config import Config
from pipeline.training.checkpointing import CheckpointWriter
from pipeline.training.monitor import Monitor

PATIENCE_S = 30  # for what is to happen


class Setup:
    """A run's writer on rank 0, uploads that wait for ``gate``, and what Ray Train is told."""

    def __init__(self, folder, monkeypatch):
        settings = {"run": {"name": "run", "root": str(folder)}, "data": {"url": "/data"}, "train": {"steps": 9}}
        self.config = Config.model_validate(settings | {"network": {"width": 1 / 16}})
        self.run = self.config.run.url
        self.task = TeacherStudent(NetworkSettings(width=1 / 16))
        self.moments = {"x.exp_avg": torch.ones(3)}
        self.monitor = Monitor(self.run, 9, 0, 8)
        self.writer = CheckpointWriter(self.config, {}, "ours")
        self.whole = []  # checkpoints that were, each time that the state was copied
        self.gate, self.reports = threading.Event(), []
        upload = storage.upload_folder

        def upload_late(*arguments, **options):
            assert self.gate.wait(PATIENCE_S)
            upload(*arguments, **options)

        monkeypatch.setattr(storage, "upload_folder", upload_late)
        monkeypatch.setattr(ray.train, "report", lambda metrics, **options: self.reports.append(options))
        place = SimpleNamespace(experiment_fs_path="/run", storage_filesystem=None)
        monkeypatch.setattr(ray.train, "get_context", lambda: SimpleNamespace(get_storage=lambda: place))

    def optimizer_state(self):
        self.whole.append([storage.name_of(url) for url in checkpoint.complete_checkpoints(self.run)])
        return self.moments

    def write(self, step, prefix=PREFIX, *, is_rank_zero=True):
        self.writer.write(self.task, self, Progress(step=step), prefix, self.monitor if is_rank_zero else None)


@pytest.fixture
def setup(tmp_path, monkeypatch):
    setup = Setup(tmp_path, monkeypatch)
    yield setup
    setup.gate.set()
    setup.writer.__exit__()


def test_training_may_change_its_state_while_a_checkpoint_of_it_is_written(setup):
    before = {name: value.clone() for name, value in setup.task.state_dict().items()}
    setup.write(1)
    with torch.no_grad():
        for value in (*setup.task.state_dict().values(), *setup.moments.values()):
            value.zero_()
    setup.gate.set()
    setup.writer.wait()
    read = TeacherStudent(NetworkSettings(width=1 / 16))
    (url,) = checkpoint.complete_checkpoints(setup.run)
    checkpoint.load_weights(url, read)
    assert all(torch.equal(value, before[name]) for name, value in read.state_dict().items())
    assert checkpoint.load_optimizer(url)["x.exp_avg"].tolist() == [1, 1, 1]


def test_the_state_is_copied_once_the_checkpoint_before_is_written_with_metrics_that_reach_it(setup):
    setup.monitor.record(1, {"loss": 0.5})
    setup.write(1)
    threading.Timer(0.2, setup.gate.set).start()
    setup.write(2)
    assert setup.whole == [[], ["checkpoint-00000001"]]
    assert [each["step"] for each in record.read_metrics(setup.run)] == [1]


@pytest.mark.parametrize("error", [None, RuntimeError])
def test_training_that_ends_waits_for_what_is_being_written(setup, error):
    threading.Timer(0.2, setup.gate.set).start()
    with pytest.raises(error) if error else setup.writer, setup.writer:
        setup.write(1)
        if error:
            raise error
    assert len(checkpoint.complete_checkpoints(setup.run)) == 1


def test_ray_hears_of_a_checkpoint_from_all_workers_and_waits_until_it_is_written(setup):
    setup.write(1, is_rank_zero=False)
    setup.write(1)
    other, ours = setup.reports
    assert other["checkpoint_dir_name"] == ours["checkpoint_dir_name"] == "checkpoint-00000001"
    assert "checkpoint" not in other and ours["validation"]
    with ThreadPoolExecutor(1) as ray_thread:
        uploaded = ray_thread.submit(ours["checkpoint_upload_fn"], ours["checkpoint"], "checkpoint-00000001")
        with pytest.raises(TimeoutError):
            uploaded.result(0.2)
        setup.gate.set()
        assert uploaded.result(PATIENCE_S).path == "/run/checkpoint-00000001"
    assert checkpoint.complete_checkpoints(setup.run)


def test_the_newest_interim_checkpoint_is_not_scored_and_frees_the_older(setup):
    setup.gate.set()
    for step in (1, 2):
        setup.write(step, INTERIM)
    setup.writer.wait()
    assert [each["validation"] for each in setup.reports] == [False, False]
    assert checkpoint.complete_checkpoints(setup.run, INTERIM) == [f"{setup.run}/interim-00000002"]


@pytest.mark.parametrize("error", [ValueError("no bucket\nof this name"), OSError("the disk is full")])
def test_a_checkpoint_that_cannot_be_written_ends_the_run_with_the_reason(setup, monkeypatch, error):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(storage, "upload_folder", fail)
    setup.write(1)
    for end in (setup.writer.wait, lambda: setup.reports[0]["checkpoint_upload_fn"](None, "")):
        with pytest.raises(type(error), match=str(error)):
            end()
    with pytest.raises(type(error)):
        setup.write(2)
    reason = "no bucket of this name" if isinstance(error, ValueError) else ""  # others are tried again
    assert record.stop_reason(setup.run) == reason


def test_nothing_is_written_or_freed_once_the_run_is_anothers(setup):
    setup.gate.set()
    setup.write(1, INTERIM)
    setup.writer.wait()
    before = sorted(storage.listdir(setup.run))
    storage.delete(f"{setup.run}/metrics.jsonl")
    with lease.hold(setup.run):
        setup.write(2, INTERIM)
        with pytest.raises(lease.LeaseLostError):
            setup.writer.wait()
    assert sorted(storage.listdir(setup.run)) == [name for name in before if name != "metrics.jsonl"]
    assert checkpoint.complete_checkpoints(setup.run, INTERIM) == [f"{setup.run}/interim-00000001"]

"""A pool of evaluation actors: not disturbed by the death of an actor or a node."""

import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import ray
import torch
from commands import RayHead
from datasets import packed
from PIL import Image
from ray import cloudpickle
from skimage.metrics import peak_signal_noise_ratio

from iaml import TeacherStudent
from pipeline import storage
from pipeline.data.manifest import Manifest, load_manifest
from pipeline.data.pairs import read_pair
from pipeline.evaluation import pool as pools
from pipeline.evaluation.dispatch import Dispatch
from pipeline.evaluation.failures import MachineError
from pipeline.evaluation.pool import Pool
from pipeline.evaluation.scorer import find_lpips
from pipeline.run import checkpoint, scores
from pipeline.run.checkpoint import Progress, Snapshot
from pipeline.run.pictures import VIEWS
from pipeline.settings.config import Config
from pipeline.settings.evaluation import EvaluationSettings

cloudpickle.register_pickle_by_value(sys.modules[__name__])
SETTINGS = EvaluationSettings(actors=2, gpus_per_actor=0, grid_images=2)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return load_manifest(packed(tmp_path_factory.mktemp("pool"), test=9, size=(96, 64)))


@pytest.fixture(scope="module")
def pool(driver: None, manifest: Manifest) -> Pool:
    return Pool.start(SETTINGS, manifest, "test", find_lpips(SETTINGS))


@pytest.fixture
def url(tmp_path: Path, manifest: Manifest) -> str:
    """URL of a checkpoint."""
    return write_checkpoint(tmp_path, manifest)


def write_checkpoint(folder: Path, manifest: Manifest) -> str:
    """URL of a checkpoint with weights of its own."""
    url = str(folder / "run/checkpoint-00000002")
    settings = {
        "run": {"name": "run", "root": str(folder)},
        "data": {"url": manifest.url},
        "train": {"steps": 2},
        "network": {"width": 1 / 16},
        "optimizer": {"warmup_steps": 0},
    }
    config = Config.model_validate(settings)
    torch.manual_seed(0)
    task = TeacherStudent(config.network)
    (folder / "local").mkdir()
    checkpoint.write(folder / "local", Snapshot.take(task, {}), Progress(step=2), config, {})
    storage.upload_folder(folder / "local", url, last=checkpoint.STATE)
    return url


class Killer(Dispatch):
    """Kills ``victim`` of an actor that has an image in hand, once, after the second result."""

    victim: Any
    killed: list[str]

    def results(self) -> Iterator[tuple[str, Any]]:
        for number, result in enumerate(super().results()):
            busy = [(index, key) for index, key in self._running.values() if key is not None]
            if number == 1 and busy and not self.killed:
                index, key = busy[0]
                self.killed.append(str(key))
                self.victim(self._actors[index])
            yield result


def node_id(actor: Any) -> str:
    return ray.get_runtime_context().get_node_id()


def kill_process(actor: Any) -> None:
    os.kill(ray.get(actor.__ray_call__.remote(lambda self: os.getpid())), signal.SIGKILL)


def test_killing_an_actor_in_the_middle_changes_nothing(pool: Pool, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = pool.score(url)
    Path(url, scores.scores_file("test")).unlink()
    Killer.victim, Killer.killed = staticmethod(kill_process), []
    monkeypatch.setattr(pools, "Dispatch", Killer)
    disturbed = pool.score(url)
    assert Killer.killed
    pd.testing.assert_frame_equal(disturbed, undisturbed)
    pd.testing.assert_frame_equal(scores.read(storage.join(url, scores.scores_file("test"))), undisturbed)
    assert undisturbed["key"].nunique() == 9
    assert set(undisturbed["method"]) == {"input", "gamma", "student", "averaged"}


class Fails(torch.nn.Module):
    """A student whose device fails until ``file`` has grown to ``times`` bytes, one for each failure."""

    def __init__(self, student: torch.nn.Module, file: Path, times: int) -> None:
        super().__init__()
        self.student, self.file, self.times = student, file, times

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        if self.file.stat().st_size < self.times:
            with self.file.open("a") as file:
                file.write("x")
            raise torch.AcceleratorError("CUDA error: unspecified launch failure", 719)
        enhanced: torch.Tensor = self.student(image)
        return enhanced


@pytest.mark.slow
def test_a_device_that_fails_costs_a_process_or_leaves_the_checkpoint_to_be_scored_again(
    pool: Pool, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = pool.score(url)
    file = Path(url, scores.scores_file("test"))
    file.unlink()
    load, failures = checkpoint.load_candidates, tmp_path / "failures"
    failures.touch()

    def fail(times: int) -> None:
        monkeypatch.setattr(
            checkpoint,
            "load_candidates",
            lambda *arguments: (found := load(*arguments)) | {"student": Fails(found["student"], failures, times)},
        )

    fail(2)
    pd.testing.assert_frame_equal(pool.score(url), undisturbed)
    assert failures.stat().st_size >= 2
    file.unlink()
    fail(100)
    with pytest.raises(MachineError, match=f"{url}: not scored, for a reason that may pass: .*unspecified launch"):
        pool.score(url)
    assert not file.exists()
    monkeypatch.setattr(checkpoint, "load_candidates", load)
    pd.testing.assert_frame_equal(pool.score(url), undisturbed)  # the same actors


@pytest.mark.slow
def test_the_death_of_a_node_changes_nothing(
    pool: Pool, url: str, manifest: Manifest, ray_head: RayHead, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = pool.score(url)
    node = ray_head.add_node()
    while sum(each["Alive"] for each in ray.nodes()) < 2:
        assert node.poll() is None
        time.sleep(0.2)
    spread = Pool.start(SETTINGS, manifest, "test", find_lpips(SETTINGS))
    assert len({ray.get(actor.__ray_call__.remote(node_id)) for actor in spread.actors}) == 2
    Killer.victim, Killer.killed = staticmethod(lambda actor: os.killpg(node.pid, signal.SIGKILL)), []
    monkeypatch.setattr(pools, "Dispatch", Killer)
    pd.testing.assert_frame_equal(spread.score(url), undisturbed)
    assert Killer.killed


def test_pictures_of_the_best_the_worst_and_some_fixed_images_are_stored(pool: Pool, url: str) -> None:
    table = pool.score(url)
    psnr = table[(table["method"] == "student") & (table["metric"] == "psnr")].set_index("key")["value"].sort_values()
    pictured = {path.name.split(".")[0] for path in Path(url, "pictures-test").iterdir()}
    assert {*psnr.index[:2], *psnr.index[-2:]} <= pictured
    assert len(pictured) <= 6
    for key in pictured:
        assert [Image.open(Path(url, "pictures-test", f"{key}.{view}.webp")).size for view in VIEWS] == [(96, 64)] * 5
    assert Image.open(Path(url, "grid-test.png")).width > 4 * 96


def test_the_grid_shows_as_many_images_as_are_asked_for(pool: Pool, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[str]] = []
    monkeypatch.setattr(pools, "image_grid", lambda rows, columns, titles: drawn.append(titles) or b"a picture")
    replace(pool, settings=pool.settings.model_copy(update={"grid_images": 3})).score(url)
    assert [len(titles) for titles in drawn] == [3]


def test_pictures_made_elsewhere_are_scored_as_they_are(pool: Pool, manifest: Manifest, tmp_path: Path) -> None:
    clean = {record.key: read_pair(manifest.url, record).clean for record in manifest.pairs("test")}
    for key, image in clean.items():
        Image.fromarray(image // 2).save(tmp_path / f"{key}.png")
    table = pool.score_pictures("/some/method", {key: tmp_path / f"{key}.png" for key in clean})
    rows = table[(table["method"] == "images") & (table["metric"] == "psnr")].set_index("key")
    assert set(rows.index) == set(clean) and set(rows["checkpoint"]) == {"method"}
    for key, image in clean.items():
        assert rows["value"][key] == pytest.approx(peak_signal_noise_ratio(image, image // 2, data_range=255), abs=1e-4)


def test_a_student_without_its_teacher_and_its_step_is_scored_alone(
    pool: Pool, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = tmp_path / "best"
    bare.mkdir()
    for name in (checkpoint.STUDENT, checkpoint.SETTINGS):
        shutil.copy(Path(url, name), bare)
    table = pool.score(str(bare))
    assert f"{bare}: has no teacher.safetensors, so that only the student is scored" in capsys.readouterr().out
    assert set(table["method"]) == {"input", "gamma", "student"}
    assert set(table["checkpoint"]) == {"best"} and set(table["step"]) == {0}
    whole = pool.score(url)
    expected = whole[whole["method"] != "averaged"]["value"]
    assert table["value"].to_numpy() == pytest.approx(expected.to_numpy(), nan_ok=False)


@pytest.mark.usefixtures("driver")
def test_an_image_that_cannot_be_read_is_named_and_no_mean_is_made_of_the_rest(tmp_path: Path) -> None:
    manifest = load_manifest(packed(tmp_path, test=3))
    url = write_checkpoint(tmp_path, manifest)
    record = manifest.pairs("test")[1]
    with Path(manifest.url, record.shard).open("r+b") as file:
        file.seek(record.low_offset + 60)
        file.write(b"damage")
    settings = SETTINGS.model_copy(update={"actors": 1, "lpips": "none"})
    table = Pool.start(settings, manifest, "test", "none wanted").score(url)
    amiss = table[table["reason"].notna()]
    assert set(amiss["key"]) == {record.key} and amiss["value"].isna().all() and len(amiss) == 8
    assert amiss["reason"].str.contains(f"{record.shard}: {record.key}.low.png: differs from the image").all()
    assert table[table["reason"].isna()]["value"].notna().all()
    assert scores.means(table).isna().all(axis=None)

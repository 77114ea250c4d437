"""Candidates for scoring: what is found at a URL, and the pictures in a folder."""

import shutil

import numpy as np
import pytest
from PIL import Image
from score_tables import checkpoint_rows, make_run, score_table, write_scores

from pipeline import storage
from pipeline.data.manifest import PairRecord
from pipeline.evaluation.candidates import Candidate, pictures_of
from pipeline.run import checkpoint, scores


def record(key, width=8, height=6):
    texts = dict.fromkeys(("low_sha256", "high_sha256", "low_phash", "high_phash", "scene"), "")
    places = dict.fromkeys(("low_offset", "low_size", "high_offset", "high_size"), 0)
    lights = {"low_luminance": 0.1, "high_luminance": 0.5}
    return PairRecord(key=key, shard="s", width=width, height=height, split="test", **texts, **places, **lights)


def picture(path, width=8, height=6):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(path)


# --- what is found


def test_a_run_stands_for_its_best_checkpoint(tmp_path):
    run = make_run(tmp_path, {2: 30.0, 4: 20.0}, checkpoint={"network": "student"})
    found = Candidate.find(run, "test")
    assert (found.url, found.run) == (f"{run}/checkpoint-00000002", run)
    assert (found.name, found.home) == ("run/checkpoint-00000002", run)
    assert found.config == checkpoint.read_config(run)


def test_a_checkpoint_stands_for_itself(tmp_path):
    run = make_run(tmp_path, {2: 30.0, 4: 20.0}, checkpoint={"network": "averaged"})
    found = Candidate.find(f"{run}/checkpoint-00000004", "test")
    assert (found.url, found.run) == (f"{run}/checkpoint-00000004", None)
    assert (found.name, found.home) == ("run/checkpoint-00000004", run)


def test_any_other_folder_holds_pictures(tmp_path):
    picture(tmp_path / "method/1.png")
    found = Candidate.find(str(tmp_path / "method"), "test")
    assert found == Candidate(str(tmp_path / "method"), None, None)
    assert (found.name, found.home) == ("method", None)


def test_a_run_is_known_whatever_its_name(tmp_path):
    run = make_run(tmp_path, {2: 30.0, 4: 20.0}, run={"name": "checkpoint-free"})
    moved = tmp_path / "elsewhere/checkpoint-00000009"
    shutil.copytree(run, moved)
    for place in (run, str(moved)):
        found = Candidate.find(place, "test")
        assert (found.url, found.run, found.home) == (f"{place}/checkpoint-00000002", place, place)


@pytest.mark.parametrize("place", ["best", "run/best", "run/checkpoint-best", "run/interim-00000004"])
def test_a_checkpoint_is_known_whatever_its_name_and_a_copy_is_none_of_the_run(place, tmp_path):
    run = make_run(tmp_path, {4: 20.0, 2: 30.0})
    before = scores.read_run(run)
    shutil.copytree(f"{run}/checkpoint-00000004", tmp_path / place)
    found = Candidate.find(str(tmp_path / place), "test")
    assert (found.url, found.run, found.home) == (str(tmp_path / place), None, None)
    assert set(found.table("dev")["checkpoint"]) == {tmp_path.joinpath(place).name}
    assert scores.read_run(run).equals(before)
    assert [storage.name_of(url)[-4:] for url in checkpoint.complete_checkpoints(run)] == ["0002", "0004"]


def test_weights_with_settings_alone_are_a_checkpoint_and_without_them_refused(tmp_path):
    run = make_run(tmp_path, {4: 20.0})
    (tmp_path / "bare").mkdir()
    for name in ("student.safetensors", "settings.yaml"):
        shutil.copy(f"{run}/checkpoint-00000004/{name}", tmp_path / "bare")
    found = Candidate.find(str(tmp_path / "bare"), "test")
    assert found.config == checkpoint.read_config(run)
    assert found.table("dev").empty
    storage.delete(str(tmp_path / "bare/settings.yaml"))
    with pytest.raises(ValueError, match=r"bare: holds weights, but no settings\.yaml that says of which network"):
        Candidate.find(str(tmp_path / "bare"), "test")


@pytest.mark.parametrize(
    ("network", "methods", "shown"),
    [
        ("averaged", ("input", "student", "averaged"), "averaged"),
        ("student", ("input", "student", "averaged"), "student"),
        ("averaged", ("input", "student"), "student"),
    ],
)
def test_rows_that_stand_for_a_checkpoint(network, methods, shown, tmp_path):
    found = Candidate.find(make_run(tmp_path, {4: 20.0}, checkpoint={"network": network}), "dev")
    assert set(found.ranking_rows(score_table({method: {"a": 1.0} for method in methods}))["method"]) == {shown}


def test_rows_that_stand_for_pictures():
    rows = score_table({method: {"a": 1.0} for method in ("input", "gamma", "images")})
    assert set(Candidate("/p", None, None).ranking_rows(rows)["method"]) == {"images"}


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_nothing_is_refused(name, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=f"{name}: there is no run, checkpoint or folder of pictures"):
        Candidate.find(str(tmp_path / name), "dev")


@pytest.mark.parametrize("psnr", [{2: 30.0}, {2: 30.0, 4: None}, {2: None, 4: 20.0}], ids=str)
def test_an_unfinished_run_is_not_scored_on_the_test_split(psnr, tmp_path):
    run = make_run(tmp_path, psnr)
    with pytest.raises(ValueError, match="run: is not finished, and its test scores are for the end, once"):
        Candidate.find(run, "test")
    best = Candidate.find(run, "dev").url
    assert Candidate.find(best, "test").url == best  # who names a checkpoint chooses it


def test_a_run_without_scores_is_refused(tmp_path):
    with pytest.raises(ValueError, match="none of its checkpoints has been scored"):
        Candidate.find(make_run(tmp_path, {2: None}), "dev")


def test_the_newest_whole_checkpoints_of_a_run_come_after_the_chosen_one(tmp_path):
    run = make_run(tmp_path, {1: 50.0, 2: 10.0, 3: 20.0, 4: 30.0})
    checkpoint.delete_weights(f"{run}/checkpoint-00000003")
    found = Candidate.find(run, "dev")

    def steps(count):
        return [int(each.url[-8:]) for each in found.with_newest(count)]

    assert [steps(count) for count in (0, 1, 2, 9)] == [[1], [1, 4], [1, 2, 4], [1, 2, 4]]
    first, *others = found.with_newest(2)
    assert (first.run, [each.run for each in others]) == (run, [None, None])
    named = Candidate.find(f"{run}/checkpoint-00000001", "dev")
    assert named.with_newest(2) == [named]


def test_stored_scores_of_a_candidate(tmp_path):
    run = make_run(tmp_path, {4: 30.0})
    write_scores(run, 4, scores.to_table(checkpoint_rows(4, 25.0, split="test")), "test")
    found = Candidate.find(run, "dev")
    for split, psnr in (("dev", 30.0), ("test", 25.0)):
        assert scores.means(found.table(split)).loc["student", ("rgb_u8", "psnr")] == psnr
    storage.delete(f"{run}/checkpoint-00000004/scores-test.parquet")
    assert found.table("test").empty


# --- pictures


def test_pictures_are_found_by_the_pairs_keys(tmp_path):
    for name in ("low00001.png", "test-22.png", "other/999.png"):
        picture(tmp_path / name)
    assert pictures_of(str(tmp_path), [record("test-00001"), record("test-22")]) == {
        "test-00001": tmp_path / "low00001.png",
        "test-22": tmp_path / "test-22.png",
    }


def test_pictures_of_another_size_are_refused_and_all_named(tmp_path):
    picture(tmp_path / "1.png")
    picture(tmp_path / "2.png", 6, 8)
    picture(tmp_path / "3.png", 4, 3)
    with pytest.raises(ValueError, match="nothing is resized") as caught:
        pictures_of(str(tmp_path), [record(f"test-{number}") for number in (1, 2, 3)])
    lines = str(caught.value).splitlines()
    assert [line.split("/")[-1] for line in lines[1:]] == [
        "2.png: 6x8, but test-2 is 8x6",
        "3.png: 4x3, but test-3 is 8x6",
    ]


def test_missing_and_broken_pictures_are_refused_by_name(tmp_path):
    picture(tmp_path / "1.png")
    with pytest.raises(ValueError, match="1 images of the split have no picture here:\n  test-2"):
        pictures_of(str(tmp_path), [record("test-1"), record("test-2")])
    (tmp_path / "2.png").write_text("not a picture")
    with pytest.raises(ValueError, match=r"2\.png"):
        pictures_of(str(tmp_path), [record("test-1"), record("test-2")])


def test_pictures_are_not_read_from_s3():
    with pytest.raises(ValueError, match="s3://bucket/pictures: pictures are read from a local folder; copy them"):
        pictures_of("s3://bucket/pictures", [record("test-1")])

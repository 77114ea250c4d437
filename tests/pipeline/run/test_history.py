"""What a run has been scored: what is chosen, what is kept, what is finished, and all that is read of it."""

import json
import shutil

import pytest
from score_tables import DATA, checkpoint_rows, make_run, write_scores

from pipeline import storage
from pipeline.reporting.tables import run_table
from pipeline.run import checkpoint, history, scores
from pipeline.run.history import Run
from pipeline.settings.config import Config


def config_of(run):
    return checkpoint.read_config(run)


def steps_of(names):
    return [int(name[-8:]) for name in names]


def test_the_best_checkpoint_of_a_run(tmp_path):
    run = make_run(tmp_path, {1: 10.0, 2: 30.0, 3: 20.0, 4: None})
    assert history.best_checkpoint(Run.load(run)) == f"{run}/checkpoint-00000002"


def test_scores_on_other_data_do_not_choose(tmp_path):
    run = make_run(tmp_path, {1: 10.0, 2: 30.0})
    write_scores(run, 1, scores.to_table(checkpoint_rows(1, 99.0, data="other")))
    assert Run.load(run).chosen == "checkpoint-00000002"


def test_best_checkpoint_of_a_run_without_scores_is_refused(tmp_path):
    with pytest.raises(ValueError, match="run: none of its checkpoints has been scored"):
        history.best_checkpoint(Run.load(make_run(tmp_path, {1: None})))


@pytest.mark.parametrize(
    ("psnr_by_step", "finished"),
    [
        ({2: 10.0, 4: 20.0}, True),
        ({2: 10.0}, False),
        ({2: 10.0, 4: None}, False),
        ({2: None, 4: 20.0}, False),
        ({}, False),
    ],
)
def test_a_run_is_finished_once_its_last_step_is_done_and_every_checkpoint_scored(tmp_path, psnr_by_step, finished):
    assert history.is_finished(make_run(tmp_path, psnr_by_step), 4) == finished


def test_what_is_not_scored_yet_is_whole_and_without_scores_on_the_development_split(tmp_path):
    run = make_run(tmp_path, {1: 10.0, 10: None, 3: None, 5: None, 7: None})
    storage.delete(f"{run}/checkpoint-00000005/{checkpoint.STATE}")  # its writing was cut off
    write_scores(run, 7, scores.to_table(checkpoint_rows(7, 20.0, split="test")), "test")
    assert steps_of(history.unscored_checkpoints(run)) == [3, 7, 10]


def test_a_checkpoint_that_was_scored_on_other_data_alone_is_not_scored(tmp_path):
    run = make_run(tmp_path, {2: 10.0, 4: None})
    write_scores(run, 4, scores.to_table(checkpoint_rows(4, 20.0, data="other")))
    assert steps_of(history.unscored_checkpoints(run)) == [4] and not history.is_finished(run, 4)
    write_scores(run, 4, scores.to_table(checkpoint_rows(4, 20.0)))
    assert history.unscored_checkpoints(run) == [] and history.is_finished(run, 4)


def test_keeps_the_last_the_best_and_what_is_not_scored_yet(tmp_path):
    run = make_run(
        tmp_path,
        {1: 30.0, 2: 10.0, 3: 20.0, 4: None, 5: 11.0, 6: 12.0},
        checkpoint={"keep_last": 1, "keep_best": 2},
    )
    history.prune(config_of(run), scores.read_run(run))
    assert steps_of(checkpoint.complete_checkpoints(run)) == [1, 3, 4, 6]
    assert sorted(set(scores.read_run(run)["step"])) == [1, 2, 3, 5, 6]
    assert storage.exists(f"{run}/checkpoint-00000002/{checkpoint.SETTINGS}")


def test_a_run_s_pruning_leaves_a_copy_of_a_checkpoint_alone(tmp_path):
    run = make_run(tmp_path, {1: 10.0, 2: 30.0, 3: 20.0}, checkpoint={"keep_last": 1, "keep_best": 1})
    shutil.copytree(f"{run}/checkpoint-00000001", f"{run}/checkpoint-best")
    history.prune(config_of(run), scores.read_run(run))
    assert storage.exists(f"{run}/checkpoint-best/{checkpoint.STUDENT}")
    assert not storage.exists(f"{run}/checkpoint-00000001/{checkpoint.STUDENT}")


def moved_run(tmp_path):
    """A run of five checkpoints of which the last two were scored on a GPU, where the others would be better."""
    run = make_run(tmp_path, {1: 90.0, 2: 80.0, 3: 70.0, 4: None, 5: None}, steps=5, checkpoint={"keep_best": 1})
    for step, psnr in ((4, 40.0), (5, 30.0)):
        write_scores(run, step, scores.to_table(checkpoint_rows(step, psnr, device="NVIDIA H100")))
    return run


def test_a_run_that_moved_to_a_gpu_chooses_among_what_was_scored_there_until_the_rest_is_scored_again(tmp_path):
    run = moved_run(tmp_path)
    assert Run.load(run).chosen == "checkpoint-00000004"
    assert (history.is_finished(run, 5), history.unscored_checkpoints(run)) == (True, [])
    assert steps_of(history.unscored_checkpoints(run, "float32 on gpu")) == [1, 2, 3]
    assert steps_of(history.unscored_checkpoints(run, "float32 on cpu")) == [4, 5]
    history.prune(config_of(run), scores.read_run(run))
    assert steps_of(checkpoint.complete_checkpoints(run)) == [1, 2, 3, 4, 5]
    write_scores(run, 2, scores.to_table(checkpoint_rows(2, 80.0, device="NVIDIA H100")))
    assert Run.load(run).chosen == "checkpoint-00000002"


def runs_of(tmp_path, *settings):
    """Runs that differ in these settings."""
    named = [each | {"run": {"name": f"r{index}", **each["run"]}} for index, each in enumerate(settings)]
    urls = [make_run(tmp_path, {}, **each) for each in named]
    return [Run.load(url) for url in urls]


def test_arms_are_named_by_what_differs_from_the_first_run_but_for_the_seed(tmp_path):
    runs = runs_of(
        tmp_path,
        {"run": {"seed": 3}},
        {"run": {"seed": 4}, "train": {"steps": 4, "log_every": 7}},  # which changes nothing of the weights
        {"run": {"seed": 3}, "teacher": {"ema_rate": 0.5}},
        {"run": {"seed": 3}, "teacher": {"ema_rate": 0.5, "norm": "batch"}, "objective": {"beta": 0.125}},
        {"run": {"seed": 9}, "teacher": {"ema_rate": 0.5}},
    )
    assert history.arms(runs) == {
        "reference": {3: runs[0], 4: runs[1]},
        "ema_rate 0.5": {3: runs[2], 9: runs[4]},
        "beta 0.125, ema_rate 0.5, norm batch": {3: runs[3]},
    }


def test_two_runs_of_one_arm_and_seed_are_refused(tmp_path):
    runs = runs_of(tmp_path, {"run": {"seed": 3}}, {"run": {"seed": 3, "max_failures": 9}})
    with pytest.raises(ValueError, match=r"r0 and .*/r1 have the same settings and seed; name one of them"):
        history.arms(runs)


def test_a_run_is_read_from_its_folder(tmp_path):
    url = make_run(tmp_path, {1: 10.0, 2: 30.0}, steps=9)
    records = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    storage.write_text(f"{url}/metrics.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    run = Run.load(url)
    assert (run.name, run.url, run.config.train.steps) == ("run", url, 9)
    assert run.provenance["manifest_sha256"][0] == DATA
    assert run.metrics == records
    assert set(run.scores["step"]) == {1, 2}


STRANGERS = (".nfs0001", ".DS_Store", "Thumbs.db", "train-7.low.webp.part", "notes.low.txt", "train-7.depth.webp")


def test_damaged_records_and_stray_files_are_named_and_passed_over(tmp_path, capsys):
    url = make_run(tmp_path, {1: 10.0, 2: 30.0, 3: 20.0})
    lines = [
        b'{"step": 1, "loss": 0.5}',
        b'{"step": 2, "lo',
        b"\0\0\0",
        b"[3]",
        b'{"loss": 1}',
        b'{"step": 4, "x": "y"}',
    ]
    storage.write_bytes(f"{url}/metrics.jsonl", b"\n".join([*lines, b"\xff", b'{"step": 5, "loss": NaN}']))
    storage.write_text(f"{url}/provenance.json", '{"manifest_sha256": ["5e')
    storage.write_bytes(f"{url}/checkpoint-00000001/provenance.json", b"\xff\xfe")
    storage.write_bytes(f"{url}/checkpoint-00000002/scores-dev.parquet", b"PAR1")
    for folder in (url, f"{url}/checkpoint-00000003", f"{url}/checkpoint-00000003/pictures-dev"):
        for name in STRANGERS:
            storage.write_text(f"{folder}/{name}", "")
    storage.write_text(f"{url}/checkpoint-00000003/pictures-dev/train-7.low.webp", "")
    run = Run.load(url)
    assert [record["step"] for record in run.metrics] == [1, 5]
    assert run.provenance == json.loads(storage.read_text(f"{url}/checkpoint-00000002/provenance.json"))
    assert (set(run.scores["step"]), run.chosen) == ({1, 3}, "checkpoint-00000003")
    assert list(run.pictures("checkpoint-00000003", "dev")) == ["train-7"]
    said = capsys.readouterr().out
    assert "metrics.jsonl: ignored 6 of 8 lines that can't be read, the first is 2" in said
    assert f"{url}/provenance.json: can't be read" in said and "checkpoint-00000001/provenance.json: can't be" in said
    assert "checkpoint-00000002/scores-dev.parquet: is not a table of scores" in said
    assert all(name in said.partition("pictures-dev: ignored")[2] for name in STRANGERS)
    Run.load(url)
    assert capsys.readouterr().out == ""  # once is enough


def test_without_any_provenance_the_only_data_that_were_scored_choose(tmp_path):
    url = make_run(tmp_path, {1: 10.0, 2: 30.0})
    for name in ("", "checkpoint-00000001/", "checkpoint-00000002/"):
        storage.delete(f"{url}/{name}provenance.json")
    assert Run.load(url).chosen == "checkpoint-00000002"
    write_scores(url, 1, scores.to_table(checkpoint_rows(1, 99.0, data="other")))
    assert Run.load(url).chosen is None


def test_a_checkpoint_whose_scores_are_damaged_is_scored_again(tmp_path):
    run = make_run(tmp_path, {2: 10.0, 4: 20.0})
    file = f"{run}/checkpoint-00000004/scores-dev.parquet"
    storage.write_bytes(file, storage.read_bytes(file)[:-9])
    assert steps_of(history.unscored_checkpoints(run)) == [4] and not history.is_finished(run, 4)
    write_scores(run, 4, scores.to_table(checkpoint_rows(4, 25.0)))
    assert history.is_finished(run, 4)
    assert scores.means(scores.read(file)).loc["student", ("rgb_u8", "psnr")] == 25.0
    assert storage.exists(f"{file}.unreadable")


def test_a_run_that_has_only_begun_is_read_too(tmp_path):
    run = Run.load(make_run(tmp_path, {}))
    assert (run.metrics, len(run.scores), run.chosen) == ([], 0, None)
    assert run.scores_of("checkpoint-00000001", "dev").empty
    with pytest.raises(ValueError, match="run: no checkpoint could be scored"):
        run_table(run, "dev")


def test_a_folder_that_holds_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nothing/settings.yaml: no such settings file"):
        Run.load(str(tmp_path / "nothing"))


def test_a_checkpoint_is_not_taken_for_a_run(tmp_path):
    with pytest.raises(ValueError, match="checkpoint-00000001: is a checkpoint; give the folder of its run"):
        Run.load(f"{make_run(tmp_path, {1: 10.0})}/checkpoint-00000001")


def test_scores_of_a_checkpoint_are_those_on_the_run_s_own_data_or_on_the_test_data_scored_last(tmp_path):
    url = make_run(tmp_path, {1: 10.0, 2: 30.0})
    write_scores(url, 1, scores.to_table(checkpoint_rows(1, 50.0, data="other")))
    for data, psnr in (("one", 20.0), ("two", 25.0)):
        write_scores(url, 1, scores.to_table(checkpoint_rows(1, psnr, split="test", data=data)), "test")

    def psnr_of(name, split):
        rows = Run.load(url).scores_of(name, split)
        return rows[(rows["metric"] == "psnr") & (rows["method"] == "student")]["value"].mean()

    assert psnr_of("checkpoint-00000001", "dev") == 10.0
    assert psnr_of("checkpoint-00000001", "test") == 25.0
    assert psnr_of("checkpoint-00000002", "dev") == 30.0
    assert Run.load(url).scores_of("checkpoint-00000002", "test").empty


def test_the_table_of_a_run_is_the_chosen_checkpoint_s_beside_the_mean_of_the_last(tmp_path):
    run = Run.load(make_run(tmp_path, {1: 40.0, 2: 30.0, 3: 21.0}, evaluation={"last": 2}))
    table = run_table(run, "dev")
    assert table.heading.startswith("checkpoint: checkpoint-00000001, split: dev")
    assert [row[:2] for row in table.rows[1:3]] == [["student", "40.00"], ["  mean of last 2", "25.50"]]
    with pytest.raises(ValueError, match="checkpoint-00000001 has not been scored on the test split"):
        run_table(run, "test")


def test_the_ranking_bears_a_name_that_says_what_it_is():
    settings = {"run": {"name": "r"}, "data": {"url": "/d"}, "train": {"steps": 1}, "checkpoint": {"metric": "ssim"}}
    assert Config.model_validate(settings).checkpoint.ranking == "dev_student_ssim"

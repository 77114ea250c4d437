"""Which of a run's checkpoints is the best."""

import math

import pytest
from score_tables import checkpoint_rows, make_run, score_rows

from pipeline.run import checkpoint, ranking, scores

NAN = float("nan")


def config_of(run):
    return checkpoint.read_config(run)


def steps_of(names):
    return [int(name[-8:]) for name in names]


def to_table(psnr_by_step):
    return scores.to_table([row for step, psnr in psnr_by_step.items() for row in checkpoint_rows(step, psnr)])


@pytest.mark.parametrize(
    ("metric", "network", "order"),
    [
        ("psnr", "student", [3, 2, 1, 4]),
        ("psnr", "averaged", [1, 3, 2, 4]),  # the average's PSNR falls as the student's rises
        ("lpips", "student", [3, 2, 1, 4]),  # and so does the LPIPS, where less is better
    ],
)
def test_ranks_by_the_metric_in_its_own_direction_and_puts_what_has_no_number_last(metric, network, order, tmp_path):
    run = make_run(tmp_path, {}, checkpoint={"metric": metric, "network": network})
    table = to_table({1: 10.0, 2: 20.0, 3: 20.0, 4: NAN})
    assert steps_of(ranking.rank_checkpoints(table, config_of(run))) == order


def test_an_infinite_score_is_the_best(tmp_path):
    table = to_table({1: 40.0, 2: math.inf, 3: 30.0})
    assert steps_of(ranking.rank_checkpoints(table, config_of(make_run(tmp_path, {})))) == [2, 1, 3]


def test_a_checkpoint_with_an_image_that_failed_comes_last_however_good_the_others_are(tmp_path):
    rows = score_rows({"student": {"a": 90.0, "b": None}}, step=1) + score_rows({"student": {"a": 9, "b": 9}}, step=2)
    assert steps_of(ranking.rank_checkpoints(scores.to_table(rows), config_of(make_run(tmp_path, {})))) == [2, 1]


def test_the_first_protocol_ranks_and_the_test_split_does_not(tmp_path):
    run = make_run(tmp_path, {}, evaluation={"protocols": ["cidnet", "rgb_u8"]})
    rows = []
    for step, cidnet, rgb, test in ((1, 30.0, 10.0, 10.0), (2, 20.0, 20.0, 90.0)):
        rows += score_rows({"student": {"a": cidnet}}, "psnr", "cidnet", step=step)
        rows += score_rows({"student": {"a": rgb}}, step=step)
        rows += score_rows({"student": {"a": test}}, "psnr", "cidnet", step=step, split="test")
    assert steps_of(ranking.rank_checkpoints(scores.to_table(rows), config_of(run))) == [1, 2]


def test_score_of_images_are_those_that_rank(tmp_path):
    config = config_of(make_run(tmp_path, {}, checkpoint={"metric": "lpips", "network": "averaged"}))
    rows = checkpoint_rows(1, 20.0) + score_rows({"averaged": {"a": 0.3, "b": 0.1}}, "ssim")
    assert dict(ranking.score_of_images(scores.to_table(rows), config)) == {"a": -20.0, "b": -20.0}

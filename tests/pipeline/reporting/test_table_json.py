"""A printed table as JSON: the numbers unrounded, what they are of, and why some are missing."""

import json
import math

import pytest
from scipy import stats
from score_tables import DATA, checkpoint_rows, score_rows, score_table

from pipeline.reporting import tables
from pipeline.reporting.table_json import as_json
from pipeline.run import scores

WEIGHTS = "443c5bc3" + 56 * "0"


def of_checkpoint(rows, *others):
    table = scores.to_table(rows)
    return json.loads(as_json(tables.checkpoint_table(table, *others), {"run/it": table}))


def test_a_checkpoint_s_numbers_bear_all_that_they_are_of():
    rows = score_rows({"input": {"a": 7.0, "b": 9.125}, "student": {"a": 20.0, "b": 21.125}}, step=1000, split="test")
    rows += score_rows(
        {"input": {"a": 0.5, "b": 0.5}, "student": {"a": 0.25, "b": 0.125}}, "lpips", "alex", step=1000, split="test",
        lpips_sha256=WEIGHTS,
    )  # fmt: skip
    assert of_checkpoint(rows) == {
        "checkpoints": {"run/it": "checkpoint-00001000"},
        "split": "test",
        "data_sha256": DATA,
        "images": 2,
        "lpips_sha256": {"alex": WEIGHTS},
        "numbers": [
            {"row": "input", "method": "input", "protocol": "rgb_u8", "metric": "psnr", "mean": 8.0625},
            {"row": "input", "method": "input", "protocol": "alex", "metric": "lpips", "mean": 0.5},
            {"row": "student", "method": "student", "protocol": "rgb_u8", "metric": "psnr", "mean": 20.5625},
            {"row": "student", "method": "student", "protocol": "alex", "metric": "lpips", "mean": 0.1875},
        ],
        "notes": [],
    }


def test_means_of_the_last_checkpoints_are_told_apart():
    split = scores.to_table([row for step, psnr in ((1, 90.0), (2, 20.0)) for row in checkpoint_rows(step, psnr)])
    numbers = of_checkpoint(checkpoint_rows(1, 90.0), split, 2)["numbers"]
    found = {(each["row"], each["method"]): each["mean"] for each in numbers if each["metric"] == "psnr"}
    assert found == {
        ("input", "input"): 6, ("student", "student"): 90, ("mean of last 2", "student"): 55,
        ("averaged", "averaged"): -90, ("mean of last 2", "averaged"): -55,
    }  # fmt: skip


def test_numbers_that_are_not_finite_are_null_with_the_reason():
    rows = score_rows({"input": {"a": math.inf, "b": 1.0}, "student": {"a": 1.0, "b": None}})
    rows += score_rows({"input": {"a": None, "b": None}}, "lpips", "alex", reason="no weights found")
    document = of_checkpoint(rows)
    first, second = document["numbers"]
    assert (first["mean"], first["reason"]) == (None, "infinite: images are equal to their clean ones")
    assert (second["mean"], second["reason"]) == (None, "b: too dark")
    assert document["notes"] == ["PSNR left out for b: too dark", "LPIPS left out: no weights found"]
    assert document["lpips_sha256"] == {}


def test_compared_candidates_have_differences_and_their_intervals():
    scored = {
        "ours": score_table({"student": {"a": 10.0, "b": 20.0}}, step=7),
        "theirs": score_table({"images": {"a": 13.0, "b": 21.0}}, checkpoint="pictures"),
        "clean": score_table({"images": {"a": math.inf, "b": 20.0}}, checkpoint="clean"),
    }
    document = json.loads(as_json(tables.candidates_table(scored), scored))
    assert document["checkpoints"] == {"ours": "checkpoint-00000007", "theirs": "pictures", "clean": "clean"}
    psnr = {"protocol": "rgb_u8", "metric": "psnr"}
    infinite = {"reason": "infinite: images are equal to their clean ones"}
    half = stats.t.ppf(1 - 0.025 / 2, 1)  # of two differences, 3 and 1, one of two comparisons
    assert document["numbers"] == [
        {"row": "ours", "method": "student", **psnr, "mean": 15.0},
        {"row": "theirs", "method": "images", **psnr, "mean": 17.0},
        {"row": "clean", "method": "images", **psnr, "mean": None} | infinite,
        {
            "row": "theirs - reference",
            **psnr,
            "mean": 2.0,
            "low": pytest.approx(2 - half),
            "high": pytest.approx(2 + half),
        },
        {"row": "clean - reference", **psnr, "mean": None, "low": None, "high": None} | infinite,
    ]
    assert [line.startswith("differences: mean [95% t interval over images") for line in document["notes"]] == [True]


def test_the_difference_of_a_single_image_has_no_interval_and_says_so():
    scored = {"one": score_table({"images": {"a": 10.0}}), "two": score_table({"images": {"a": 12.0}})}
    difference = json.loads(as_json(tables.candidates_table(scored), scored))["numbers"][-1]
    assert (difference["mean"], difference["low"], difference["high"]) == (2.0, None, None)
    assert difference["reason"] == "a single image has no interval"

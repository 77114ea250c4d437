"""Scores as tables: what stands in them, under which heading, and what is refused."""

import math
import statistics

import pytest
from score_tables import checkpoint_rows, score_rows, score_table

from pipeline.reporting import tables
from pipeline.run import scores

WEIGHTS = "443c5bc3" + 56 * "0"


def student(values, **others):
    """Scores of the student alone."""
    return score_table({"student": values}, **others)


# --- one checkpoint


def test_a_checkpoint_s_table():
    rows = score_rows({"student": {"a": 20.0, "b": 21.111}, "input": {"a": 7.0, "b": 9.0}}, step=1000)
    rows += score_rows({"student": {"a": 0.7, "b": 0.8}, "input": {"a": 0.1, "b": 0.2}}, "ssim", step=1000)
    rows += score_rows(
        {"student": {"a": 0.2, "b": 0.1}, "input": {"a": 0.5, "b": 0.5}}, "lpips", "alex", step=1000,
        lpips_sha256=WEIGHTS,
    )  # fmt: skip
    assert str(tables.checkpoint_table(scores.to_table(rows))).splitlines() == [
        "checkpoint: checkpoint-00001000, split: dev, protocol: rgb_u8, LPIPS: alex (weights 443c5bc3), 2 images",
        "method   PSNR dB    SSIM   LPIPS",
        "input       8.00  0.1500  0.5000",
        "student    20.56  0.7500  0.1500",
    ]


def test_several_protocols_and_backbones_are_named_above_their_columns():
    rows = [
        *score_rows({"images": {"a": 20.0}}, "psnr", "rgb_u8"),
        *score_rows({"images": {"a": 0.3}}, "lpips", "vgg", lpips_sha256=WEIGHTS),
        *score_rows({"images": {"a": 22.0}}, "psnr", "cidnet_gtmean"),
    ]
    table = tables.checkpoint_table(scores.to_table(rows))
    assert "protocol: rgb_u8, cidnet_gtmean, LPIPS: vgg (weights 443c5bc3)" in table.heading
    assert list(table.columns) == ["method", "rgb_u8 PSNR dB", "cidnet_gtmean PSNR dB", "LPIPS"]
    assert list(table.rows) == [["images", "20.00", "22.00", "0.3000"]]
    rows += score_rows({"images": {"a": 0.4}}, "lpips", "alex", lpips_sha256=WEIGHTS)
    assert list(tables.checkpoint_table(scores.to_table(rows)).columns)[3:] == ["vgg LPIPS", "alex LPIPS"]


def test_lpips_without_weights_has_no_column_but_a_reason():
    rows = score_rows({"student": {"a": 20.0, "b": 20.0}})
    rows += score_rows({"student": {"a": None, "b": None}}, "lpips", "alex", reason="no weights found")
    table = tables.checkpoint_table(scores.to_table(rows))
    assert list(table.columns) == ["method", "PSNR dB"]
    assert list(table.notes) == ["LPIPS left out: no weights found"]
    assert "LPIPS" not in table.heading


def test_images_that_failed_are_named_and_leave_no_mean():
    values = {f"image{index}": 20.0 for index in range(9)}
    one = tables.checkpoint_table(score_table({"input": values, "student": values | {"image3": None}}))
    assert list(one.rows) == [["input", "20.00"], ["student", "nan"]]
    assert list(one.notes) == ["PSNR left out for image3: too dark"]
    many = tables.checkpoint_table(student(values | {f"image{index}": None for index in range(6)}))
    assert list(many.notes) == ["PSNR left out for image0, image1, image2, image3, image4 ...: too dark"]


def test_equal_images_have_an_infinite_psnr():
    assert list(tables.checkpoint_table(student({"a": math.inf, "b": 20.0})).rows) == [["student", "inf"]]


def test_the_mean_of_the_last_stands_below_what_was_trained():
    split = scores.to_table(
        [row for step, psnr in ((1, 90.0), (2, 20.0), (3, 31.0)) for row in checkpoint_rows(step, psnr)]
    )
    chosen = split[split["step"] == 1]
    table = tables.checkpoint_table(chosen, split, 2)
    assert [row[:2] for row in table.rows] == [
        ["input", "6.00"],
        ["student", "90.00"],
        ["  mean of last 2", "25.50"],
        ["averaged", "-90.00"],
        ["  mean of last 2", "-25.50"],
    ]
    assert table.heading.startswith("checkpoint: checkpoint-00000001,")
    assert [row[0] for row in tables.checkpoint_table(chosen, split, 9).rows].count("  mean of last 3") == 2


@pytest.mark.parametrize("split", [None, scores.to_table(checkpoint_rows(1, 90.0))], ids=["none", "the same alone"])
def test_there_is_no_mean_of_a_single_checkpoint(split):
    rows = tables.checkpoint_table(scores.to_table(checkpoint_rows(1, 90.0)), split, 10).rows
    assert [row[0] for row in rows] == ["input", "student", "averaged"]


# --- several candidates


def test_candidates_beside_each_other_with_paired_differences():
    def candidate(psnr, ssim):
        return scores.to_table(score_rows({"student": psnr}) + score_rows({"student": ssim}, "ssim"))

    table = tables.candidates_table(
        {
            "ours": candidate({"a": 10.0, "b": 20.0}, {"a": 0.5, "b": 0.6}),
            # the images in another order: pairs are found by key
            "theirs": candidate({"b": 21.0, "a": 13.0}, {"b": 0.55, "a": 0.45}),
            "third": candidate({"a": 9.5, "b": 19.5}, {"a": 0.5, "b": 0.6}),
        }
    )
    assert table.heading == "split: dev, protocol: rgb_u8, 2 images"
    assert list(table.columns) == ["", "PSNR dB", "SSIM"]
    assert list(table.rows) == [
        ["ours", "15.00", "0.5500"],
        ["theirs", "17.00", "0.5000"],
        ["third", "14.50", "0.5500"],
        # the differences 3 and 1 have a standard error of 1; of one degree of freedom t is 25.45 with 2.5% / 2
        ["theirs - reference", "+2.00 [-23.45, +27.45]", "-0.0500 [-0.0500, -0.0500]"],
        ["third - reference", "-0.50 [-0.50, -0.50]", "+0.0000 [+0.0000, +0.0000]"],
    ]
    assert list(table.notes) == [
        "differences: mean [95% t interval over images, which holds for all 2 of a column together]; one seed says "
        "nothing of others"
    ]


def test_candidates_may_be_of_different_methods():
    images = score_table({"images": {"a": 12.0}})
    table = tables.candidates_table({"ours": student({"a": 10.0}), "theirs": images})
    assert list(table.rows)[2] == ["theirs - reference", "+2.00"]  # of one image alone


@pytest.mark.usefixtures("no_warnings")
def test_infinite_scores_of_candidates():
    first, other = student({"a": math.inf, "b": 10.0}), student({"a": math.inf, "b": 12.0})
    rows = list(tables.candidates_table({"one": first, "two": other}).rows)
    assert rows == [["one", "inf"], ["two", "inf"], ["two - reference", "+1.00 [-11.71, +13.71]"]]
    rows = list(tables.candidates_table({"one": student({"a": 10.0, "b": 10.0}), "two": other}).rows)
    assert rows[-1] == ["two - reference", "+inf"]


def test_lpips_that_one_candidate_lacks_is_no_number_and_has_a_reason():
    def candidate(lpips, **others):
        return scores.to_table(
            score_rows({"student": {"a": 20.0}}) + score_rows({"student": {"a": lpips}}, "lpips", "alex", **others)
        )

    table = tables.candidates_table({"one": candidate(None), "two": candidate(0.2, lpips_sha256=WEIGHTS)})
    assert [row[2] for row in table.rows[:2]] == ["nan", "0.2000"]
    assert "nan" in table.rows[2][2]
    assert "LPIPS: alex (weights 443c5bc3)" in table.heading
    assert table.notes[0] == "LPIPS left out: too dark"


INCOMPARABLE = {
    "data set": score_rows({"student": {"a": 1.0, "b": 1.0}}, data="other"),
    "split": score_rows({"student": {"a": 1.0, "b": 1.0}}, split="test"),
    "images": score_rows({"student": {"a": 1.0, "c": 1.0}}),
    "fewer images": score_rows({"student": {"a": 1.0}}),
    "protocols": score_rows({"student": {"a": 1.0, "b": 1.0}}, "psnr", "cidnet"),
    "metrics": score_rows({"student": {"a": 1.0, "b": 1.0}}, "ssim"),
}


@pytest.mark.parametrize("what", INCOMPARABLE)
def test_what_does_not_compare_is_refused_by_name(what):
    said = {"fewer images": "images", "metrics": "protocols"}.get(what, what)
    first, other = student({"a": 1.0, "b": 1.0}), scores.to_table(INCOMPARABLE[what])
    with pytest.raises(ValueError, match=f"^theirs: was scored .*{said}"):
        tables.candidates_table({"ours": first, "theirs": other})
    with pytest.raises(ValueError, match=f"^theirs: was scored .*{said}"):
        tables.arms_table({"ours": {0: first}, "theirs": {0: first, 1: other}}, "chosen")


def test_lpips_by_other_weights_does_not_compare():
    one, two = (score_table({"student": {"a": 0.1}}, "lpips", "alex", lpips_sha256=weights) for weights in "vw")
    with pytest.raises(ValueError, match=r"^theirs: its LPIPS is by other weights than the first"):
        tables.candidates_table({"ours": one, "theirs": two})
    with pytest.raises(ValueError, match=r"^ours: its LPIPS is by other weights than the first"):
        tables.arms_table({"ours": {0: one, 1: two}}, "chosen")


def test_scores_of_another_kind_of_device_do_not_compare_and_a_gpu_is_named():
    cpu, gpu, other_gpu = (student({"a": 1.0}, device=device) for device in ("cpu", "NVIDIA H100", "NVIDIA T4"))
    for make in (tables.candidates_table, lambda arms: tables.arms_table({"one": dict(enumerate(arms.values()))}, "x")):
        with pytest.raises(ValueError, match="was scored in float32 on gpu, unlike the first; score both on one kind"):
            make({"ours": cpu, "theirs": gpu})
    assert tables.candidates_table({"ours": gpu, "theirs": other_gpu}).heading.endswith(
        "scored on: NVIDIA H100, NVIDIA T4, 1 images"
    )
    assert "scored on" not in tables.candidates_table({"ours": cpu, "theirs": cpu}).heading


# --- arms and seeds


def arm(values):
    """An arm's scores by seed: for each seed the values of the images a and b."""
    return {seed: student(dict(zip("ab", images, strict=True))) for seed, images in values.items()}


def test_arms_with_mean_and_deviation_over_seeds_and_differences_paired_by_seed():
    reference = arm({0: (19.0, 21.0), 1: (22.0, 22.0), 2: (23.0, 25.0)})  # means 20, 22, 24
    # seeds 1 and 2 are the reference's plus 1; seed 3 has no partner there
    changed = arm({3: (50.0, 50.0), 2: (24.0, 26.0), 1: (23.0, 23.0)})
    table = tables.arms_table({"reference": reference, "changed": changed}, "chosen checkpoints")
    assert table.heading == "chosen checkpoints, split: dev, protocol: rgb_u8, 2 images"
    assert list(table.columns) == ["arm", "seeds", "PSNR dB", "difference to reference"]
    deviation = statistics.stdev([50, 25, 23])
    assert list(table.rows) == [
        ["reference", "3", "22.00 ± 2.00", ""],
        ["changed", "3", f"{98 / 3:.2f} ± {deviation:.2f}", "+1.00 [+1.00, +1.00]"],
    ]
    assert list(table.notes) == [
        "mean ± standard deviation over seeds; differences: mean [95% t interval over seeds and images]"
    ]


def test_arms_without_a_seed_in_common_have_no_difference_and_single_seeds_no_deviation():
    table = tables.arms_table({"one": arm({0: (1.0, 3.0)}), "two": arm({1: (2.0, 4.0)})}, "x")
    assert list(table.rows) == [["one", "1", "2.00", ""], ["two", "1", "3.00", ""]]


def test_the_interval_over_seeds_pairs_images_by_key_whatever_their_order():
    first = {seed: student({"a": 10.0, "b": 10.0}) for seed in range(8)}
    ahead = {"a": 11.0, "b": 9.0}
    other = {seed: student(ahead if seed % 2 else dict(reversed(ahead.items()))) for seed in range(8)}
    # all seeds agree that a gains 1 and b loses 1: two images, of which the mean has a standard error of 1
    rows = tables.arms_table({"one": first, "two": other}, "x").rows
    assert rows[1][3] == "+0.00 [-12.71, +12.71]"


def test_the_metrics_of_arms_stand_beside_their_own_differences():
    def run(shift):
        rows = score_rows({"student": {"a": 20.0 + shift}}) + score_rows({"student": {"a": 0.5 + shift / 100}}, "ssim")
        return scores.to_table(rows)

    table = tables.arms_table({"one": {0: run(0), 1: run(1)}, "two": {0: run(3), 1: run(4)}}, "x")
    assert list(table.columns) == [
        "arm",
        "seeds",
        "PSNR dB",
        "difference to reference",
        "SSIM",
        "difference to reference",
    ]
    assert list(table.rows)[1] == [
        "two", "2", "23.50 ± 0.71", "+3.00 [+3.00, +3.00]", "0.5350 ± 0.0071", "+0.0300 [+0.0300, +0.0300]"
    ]  # fmt: skip

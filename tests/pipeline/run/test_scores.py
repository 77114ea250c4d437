"""The table of scores: stored, put together, averaged."""

import math

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from score_tables import DATA, checkpoint_rows, make_run, score_rows, score_table, write_scores

from pipeline import storage
from pipeline.run import scores

NAN = float("nan")


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path):
    """A folder on a local file system, and one on S3."""
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("s3").make_bucket()


def values_of(table, *columns):
    """The values by some of the columns."""
    return {tuple(row[name] for name in columns): row["value"] for row in table.to_dict("records")}


# --- storing


def test_a_table_reads_back_as_it_was_written(place):
    rows = [
        *score_rows({"student": {"a": 12.5, "b": math.inf}}, step=7, libraries="torch 2"),
        *score_rows({"student": {"a": 0.25, "b": None}}, "lpips", "alex", step=7, lpips_sha256="abc"),
    ]
    url = storage.join(place, "below/scores.parquet")
    scores.write(url, scores.to_table(rows))
    table = scores.read(url)
    pd.testing.assert_frame_equal(table, scores.to_table(rows))
    assert list(table["value"][:3]) == [12.5, math.inf, 0.25]
    assert math.isnan(table["value"][3])
    assert set(table["step"]) == {7}
    assert list(table["reason"].isna()) == [True, True, True, False]
    assert list(table["lpips_sha256"].dropna()) == ["abc", "abc"]
    assert list(table["libraries"].dropna()) == ["torch 2", "torch 2"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"not Parquet at all", "is not a table of scores"), (None, "is not a table of scores .*without .*key.*protocol")],
)
def test_what_is_no_table_of_scores_is_refused_by_name(content, message, tmp_path):
    path = tmp_path / "scores.parquet"
    if content is None:
        pq.write_table(pa.table({"value": [1.0], "step": [1]}), path)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"scores.parquet: {message}"):
        scores.read(str(path))


def test_a_byte_that_is_damaged_anywhere_is_noticed(tmp_path):
    path = tmp_path / "scores.parquet"
    table = scores.to_table(checkpoint_rows(3, 20.0, lpips_sha256="w"))
    scores.write(str(path), table)
    whole, silent = path.read_bytes(), []
    for place in range(0, len(whole), 61):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            silent += [place] * (not scores.read(str(path)).equals(table))
        except ValueError as error:
            assert str(error).startswith(f"{path}: is not a table of scores (")
    assert not silent


def test_a_table_of_an_older_form_is_refused_by_what_it_lacks(tmp_path):
    path = tmp_path / "scores.parquet"
    pq.write_table(
        pa.Table.from_pandas(score_table({"student": {"a": 1.0}}).drop(columns=["device", "precision"])), path
    )
    with pytest.raises(ValueError, match=r"without device, precision'?\); score the checkpoint again"):
        scores.read(str(path))


def test_new_rows_replace_those_of_the_same_kind_and_no_others(tmp_path):
    url = str(tmp_path / "scores.parquet")
    kinds = {"psnr": ("psnr", "rgb_u8"), "cidnet": ("psnr", "cidnet"), "lpips": ("lpips", "alex")}
    before = [score_rows({"input": {"a": 1.0}, "student": {"a": 2.0, "b": 3.0}}, *kind) for kind in kinds.values()]
    other = score_rows({"student": {"a": 50.0}}, data="other set")
    scores.store(url, scores.to_table([row for part in [*before, other] for row in part]))
    returned = scores.store(
        url,
        scores.to_table(
            [
                *score_rows({"student": {"a": 9.0}}),
                *score_rows({"student": {"a": 8.0}}, "lpips", "alex", lpips_sha256="new"),
            ]
        ),
    )
    expected = {
        ("student", "a", "psnr", "rgb_u8"): 9.0,
        ("student", "a", "lpips", "alex"): 8.0,
        ("student", "a", "psnr", "cidnet"): 2.0,
        **{("input", "a", *kind): 1.0 for kind in kinds.values()},
        **{("student", "b", *kind): 3.0 for kind in kinds.values()},
    }
    names = ("method", "key", "metric", "protocol")
    assert values_of(returned, *names) == expected
    assert len(returned) == len(expected)
    assert set(returned["data"]) == {DATA}
    stored = scores.read(url)
    assert len(stored) == len(expected) + 1
    assert values_of(stored[stored["data"] == "other set"], *names) == {("student", "a", "psnr", "rgb_u8"): 50.0}


def test_the_scores_of_all_checkpoints_and_splits_are_put_together(place):
    run = make_run(place, {2: 20.0, 10: 30.0, 3: None})
    write_scores(run, 10, scores.to_table(checkpoint_rows(10, 28.0, split="test")), "test")
    table = scores.rebuild_run_table(run)
    psnr = table[(table["metric"] == "psnr") & (table["method"] == "student") & (table["key"] == "a")]
    assert values_of(psnr, "checkpoint", "step", "split") == {
        ("checkpoint-00000002", 2, "dev"): 19.0,
        ("checkpoint-00000010", 10, "dev"): 29.0,
        ("checkpoint-00000010", 10, "test"): 27.0,
    }
    assert table["step"].is_monotonic_increasing
    assert len(table) == 3 * len(checkpoint_rows(2, 20.0))
    pd.testing.assert_frame_equal(scores.read(storage.join(run, "scores.parquet")), table)
    pd.testing.assert_frame_equal(scores.read_run(run), table)


def test_a_run_without_scores_has_an_empty_table_of_the_same_columns(tmp_path):
    run = make_run(tmp_path, {1: None})
    assert scores.rebuild_run_table(run).empty
    assert list(scores.read(storage.join(run, scores.TABLE)).columns) == scores.SCHEMA.names
    assert scores.read_run(str(tmp_path / "nowhere")).empty


# --- means


def test_means_over_the_images_by_method_and_column():
    rows = [
        *score_rows({"averaged": {"a": 0.2, "b": 0.4}, "input": {"a": 0.6, "b": 0.7}}, "lpips", "vgg"),
        *score_rows({"averaged": {"a": 10.0, "b": 30.0}, "input": {"a": 6.0, "b": math.inf}}, "psnr", "cidnet"),
        *score_rows({"averaged": {"a": 0.5, "b": 0.7}, "input": {"a": 0.1, "b": 0.2}}, "ssim", "cidnet"),
        *score_rows({"averaged": {"a": 11.0, "b": 12.0}, "input": {"a": 1.0, "b": 2.0}}, "psnr", "basicsr_y"),
    ]
    means = scores.means(scores.to_table(rows))
    # methods in the order of tables, protocols as they come, LPIPS last
    assert list(means.index) == ["input", "averaged"]
    columns = [("cidnet", "psnr"), ("cidnet", "ssim"), ("basicsr_y", "psnr"), ("vgg", "lpips")]
    assert list(means.columns) == columns
    assert list(means.loc["averaged"]) == pytest.approx([20.0, 0.6, 11.5, 0.3])
    assert list(means.loc["input"]) == pytest.approx([math.inf, 0.15, 1.5, 0.65])


def test_methods_stand_in_their_order_whatever_the_order_of_the_rows():
    methods = ("images", "averaged", "student", "gamma", "input")
    means = scores.means(score_table({method: {"a": 1.0} for method in methods}))
    assert list(means.index) == ["input", "gamma", "student", "averaged", "images"]


def test_a_mean_with_an_image_missing_is_no_number():
    means = scores.means(score_table({"input": {"a": 1.0, "b": 3.0}, "student": {"a": 40.0, "b": None}}))
    assert means.loc["input"].item() == 2.0
    assert math.isnan(means.loc["student"].item())


@pytest.mark.parametrize(("count", "expected"), [(2, [20.0, 40.0]), (10, [10.0, 20.0, 40.0]), (1, [40.0])])
def test_means_of_the_newest_by_step(count, expected):
    rows = [row for step, psnr in ((2000, 20.0), (1000, 10.0), (10_000, 40.0)) for row in checkpoint_rows(step, psnr)]
    table = scores.to_table(rows)
    newest = scores.means_of_newest(table, table[table["step"] == 1000], count)
    assert [means.loc["student", ("rgb_u8", "psnr")] for means in newest] == expected


@pytest.mark.parametrize(
    "changes", [{"data": "other"}, {"lpips_sha256": "other"}, {"protocol": "cidnet"}, {"device": "H100"}], ids=str
)
def test_checkpoints_scored_otherwise_do_not_count_among_the_newest(changes):
    def rows(step, psnr, protocol="rgb_u8", lpips_sha256="w", **others):
        methods = {"student": {"a": psnr, "b": psnr}}
        return [
            *score_rows(methods, "psnr", protocol, step=step, **others),
            *score_rows(methods, "lpips", "alex", step=step, lpips_sha256=lpips_sha256, **others),
        ]

    like = scores.to_table(rows(1, 10.0))
    table = scores.to_table(rows(1, 10.0) + rows(2, 20.0) + rows(3, 30.0, **changes) + rows(4, 40.0, **changes))
    newest = scores.means_of_newest(table, like, 2)
    assert [list(means.loc["student"]) for means in newest] == [[10.0, 10.0], [20.0, 20.0]]


def test_what_a_checkpoint_was_scored_by_besides_does_not_enter_the_means_of_the_newest():
    like = score_table({"student": {"a": 1.0}}, step=1)
    more = score_rows({"student": {"a": 2.0}}, step=2) + score_rows({"student": {"a": 9.0}}, "psnr", "cidnet", step=2)
    more += score_rows({"student": {"a": 50.0}}, step=2, data="other")
    (means,) = scores.means_of_newest(scores.to_table(more), like, 5)
    assert (list(means.columns), means.loc["student"].item()) == ([("rgb_u8", "psnr")], 2.0)


def test_an_image_without_lpips_is_missed_among_the_newest_though_its_row_names_no_weights():
    def rows(step, broken):
        found = score_rows({"student": {"a": 0.1}}, "lpips", "alex", step=step, lpips_sha256="w")
        value, weights = (None, None) if broken else (0.3, "w")
        return found + score_rows({"student": {"b": value}}, "lpips", "alex", step=step, lpips_sha256=weights)

    table = scores.to_table(rows(1, False) + rows(2, True))
    whole, broken = scores.means_of_newest(table, table[table["step"] == 1], 5)
    assert whole.loc["student"].item() == pytest.approx(0.2)
    assert math.isnan(broken.loc["student"].item())


# --- what need not be scored again

COLUMNS = [("rgb_u8", "psnr"), ("alex", "lpips")]
CPU, GPU = "float32 on cpu", "float32 on gpu"


def covered_table(**lpips):
    methods = {"input": {"a": 1.0, "b": 1.0}, "student": {"a": 1.0, "b": 1.0}}
    return scores.to_table(score_rows(methods) + score_rows(methods, "lpips", "alex", **{"lpips_sha256": "w", **lpips}))


def test_a_whole_table_covers_its_images_and_columns():
    table = covered_table()
    assert scores.covers(table, ["a", "b"], COLUMNS, "w", CPU)
    assert scores.covers(table, ["b"], COLUMNS[:1], None, CPU)
    assert scores.covers(covered_table(lpips_sha256="old"), ["a", "b"], COLUMNS[:1], "w", CPU)


@pytest.mark.parametrize(
    ("keys", "columns", "checksum"),
    [
        (["a", "b", "c"], COLUMNS, "w"),
        (["a", "b"], [*COLUMNS, ("rgb_u8", "ssim")], "w"),
        (["a", "b"], [*COLUMNS, ("cidnet", "psnr")], "w"),
        (["a", "b"], [*COLUMNS, ("vgg", "lpips")], "w"),
        (["a", "b"], COLUMNS, "other weights"),
        (["a", "b"], COLUMNS, None),
        (["a", "x"], COLUMNS, "w"),
    ],
)
def test_what_a_table_lacks_is_not_covered(keys, columns, checksum):
    assert not scores.covers(covered_table(), keys, columns, checksum, CPU)


@pytest.mark.parametrize(
    ("column", "value", "counts"),
    [
        ("device", "cpu", {CPU}),
        ("device", "NVIDIA H100", {GPU}),
        ("device", "NVIDIA T4", {GPU}),
        ("precision", "tf32", set()),
    ],
)
def test_what_was_computed_in_other_conditions_is_not_covered(column, value, counts):
    table = covered_table().assign(**{column: value})
    assert {each for each in (CPU, GPU) if scores.covers(table, ["a", "b"], COLUMNS, "w", each)} == counts
    both = pd.concat([covered_table(), table[table["key"] == "a"]]).drop_duplicates(
        ["key", "method", "metric"], keep="last"
    )
    assert not scores.covers(both, ["a", "b"], COLUMNS, "w", GPU)


def test_neither_an_empty_table_nor_an_image_that_one_method_lacks_is_covered():
    assert not scores.covers(scores.to_table([]), ["a"], COLUMNS, "w", CPU)
    assert not scores.covers(scores.to_table([]), ["a"], [], "w", CPU)
    table = covered_table()
    failed = table["method"].eq("student") & table["key"].eq("b") & table["metric"].eq("psnr")
    assert not scores.covers(table.assign(reason=table["reason"].mask(failed, "died")), ["a", "b"], COLUMNS, "w", CPU)

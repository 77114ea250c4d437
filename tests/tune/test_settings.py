"""A search's settings: read from the command line, checked, and what follows from them."""

import re
from fractions import Fraction

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st

from pipeline.settings.command_line import argument_parser, user_errors
from pipeline.settings.config import Config
from pipeline.settings.files import parse_config
from tune.settings import VARIED, SearchConfig, SearchSettings

ALONE = [option for name in VARIED for option in (f"--search.{name}", "null")]  # nothing is searched


def parsed(*options):
    return parse_config(argument_parser("test"), SearchConfig, ["--config", "demo", *options])[0]


def searched(steps, every, **search):
    run = {"run": {"name": "s", "root": "/runs"}, "data": {"url": "/d"}, "train": {"steps": steps}}
    return SearchConfig.model_validate(run | {"checkpoint": {"every": every}, "search": search})


def test_a_search_has_a_runs_settings_and_its_own():
    config = parsed("--search.trials", "7", "--search.hours=0.5", "--train.steps", "900")
    assert isinstance(config, SearchConfig)
    assert (config.search.trials, config.search.hours, config.train.steps) == (7, 0.5, 900)
    assert (
        config.identity()
        == parse_config(argument_parser(""), Config, ["--config", "demo", "--train.steps=900"])[0].identity()
    )


def test_a_run_has_no_settings_of_a_search(capsys):
    with pytest.raises(SystemExit):
        parse_config(argument_parser("test"), Config, ["--config", "demo", "--search.trials", "7"])
    assert "--search.trials" in capsys.readouterr().err


def test_by_default_the_papers_three_are_searched_for_the_checkpoints_metric():
    config = parsed("--checkpoint.metric", "lpips")
    assert [name for name in VARIED if getattr(config.search, name)] == ["scale_weights", "gamma", "ema_rate"]
    assert [(each.text, each.direction) for each in config.objectives] == [("lpips", "minimize")]


@pytest.mark.parametrize(
    ("values", "limits"),
    [(["0.25", "4"], (0.25, 4)), (["[0.25, 4]"], (0.25, 4)), (["null"], None)],
    ids=["words", "list", "null"],
)
def test_a_range_is_two_words_or_a_yaml_list_or_null(values, limits):
    assert parsed("--search.gamma", *values, "--search.trials", "9").search.gamma == limits


def test_a_single_null_with_an_equals_sign():
    assert parsed("--search.gamma=null").search.gamma is None


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        (["psnr", "lpips"], ("psnr", "lpips")),
        (["psnr - 20 lpips", "ssim"], ("psnr - 20 lpips", "ssim")),
        (["[psnr - 20 lpips, ssim]"], ("psnr - 20 lpips", "ssim")),
        (["psnr  -20 lpips"], ("psnr -20 lpips",)),
        (["[]"], ()),
    ],
)
def test_objectives_are_words_or_a_yaml_list(values, texts):
    assert parsed("--search.objectives", *values, "--search.trials", "9").search.objectives == texts


def test_settings_read_back_the_same(tmp_path):
    config = parsed(
        "--search.objectives", "psnr - 20 lpips", "ssim", "--search.beta", "0.1", "1", "--search.gamma=null"
    )
    path = tmp_path / "search.yaml"
    path.write_text(config.to_yaml())
    assert parse_config(argument_parser("test"), SearchConfig, ["--config", str(path)])[0] == config
    assert yaml.safe_load(path.read_text())["search"]["beta"] == [0.1, 1]


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit):
        parsed("--help")
    text = " ".join(capsys.readouterr().out.split())
    for name, field in SearchSettings.model_fields.items():
        assert f"--search.{name}".replace("_", "-") in text
        assert field.description, name
    assert "--search.gamma [FLOAT,...] [[FLOAT,...] ...] range of objective.gamma" in text
    assert "null leaves it alone [default [0.25, 4.0]]" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--search.gamma", "4", "0.25"], r"search.gamma: must be two numbers above 0, the lower one first, not \[4.0"),
        (["--search.gamma", "1", "1"], "search.gamma: must be two numbers above 0"),
        (["--search.beta", "0", "1"], "search.beta: must be two numbers above 0"),
        (["--search.scale-weights", "-1", "1"], "search.scale_weights: must be two numbers above 0"),
        (["--search.mirror-weight", "nan", "1"], "search.mirror_weight.0: Input should be a finite number"),
        (["--search.learning-rate", "1e-4", "inf"], "search.learning_rate.1: Input should be a finite number"),
        (["--search.gamma", "0.5"], "search.gamma.1: Field required"),
        (["--search.gamma", "0.5", "1", "2"], "search.gamma: .* at most 2 items"),
        (["--search.gamma", "none"], "search.gamma.0: Input should be a valid number.*'none'"),
        (["--search.gamma", "0.5", "null"], "search.gamma.1: Input should be a valid number"),
        (["--search.ema-rate", "0.9", "1"], "search.ema_rate: must end below 1, where the teacher would be frozen"),
        (["--search.gamma", "2", "4"], r"search.gamma: the range \[2.0, 4.0\] must contain 1, with which"),
        (["--search.gamma", "0.25", "0.5"], r"search.gamma: the range \[0.25, 0.5\] must contain 1, with which"),
        (["--search.scale-weights", "2", "4"], "search.scale_weights: .* must contain 1, equal weights"),
        (["--search.ema-rate", "0.9", "0.99"], "search.ema_rate: .* must contain 0.999, with which"),
        (["--search.learning-rate", "2e-3", "1e-2"], "search.learning_rate: .* must contain 0.001, with which"),
        (["--search.learning-rate", "1e-6", "1e-2"], r"search.learning_rate must begin at .*\(1e-05\)"),
        (["--objective.gamma", "2"], "objective.gamma is searched: .*search.gamma; or set search.gamma to null"),
        (["--objective.scale-weights", *"1234"], "objective.scale_weights is searched: .*search.scale_weights"),
        (["--teacher.ema-rate", "0.99"], "teacher.ema_rate is searched: .*search.ema_rate"),
        (["--objective.beta", "0.5", "--search.beta", "0.1", "1"], "objective.beta is searched: .*search.beta"),
        (["--objective.mirror-weight", "1", "--search.mirror-weight", "0.1", "2"], "objective.mirror_weight is search"),
        (["--objective.beta", "0"], "search.gamma has no effect because objective.beta is 0"),
        (["--objective.mirror-weight", "0"], "search.scale_weights has no effect because objective.mirror_weight is 0"),
        (ALONE, r"search: nothing is searched: give at least one range \(scale_weights, gamma, "),
        (["--search.objectives", "psnr", "lpips", "psnr "], "objectives: each may be named once: psnr, lpips, psnr"),
        (["--search.objectives", "ssim", "psnr + 20 lpips"], "search.objectives: .*so lpips must be subtracted"),
        (["--search.objectives", "colour"], "search.objectives: 'colour': must be a metric"),
        (["--search.objectives", "lpips", "--evaluation.lpips=none"], "search.objectives need lpips, which evaluation"),
        (["--search.objectives", "psnr - lpips", "--evaluation.lpips=none"], "search.objectives need lpips"),
        (["--checkpoint.every", "600"], "search.reduction has no effect: no checkpoint is written before step 600"),
        (["--search.reduction", "1"], "search.reduction: Input should be greater than 1"),
        (["--search.database", "/folder/study.db"], "search.database: must be a database URL, such as sqlite:////folder"),
        (["--search.trials", "0"], "search.trials: "),
        (["--run.seed", str(2**32 - 3)], "run.seed must be at most 4294967292, not 4294967293: "),
        (["--search.sampler", "grid"], "search.sampler: .*'tpe', 'gp' or 'random'"),
    ],
)  # fmt: skip
def test_mistakes_are_named_and_end_with_status_2(options, message, capsys):
    with pytest.raises(SystemExit) as exit, user_errors():
        parsed(*options)
    assert exit.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:s3cret@host/name",
        "postgresql://me:@host/name",
        "postgresql://host/name?user=me&password=s3cret",
        "mysql+pymysql://host/name?passwd=s3cret",
        "me:s3cret@host/name",
    ],
)
def test_passwords_are_refused_and_not_shown(url, capsys):
    with pytest.raises(SystemExit), user_errors():
        parsed("--search.database", url)
    shown = capsys.readouterr().err
    assert shown.startswith("error: search.database: must ")
    assert "s3cret" not in shown


@pytest.mark.parametrize(
    "options",
    [
        ["--objective.gamma", "2", "--search.gamma", "null"],
        ["--objective.beta", "0", "--search.gamma", "null"],
        ["--teacher.ema-rate", "0.99", "--search.ema-rate", "null"],
        ["--search.gamma", "1", "4"],
        ["--search.gamma", "0.25", "1"],
        ["--search.ema-rate", "0.999", "0.9999"],
        ["--search.learning-rate", "1e-5", "1e-3"],
        ["--checkpoint.every", "600", "--search.reduction", "null"],
        ["--checkpoint.every", "599"],
        ["--search.objectives", "ssim", "--evaluation.lpips", "none"],
        ["--search.database", "postgresql://me@host/name?passfile=/home/me/.pgpass"],
        ["--run.seed", str(2**32 - 4)],
    ],
)
def test_what_is_just_within_is_taken(options):
    assert parsed(*options).search.trials == 32


@pytest.mark.parametrize(
    ("steps", "every", "reduction", "rungs"),
    [
        (900, 100, 3, (100, 300)),
        (901, 100, 3, (200, 400)),  # 100.1 and 300.3
        (600, 150, 3, (150, 300)),
        (600, 150, 2, (150, 300)),
        (30313, 1000, 3, (4000, 11000)),
        (30313, 1000, 4, (2000, 8000)),
        (1000, 100, 1.5, (500, 700)),
        (900, 300, 3, (300,)),
        (900, 500, 3, (500,)),
        (900, 899, 3, (899,)),
        (900, 450, 2, (450,)),
        (900, 100, 30, (100,)),
        (900, 100, None, ()),
    ],
)
def test_rungs_are_the_first_checkpoints_from_a_ninth_and_a_third_on(steps, every, reduction, rungs):
    assert searched(steps, every, reduction=reduction).rungs == rungs


@given(st.integers(2, 5_000), st.integers(1, 2_000), st.integers(11, 90))
def test_each_share_of_the_steps_has_the_next_checkpoint_for_its_rung(steps, every, tenths):
    checkpoints = range(every, steps, every)
    shares = [Fraction(steps) / Fraction(tenths, 10) ** power for power in (2, 1)]
    expected = {next((step for step in checkpoints if step >= share), None) for share in shares} - {None}
    assume(expected)
    assert searched(steps, every, reduction=tenths / 10).rungs == tuple(sorted(expected))


def test_the_study_is_in_the_searchs_folder(tmp_path):
    config = parsed("--run.name", "mine", "--run.root", str(tmp_path))
    assert config.study_url == f"sqlite:///{tmp_path}/mine-search/study.db"


def test_a_bucket_needs_another_place_for_the_study():
    config = parsed("--run.root", "s3://bucket/runs")
    with pytest.raises(ValueError, match=r"search.database: s3://bucket/runs/demo-search can't hold a database; give"):
        _ = config.study_url
    url = "postgresql://me@host/studies"
    assert parsed("--run.root", "s3://bucket/runs", "--search.database", url).study_url == url


def test_a_search_without_its_own_settings_is_a_run():
    config = parsed("--search.trials", "7")
    fields = config.model_dump(include=set(Config.model_fields))
    assert Config.model_validate(fields).identity() == config.identity()

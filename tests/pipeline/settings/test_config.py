"""Settings: composed, overridden, checked, and explained by --help."""

from pathlib import Path
from typing import Annotated, Optional

import pytest
import yaml
from pydantic import AfterValidator, ValidationError

from iaml import Settings
from pipeline.settings.command_line import argument_parser, parse_settings, user_errors
from pipeline.settings.config import Config, differences, parse_config, preset_names, read_settings

URL = ("--data.url", "/data")


def parsed(*options):
    return parse_config(argument_parser("test"), Config, list(options))[0]


@pytest.mark.parametrize("name", ["demo", "lol_v1", "lol_v2_real", "lol_v2_synthetic"])
def test_presets_build(name):
    assert name in preset_names()
    assert parsed("--config", name, *URL).run.name == name


def test_any_field_can_be_overridden():
    config = parsed(
        "--config", "lol_v1", *URL, "--train.steps", "7", "--objective.scale-weights", "[0.1, 0.2, 0.3, 0.4]",
        "--optimizer.learning_rate=1e-3", "--run.use-gpu", "false", "--teacher.norm", "separate",
    )  # fmt: skip
    assert config.train.steps == 7
    assert config.objective.scale_weights == (0.1, 0.2, 0.3, 0.4)
    assert config.optimizer.learning_rate == 1e-3
    assert config.run.use_gpu is False
    assert config.teacher.norm == "separate"


def test_resolved_settings_read_back_the_same(tmp_path):
    config = parsed("--config", "demo", "--network.head", "sigmoid")
    path = tmp_path / "settings.yaml"
    path.write_text(config.to_yaml())
    assert parsed("--config", str(path)) == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--config", "lol_v1"], "data.url: Field required"),
        (["--config", "nothing"], r"--config nothing: not a preset \(demo, lol_v1"),
        (["--config", "missing.yaml"], "missing.yaml: no such settings file"),
        (["--config", "lol_v1", *URL, "--run.seed", "-1"], r"run.seed: .* greater than or equal to 0 \(given: '-1'\)"),
        (["--config", "lol_v1", *URL, "--run.seed", "4294967296"], "run.seed: .* equal to 4294967295 .*'4294967296'"),
        (["--config", "lol_v1", *URL, "--run.storage", "s3:/b/x"], "run.storage: s3:/b/x: misspelt; write .*s3://buck"),
        (["--config", "lol_v1", "--data.url", ""], "data.url: '' is no place; give a local path or s3://"),
        (["--config", "lol_v1", *URL, "--train.steps", "0"], "train.steps: Input should be greater than or equal to 1"),
        (["--config", "lol_v1", *URL, "--optimizer.zero-stage", "3"], "zero_stage: must be 0, 1 or 2: stage 3 shards"),
        (["--config", "lol_v1", *URL, "--run.workers", "3"], r"train.global_batch \(8\) must be a multiple of"),
        (["--config", "lol_v1", *URL, "--data.crop", "100"], "data.crop: Input should be a multiple of 32"),
        (["--config", "lol_v1", *URL, "--objective.beta", "0", "--objective.gamma", "2"], "gamma has no effect"),
        (
            ["--config", "lol_v1", *URL, "--data.crop", "32", "--train.global-batch", "1"],
            r"more than one pair of 32-pixel crops .* raise data.crop \(32\), or train.global_batch \(1\) above",
        ),
        (
            ["--config", "lol_v1", *URL, "--data.crop", "32", "--train.global-batch", "8", "--train.accumulation", "8"],
            r"global_batch \(8\) above train.accumulation \(8\)",
        ),
        (
            ["--config", "lol_v1", *URL, "--data.extra-urls", "/b", "--data.weights", "1e308", "1e308"],
            "data: weights must be above 0 and their sum finite",
        ),
        (["--config", "lol_v1", *URL, "--optimizer.warmup-steps", "30313"], "warmup_steps"),
        (["--config", "lol_v1", *URL, "--optimizer.final-learning-rate", "1"], "must not exceed learning_rate"),
        (
            ["--config", "lol_v1", *URL, "--checkpoint.split", "test"],
            "checkpoint.split: checkpoints are not chosen by the test split: .* with pipeline/evaluate.py --split test",
        ),
        (
            ["--config", "lol_v1", *URL, "--evaluation.protocols", "rgb_u8", "cidnet", "rgb_u8"],
            "protocols: each may be named once: rgb_u8, cidnet, rgb_u8",
        ),
        (["--config", "lol_v1", *URL, "--evaluation.protocols", "[]"], "evaluation.protocols: .* at least 1 item"),
        (["--config", "lol_v1", *URL, "--evaluation.protocols", "rgb_u8", "mine"], "evaluation.protocols.1: .*rgb_u8"),
        (
            ["--config", "lol_v1", *URL, "--evaluation.lpips", "none", "--evaluation.lpips-weights", "/w.pth"],
            "lpips_weights have no effect because lpips is none",
        ),
        (
            ["--config", "lol_v1", *URL, "--checkpoint.metric", "lpips", "--evaluation.lpips", "none"],
            "checkpoint.metric is lpips, which evaluation.lpips: none turns off",
        ),
    ],
)
def test_mistakes_are_named_and_end_with_status_2(options, message, capsys):
    import re

    with pytest.raises(SystemExit) as exit, user_errors():
        parsed(*options)
    assert exit.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    "options",
    [
        ["--data.crop", "64", "--train.global-batch", "1"],
        ["--data.crop", "32", "--train.global-batch", "2", "--run.workers", "2"],  # statistics span all workers
        ["--data.crop", "32", "--train.global-batch", "8", "--train.accumulation", "4"],
    ],
)
def test_two_values_of_each_channel_are_enough_for_batch_normalisation(options):
    assert parsed("--config", "lol_v1", *URL, *options).data.url == "/data"


@pytest.mark.parametrize(
    "url", ["https://host/w.pth?token=s3cret", "https://me:s3cret@host/w.pth", "http://s3cret@host/w.pth"]
)
def test_weights_urls_with_a_secret_are_refused(url):
    with pytest.raises(ValidationError, match="must not bear a query or a password"):
        parsed("--config", "lol_v1", *URL, "--evaluation.lpips-weights", url)


def test_weights_come_from_a_file_wherever_the_command_runs_or_from_a_url(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"w.pth": str(tmp_path / "w.pth"), "https://host/w.pth": "https://host/w.pth", "s3://b/w": "s3://b/w"}
    given |= {"HTTPS://Host/W.pth": "https://Host/W.pth", "S3://b/w": "s3://b/w", "~/w": str(Path.home() / "w")}
    for url, resolved in given.items():
        config = parsed("--config", "lol_v1", *URL, "--evaluation.lpips-weights", url)
        assert config.evaluation.lpips_weights == resolved


@pytest.mark.parametrize(
    "values",
    [["[rgb_u8, cidnet]"], ["rgb_u8", "cidnet"]],
    ids=["list", "words"],
)
def test_several_values_are_words_or_a_yaml_list(values):
    config = parsed("--config", "lol_v1", "--evaluation.protocols", *values, "--data.url", "/data")
    assert config.evaluation.protocols == ("rgb_u8", "cidnet")


def test_a_single_value_and_numbers_as_words():
    config = parsed("--config", "lol_v1", *URL, "--evaluation.protocols=cidnet", "--objective.scale-weights", *"1234")
    assert config.evaluation.protocols == ("cidnet",)
    assert config.objective.scale_weights == (1, 2, 3, 4)


class Several(Settings):
    plain: tuple[str, ...] = ()
    perhaps: tuple[float, ...] | None = (1.0,)
    ruled: Annotated[tuple[float, float], AfterValidator(lambda pair: pair)] | None = None
    spelled: Optional[tuple[int, ...]] = None  # noqa: UP045


@pytest.mark.parametrize("name", ["plain", "perhaps", "ruled", "spelled"])
@pytest.mark.parametrize("words", [("1", "2"), ("[1, 2]",)])
def test_several_values_where_there_may_be_none(name, words):
    settings = parse_settings(Several, [f"--{name}", *words], description="test")
    assert [float(value) for value in getattr(settings, name)] == [1, 2]


@pytest.mark.parametrize("argv", [["--perhaps", "null"], ["--perhaps=null"]])
def test_null_alone_is_no_values_at_all(argv):
    assert parse_settings(Several, argv, description="test").perhaps is None


@pytest.mark.parametrize("option", [["--perhaps", "1", "null"], ["--perhaps", "[null]"], ["--plain", "[null]"]])
def test_null_is_refused_among_values(option, capsys):
    with pytest.raises(SystemExit):
        parse_settings(Several, option, description="test")
    assert capsys.readouterr().err.startswith(f"error: {option[0].removeprefix('--')}")


def test_an_empty_list_is_none_of_them():
    assert parsed("--config", "lol_v1", *URL, "--data.extra-urls", "[]").data.extra_urls == ()


def test_unknown_options_are_refused(capsys):
    with pytest.raises(SystemExit):
        parsed("--config", "lol_v1", *URL, "--train.step", "7")
    assert "--train.step" in capsys.readouterr().err


def test_unknown_fields_in_a_file_are_refused(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(read_settings_of("demo") | {"trian": {"steps": 1}}))
    with pytest.raises(ValidationError, match="trian"):
        parsed("--config", str(path))


def read_settings_of(preset):
    return parsed("--config", preset, *URL).model_dump(mode="json")


def test_settings_file_must_be_a_mapping(tmp_path):
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="must hold settings by name"):
        read_settings(str(tmp_path / "list.yaml"))


def test_help_explains_every_field(capsys):
    with pytest.raises(SystemExit):
        parsed("--help")
    text = " ".join(capsys.readouterr().out.split())

    def fields(model, prefix=""):
        for name, field in model.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
                yield from fields(field.annotation, f"{prefix}{name}.")
            else:
                yield f"--{prefix}{name}".replace("_", "-"), field

    found = list(fields(Config))
    assert len(found) > 40
    for option, field in found:
        assert option in text
        assert field.description, option
    assert "weight lambda of the mirror loss; 0 trains without a teacher [>= 0, default 0.8]" in text


def test_identity_ignores_what_cannot_change_the_weights():
    config = parsed("--config", "demo")
    same = parsed(
        "--config", "demo", "--run.max-failures", "9", "--train.log-every", "1", "--data.url", "/moved",
        "--data.extra-urls", "[/more]", "--data.on-bad-data", "skip", "--data.cache", "/fast", "--data.cache-gib", "1",
        "--data.threads", "1", "--data.fetches", "1", "--data.ahead", "1", "--run.workers", "2",
        "--optimizer.zero-stage", "2", "--optimizer.channels-last", "true",
    )  # fmt: skip
    assert same.identity() == config.identity()


@pytest.mark.parametrize(
    "change",
    [
        ("--objective.beta", "0.3"),
        ("--run.seed", "1"),
        ("--data.crop", "32"),
        ("--data.flips", "false"),
        ("--data.shuffle-shards", "3"),
        ("--data.drop-last", "true"),
        ("--train.accumulation", "2"),  # batch normalisation spans a forward pass
        ("--optimizer.precision", "bf16"),
    ],
)
def test_identity_tells_apart_what_changes_the_weights(change):
    assert parsed("--config", "demo", *change).identity() != parsed("--config", "demo").identity()


def test_identity_tells_mixtures_apart():
    mixed = ("--config", "demo", "--data.extra-urls", "[/more]")
    assert parsed(*mixed, "--data.weights", "[1, 2]").identity() != parsed(*mixed).identity()


def test_differences_of_two_identities_are_named_in_full():
    before = parsed("--config", "demo").identity()
    now = parsed("--config", "demo", "--run.seed", "7", "--teacher.norm", "separate", "--train.steps", "77").identity()
    found = {name: (old, new) for name, old, new in differences(before, now)}
    assert found == {
        "seed": (0, 7),
        "teacher.norm": (before["teacher"]["norm"], "separate"),
        "train.steps": (before["train"]["steps"], 77),
    }
    assert differences(before, before) == []


def test_what_one_identity_alone_has_differs_from_none():
    before, now = {"ranges": {"gamma": [1, 2], "beta": [3, 4]}}, {"ranges": {"gamma": [1, 2], "rate": [5, 6]}, "new": 7}
    assert differences(before, now) == [("ranges.beta", [3, 4], None), ("ranges.rate", None, [5, 6]), ("new", None, 7)]
    assert differences({"part": {"a": 1}}, {"part": None}) == [("part", {"a": 1}, None)]


def test_learning_rate_warms_up_and_follows_a_cosine():
    optimizer = parsed("--config", "demo").optimizer.model_copy(
        update={"learning_rate": 1.0, "final_learning_rate": 0.1, "warmup_steps": 4}
    )
    assert [optimizer.rate_at(step, 104) for step in (0, 1, 3, 4)] == [0.25, 0.5, 1.0, 1.0]
    assert optimizer.rate_at(54, 104) == pytest.approx(0.55)
    assert optimizer.rate_at(103, 104) == pytest.approx(0.1, abs=1e-3)


def test_parse_settings_makes_options_of_a_model():
    from pipeline.evaluate import EvaluateSettings

    settings = parse_settings(EvaluateSettings, ["--checkpoint", "/run", "--data.url", "/d"], description="test")
    assert (settings.checkpoint, settings.data.url, settings.split) == ("/run", "/d", "dev")
    settings = parse_settings(EvaluateSettings, ["--compare", "/a", "s3://b/c", "--split", "test"], description="test")
    assert (settings.compare, settings.split) == (("/a", "s3://b/c"), "test")

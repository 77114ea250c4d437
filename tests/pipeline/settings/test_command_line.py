"""Command lines made from settings."""

from typing import Annotated, Optional

import pytest
from command_lines import URL, parsed
from pydantic import AfterValidator

from iaml import Settings
from pipeline.settings.command_line import parse_settings
from pipeline.settings.config import Config


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


def test_parse_settings_makes_options_of_a_model():
    from pipeline.evaluate import EvaluateSettings

    settings = parse_settings(EvaluateSettings, ["--checkpoint", "/run", "--data.url", "/d"], description="test")
    assert (settings.checkpoint, settings.data.url, settings.split) == ("/run", "/d", "dev")
    settings = parse_settings(EvaluateSettings, ["--compare", "/a", "s3://b/c", "--split", "test"], description="test")
    assert (settings.compare, settings.split) == (("/a", "s3://b/c"), "test")

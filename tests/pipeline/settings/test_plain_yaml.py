"""What a field of text or of a path takes is the text as it was typed, on the command line and in files."""

import re
from typing import Annotated

import pytest
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter, ValidationError

from pipeline.evaluate import EvaluateSettings
from pipeline.settings import plain_yaml
from pipeline.settings.command_line import add_options, argument_parser, normalise, parse_settings, user_errors
from pipeline.settings.config import Config
from pipeline.settings.darkening import DarkenSettings, PhotographSettings
from pipeline.settings.data import DataSettings
from pipeline.settings.files import parse_config, read_settings
from pipeline.settings.packing import PackSettings
from tune.settings import SearchConfig

MODELS = (Config, SearchConfig, EvaluateSettings, PackSettings, DarkenSettings, PhotographSettings)
TEXTS = [
    "2024-11-05", "0123", "1.10", "yes", "exp #2", "my set # 1", "[clean]", "1e3", "0x1F", "1_000", "12:30:45", "on",
    "{a: b}", "a: b", "'quoted'", '"quoted"', "- item", "&anchor", "*alias", "!tag", "%a", "@b", "`c`", "|", ">", "?",
    ".inf", "=", "<<", "true", " spaced ", "[a, b", "a\nb", "Null",
]  # fmt: skip
NAMES = ["2024-11-05", "0123", "1.10", "yes", "null", "0x1F", "1e3", "1_000".replace("_", "-"), "NaN", "off", "0o17"]


NO_PATHS = {"run.name", "scene_pattern", "search.objectives", "search.database"}
OF_EACH_NODE = {"data.cache"}


def text_fields(model, prefix=""):
    """Options of the fields that take text or a path, and whether they take several."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from text_fields(field.annotation, f"{prefix}{name}.")
        elif re.search(r"\bstr\b|\bPath\b", str(field.annotation)):
            yield f"{prefix}{field.alias or name}", "tuple" in str(field.annotation)


FIELDS = [(model, *field) for model in MODELS for field in text_fields(model)]
EXAMPLE = Config.model_validate({"run": {"name": "a"}, "data": {"url": "/d"}, "train": {"steps": 9}})
PARSERS = {model: argument_parser("test") for model in MODELS}
for each, parser_ in PARSERS.items():
    add_options(parser_, each)


def typed(model, field, *words):
    """What the option of a field hands on."""
    option = "--" + field.replace("_", "-")
    arguments = [f"{option}={words[0]}"] if len(words) == 1 else [option, *words]
    return vars(PARSERS[model].parse_args(normalise(arguments)))[field]


def test_the_fields_of_text_are_found():
    found = {f"{model.__name__} {field}" for model, field, _ in FIELDS}
    assert found >= {
        "Config run.name", "Config run.root", "Config data.url", "Config data.extra_urls", "Config data.cache",
        "Config evaluation.lpips_weights", "SearchConfig search.objectives", "SearchConfig search.database",
        "EvaluateSettings checkpoint", "EvaluateSettings images", "EvaluateSettings compare", "EvaluateSettings out",
        "EvaluateSettings data.url", "PackSettings source", "PackSettings out", "PackSettings scene_pattern",
        "DarkenSettings source", "DarkenSettings out", "PhotographSettings out",
    }  # fmt: skip
    assert not any(field.rpartition(".")[2] == "lpips" for _, field, _ in FIELDS), "a choice is no text"


@pytest.mark.parametrize(("model", "field", "several"), FIELDS, ids=lambda value: getattr(value, "__name__", None))
def test_options_hand_on_what_was_typed(model, field, several):
    for text in TEXTS:
        assert typed(model, field, text) == ([text] if several else text) or (several and text == "[clean]")
    if several:
        assert typed(model, field, "[clean]", "0123") == ["[clean]", "0123"]
        assert typed(model, field, "['[clean]', 0123]") == ["[clean]", "0123"]


@settings(max_examples=50)
@given(st.sampled_from(FIELDS), st.text())
def test_any_text_reaches_its_field(field, text):
    model, name, several = field
    assume(text not in ("null", "--"))  # the latter is argparse's own
    assume(not (several and text.startswith("[")))
    assert typed(model, name, text) == ([text] if several else text)


@settings(max_examples=25)
@given(st.sampled_from([field for field in FIELDS if field[2]]), st.lists(st.text(), min_size=2))
def test_any_words_reach_their_field(field, words):
    assume(not any(word.startswith("-") for word in words))
    assert typed(*field[:2], *words) == words


@pytest.mark.parametrize(("model", "field", "several"), FIELDS, ids=lambda value: getattr(value, "__name__", None))
def test_each_path_is_expanded_and_checked(model, field, several, monkeypatch):
    if field in NO_PATHS | OF_EACH_NODE:
        return
    monkeypatch.setenv("HOME", "/home/me")
    *parts, name = field.split(".")
    for part in parts:
        model = model.model_fields[part].annotation
    info = next(info for key, info in model.model_fields.items() if (info.alias or key) == name)
    adapter = TypeAdapter(Annotated[info.annotation, "as the field is", *info.metadata])
    found = adapter.validate_python(["~/x # 1"] if several else "~/x # 1")
    assert str(found[0] if several else found) == "/home/me/x # 1"
    for wrong in ("s3:/bucket/x", "file:/x", "file://host/x", "gs://bucket/x", ""):
        with pytest.raises(ValidationError, match=r"misspelt|not supported|is no place"):
            adapter.validate_python([wrong] if several else wrong)


@pytest.mark.parametrize("text", [*NAMES, *TEXTS])
def test_a_path_may_have_any_name(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(parse_settings(DarkenSettings, [f"--source={text}", "--out=x"], description="").source) == (
        f"{tmp_path}/{text}"
    )


@pytest.mark.parametrize("text", NAMES)
def test_a_run_may_have_any_name_on_the_command_line_and_in_files(text, tmp_path):
    path = tmp_path / "settings.yaml"
    by_option = parsed("--config", "demo", "--run.name", text)
    path.write_text(by_option.to_yaml())
    stored = parsed("--config", str(path))
    path.write_text(f"run:\n  name: {text if text != 'null' else repr(text)}\ndata: {{url: d}}\ntrain: {{steps: 9}}\n")
    by_file = parsed("--config", str(path))
    assert {config.run.name for config in (by_option, stored, by_file)} == {text}
    assert stored == by_option


@settings(max_examples=50)
@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]*", fullmatch=True))
def test_plain_words_of_a_file_stay_as_they_were_written(text):
    assume(text.lower() != "null")
    assert plain_yaml.load(f"run: {{name: {text}}}\nlist:\n- {text}\n") == {"run": {"name": text}, "list": [text]}


@settings(max_examples=25)
@given(st.recursive(st.none() | st.text(), lambda below: st.lists(below) | st.dictionaries(st.text(), below)))
def test_files_that_were_written_are_read_back_the_same(tree):
    assert plain_yaml.load(yaml.safe_dump(tree)) == tree


@settings(max_examples=25)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/"), min_size=1))
def test_resolved_settings_keep_any_path(text):
    assume(text != ".")
    config = EXAMPLE.model_copy(update={"data": DataSettings(url=f"/data/{text}", extra_urls=(f"/{text}",))})
    stored = Config.model_validate(plain_yaml.load(config.to_yaml()))
    assert (stored.data.url, stored.data.extra_urls) == (f"/data/{text}", (f"/{text}",))
    assert stored == config


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("train: {steps: 010}", "train.steps", 10),
        ("train: {steps: '7'}", "train.steps", 7),
        ("optimizer: {learning_rate: 1e-3}", "optimizer.learning_rate", 1e-3),
        ("optimizer: {learning_rate: .5}", "optimizer.learning_rate", 0.5),
        ("optimizer: {betas: [0.5, 1.0e-1]}", "optimizer.betas", (0.5, 0.1)),
        ("data: {flips: no}", "data.flips", False),
        ("run: {use_gpu: Yes}", "run.use_gpu", True),
        ("run: {use_gpu: }", "run.use_gpu", None),
        ("evaluation: {actors: null}", "evaluation.actors", None),
        ("evaluation: {actors: ~}", "evaluation.actors", None),
        ("evaluation: {lpips: none}", "evaluation.lpips", "none"),
        ("data: {extra_urls: [/1, /my set]}", "data.extra_urls", ("/1", "/my set")),
        ("optimizer: &a {clip: 1}\ntrain: {steps: 9}", "optimizer.clip", 1.0),
    ],
)
def test_numbers_truths_and_null_in_files(text, field, value, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    part, name = field.split(".")
    base = ("--run.name=a", "--data.url=/d", *(() if "steps" in text else ("--train.steps=9",)))
    assert getattr(getattr(parsed("--config", str(path), *base), part), name) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: {steps: 1:30}", "train.steps: Input should be a valid integer.*'1:30'"),
        ("train: {steps: yes}", "train.steps: Input should be a valid integer.*'yes'"),
        ("data: {url: }", "data.url: Input should be a valid string"),
        ("data: {url: !env DATA}", "settings.yaml: line 1: could not determine a constructor for the tag '!env'"),
        ("run: {name: a}\ntrain: {steps: 9}\nrun: {seed: 1}", "settings.yaml: line 3: run is given twice, .* line 1"),
        ("run:\n  seed: 1\n  name: a\n  seed: 1", "settings.yaml: line 4: seed is given twice, first in line 2"),
        ("run: [a", "settings.yaml: line 1: "),
        ("run: &a [*a]", "run: Input should be a valid dictionary"),
    ],
)
def test_mistakes_in_files_are_named(text, message, tmp_path, capsys):
    (tmp_path / "settings.yaml").write_text(text)
    with pytest.raises(SystemExit), user_errors():
        parsed("--config", str(tmp_path / "settings.yaml"), "--optimizer.clip=1")
    assert re.search(message, capsys.readouterr().err)


def test_merged_keys_give_way_to_a_mapping_s_own():
    text = "a: &a {x: 1, y: 2}\nb: &b {<<: *a, y: 3}\nc: {<<: [*b, {z: 4}], x: 5}\n"
    assert plain_yaml.load(text)["c"] == {"x": "5", "y": "3", "z": "4"}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "latin-1"])
def test_a_file_that_is_not_utf_8_is_named(encoding, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_bytes("run: {name: größer}".encode(encoding))
    with pytest.raises(ValueError, match=rf"^{path}: is not text in UTF-8 .* save it as UTF-8"):
        read_settings(str(path))


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_bytes(b"\xef\xbb\xbfrun: {name: a}")
    assert read_settings(str(path)) == {"run": {"name": "a"}}


def parsed(*options):
    return parse_config(argument_parser("test"), Config, list(options))[0]

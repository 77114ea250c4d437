"""The settings of scoring: one thing to do, on which data, and by whose settings."""

import json
import sys

import pytest
from pydantic import ValidationError
from score_tables import make_run

from pipeline import evaluate
from pipeline.evaluate import unique
from pipeline.evaluation.candidates import Candidate
from pipeline.launch import scoring
from pipeline.launch.scoring import choose_settings, data_url, load_data
from pipeline.settings.evaluation import EvaluateSettings, EvaluationSettings

PICTURES = Candidate("/pictures", None, None)


@pytest.fixture
def candidate(tmp_path):
    """A checkpoint of a run with evaluation settings of its own."""
    evaluation = {"protocols": ["cidnet", "rgb_u8"], "lpips": "vgg", "tile": 512, "actors": 7, "gpus_per_actor": 0.5}
    run = make_run(tmp_path, {4: 20.0}, evaluation=evaluation, data={"url": "/the/run's"})
    return Candidate.find(f"{run}/checkpoint-00000004", "dev")


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"checkpoint": "/c", "images": "/i"},
        {"checkpoint": "/c", "compare": ["/a", "/b"]},
        {"images": "/i", "compare": ["/a", "/b"]},
    ],
    ids=lambda given: " and ".join(given) or "nothing",
)
def test_exactly_one_thing_is_to_be_done(given):
    with pytest.raises(ValidationError, match="give one of checkpoint, images and compare"):
        EvaluateSettings.model_validate(given)


@pytest.mark.parametrize(
    ("given", "urls"),
    [
        ({"checkpoint": "/c"}, ("/c",)),
        ({"images": "s3://bucket/i/"}, ("s3://bucket/i",)),
        ({"compare": ["/a", "/b", "/c"]}, ("/a", "/b", "/c")),
    ],
)
def test_what_is_to_be_scored(given, urls):
    assert EvaluateSettings.model_validate(given).urls == urls


def test_a_comparison_needs_two():
    with pytest.raises(ValidationError, match="compare: needs two or more"):
        EvaluateSettings.model_validate({"compare": ["/a"]})


def test_the_test_split_is_scored_only_where_it_is_asked_for():
    assert EvaluateSettings.model_validate({"checkpoint": "/c"}).split == "dev"


def test_data_are_those_named_or_else_the_first_run_s(candidate):
    named = EvaluateSettings.model_validate({"checkpoint": "/c", "data": {"url": "/named"}})
    unnamed = EvaluateSettings.model_validate({"checkpoint": "/c"})
    assert data_url(named, [candidate]) == "/named"
    assert data_url(named, [PICTURES]) == "/named"
    assert data_url(unnamed, [PICTURES, candidate]) == "/the/run's"
    with pytest.raises(ValueError, match=r"data\.url: needed to score pictures"):
        data_url(unnamed, [PICTURES, PICTURES])


def test_a_run_s_data_set_that_was_moved_is_asked_for(candidate):
    with pytest.raises(ValueError, match=r"/the/run's/manifest\.parquet: .* moved, give its place as data\.url"):
        load_data(EvaluateSettings.model_validate({"checkpoint": "/c"}), [candidate])
    with pytest.raises(ValueError, match=r"/named/manifest\.parquet: there is no manifest(?!.*moved)"):
        load_data(EvaluateSettings.model_validate({"checkpoint": "/c", "data": {"url": "/named"}}), [candidate])


def test_a_run_is_scored_by_its_own_settings_but_for_its_machines(candidate):
    settings = choose_settings(EvaluateSettings.model_validate({"checkpoint": "/c"}), [candidate])
    assert (settings.protocols, settings.lpips, settings.tile) == (("cidnet", "rgb_u8"), "vgg", 512)
    assert (settings.actors, settings.gpus_per_actor) == (None, None)


def test_what_is_given_overrides_the_run_s_settings_even_with_a_default(candidate):
    given = {"checkpoint": "/c", "evaluation": {"protocols": ["rgb_u8"], "lpips": "alex", "actors": 2}}
    settings = choose_settings(EvaluateSettings.model_validate(given), [candidate])
    assert (settings.protocols, settings.lpips, settings.tile, settings.actors) == (("rgb_u8",), "alex", 512, 2)


def test_pictures_alone_are_scored_by_the_defaults(candidate):
    settings = EvaluateSettings.model_validate({"compare": ["/pictures", "/c"]})
    assert choose_settings(settings, [PICTURES, PICTURES]) == EvaluationSettings()


def test_names_that_are_not_unique_are_numbered():
    assert unique(["a", "b", "a", "c"]) == ["a (1)", "b", "a (3)", "c"]


@pytest.fixture
def evaluated(tmp_path, monkeypatch):
    """Runs the command on two checkpoints whose scores are there, and returns what it writes for programs."""
    run = make_run(tmp_path, {4: 20.0, 5: 21.5})
    monkeypatch.setattr(scoring, "load_data", lambda settings, found: None)
    monkeypatch.setattr(
        scoring, "score_candidates", lambda settings, found, manifest: [each.table("dev") for each in found]
    )
    file = tmp_path / "made/for # it/scores.json"

    def evaluated(*options):
        options = [option.replace("RUN", run) for option in options]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *options, "--json", str(file)])
        evaluate.main()
        return json.loads(file.read_text())

    return evaluated


def test_the_printed_table_is_written_for_programs(evaluated, capsys):
    document = evaluated("--checkpoint", "RUN/checkpoint-00000004")
    assert document["checkpoints"] == {"run/checkpoint-00000004": "checkpoint-00000004"}
    means = {(each["row"], each["metric"]): each["mean"] for each in document["numbers"]}
    assert means["student", "psnr"] == 20.0 and means["averaged", "lpips"] == -20.0
    assert len(means) == 3 * 2
    printed = capsys.readouterr().out
    assert all(f"{mean:.2f}" in printed for mean in means.values())


def test_a_comparison_is_written_with_its_differences(evaluated):
    document = evaluated("--compare", "RUN/checkpoint-00000004", "RUN/checkpoint-00000005")
    (difference,) = (each for each in document["numbers"] if "low" in each and each["metric"] == "psnr")
    assert difference["row"] == "run/checkpoint-00000005 - reference"
    assert (difference["mean"], difference["low"], difference["high"]) == (1.5, 1.5, 1.5)


def test_a_place_that_cannot_be_written_to_is_refused_before_anything_is_scored(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(evaluate.Candidate, "find", None)
    for option in ("--json", "--out"):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--checkpoint", "x", option, str(tmp_path / "file/scores")])
        with pytest.raises(SystemExit):
            evaluate.main()
        assert f"{tmp_path}/file: cannot be written to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ({"images": "/pictures"}, "last"),
        ({"compare": ["/a", "/b"]}, "last"),
        ({"images": "/pictures"}, "tile"),
        ({"images": "/pictures"}, "grid_images"),
    ],
)
def test_options_that_would_have_no_effect_are_refused(what, name):
    default = getattr(EvaluationSettings(), name)
    with pytest.raises(ValidationError, match=f"evaluation.{name}: has"):
        EvaluateSettings.model_validate(what | {"evaluation": {name: default}})

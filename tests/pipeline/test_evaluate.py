"""The settings of scoring: one thing to do, on which data, and by whose settings."""

import pytest
from pydantic import ValidationError
from score_tables import make_run

from pipeline.evaluate import EvaluateSettings, data_url, evaluation_settings, load_data, unique
from pipeline.evaluation.candidates import Candidate
from pipeline.evaluation.settings import EvaluationSettings

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
    settings = evaluation_settings(EvaluateSettings.model_validate({"checkpoint": "/c"}), [candidate])
    assert (settings.protocols, settings.lpips, settings.tile) == (("cidnet", "rgb_u8"), "vgg", 512)
    assert (settings.actors, settings.gpus_per_actor) == (None, None)


def test_what_is_given_overrides_the_run_s_settings_even_with_a_default(candidate):
    given = {"checkpoint": "/c", "evaluation": {"protocols": ["rgb_u8"], "lpips": "alex", "actors": 2}}
    settings = evaluation_settings(EvaluateSettings.model_validate(given), [candidate])
    assert (settings.protocols, settings.lpips, settings.tile, settings.actors) == (("rgb_u8",), "alex", 512, 2)


def test_pictures_alone_are_scored_by_the_defaults(candidate):
    settings = EvaluateSettings.model_validate({"compare": ["/pictures", "/c"]})
    assert evaluation_settings(settings, [PICTURES, PICTURES]) == EvaluationSettings()


def test_names_that_are_not_unique_are_numbered():
    assert unique(["a", "b", "a", "c"]) == ["a (1)", "b", "a (3)", "c"]

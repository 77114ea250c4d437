"""The space of a search: what is drawn, and the settings of the run that follow."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.settings.config import Config, differences
from tune import space
from tune.settings import VARIED, SearchConfig

RANGES = {
    "scale_weights": (0.125, 8.0),
    "gamma": (0.25, 4.0),
    "ema_rate": (0.9, 0.9999),
    "beta": (0.1, 1.2),
    "mirror_weight": (0.1, 3.0),
    "learning_rate": (1e-5, 1e-2),
}
FIELDS = {name: ".".join(place) for name, place in VARIED.items()}
SHARES = st.lists(st.floats(1e-3, 1e3), min_size=4, max_size=4)


def searched(*names, optimizer=None, **ranges):
    """A search of the named ranges alone, and of ``ranges``."""
    return SearchConfig.model_validate(
        {
            "run": {"name": "s", "root": "/runs", "seed": 5},
            "data": {"url": "/d"},
            "train": {"steps": 900},
            "checkpoint": {"every": 100},
            "optimizer": optimizer or {},
            "search": dict.fromkeys(VARIED) | {name: RANGES[name] for name in names} | ranges,
        }
    )


def shares(*values):
    return {f"scale_{index}": value for index, value in enumerate(values, 1)}


def applied(config, parameters):
    return space.run_settings(config, parameters, name="trial", seed=config.run.seed)


def changed(config, run):
    """The settings in which the run differs from the search, its name and folder aside."""
    dumps = [each.model_dump(mode="json", include=set(Config.model_fields)) for each in (config, run)]
    found = {name: new for name, _, new in differences(*dumps)}
    assert found.pop("run.name") == "trial"
    assert found.pop("run.root") == "/runs/s-search"
    return found


def test_the_search_begins_with_the_papers_setting():
    config = searched("scale_weights", "gamma", "ema_rate")
    assert space.initial_parameters(config) == {**shares(1, 1, 1, 1), "gamma": 1, "1 - ema_rate": 0.001}
    run = applied(config, space.initial_parameters(config))
    assert run.objective.scale_weights == (1 / 4, 1 / 4, 1 / 4, 1 / 4)
    assert run.objective.gamma == 1
    assert run.teacher.ema_rate == 0.999
    assert run.identity() == config.identity()


@given(st.sets(st.sampled_from(list(VARIED)), min_size=1), st.floats(1.1e-5, 0.9e-2))
def test_the_first_trial_is_the_search_without_its_ranges(names, learning_rate):
    config = searched(*names, optimizer={"learning_rate": learning_rate})
    first = space.initial_parameters(config)
    assert changed(config, applied(config, first)) == {}
    limits = space.distributions(config)
    assert first.keys() == limits.keys()
    assert all(limits[name].low <= first[name] <= limits[name].high for name in first)


@pytest.mark.parametrize(
    ("name", "parameters", "value"),
    [
        ("scale_weights", shares(1, 2, 4, 1), [0.125, 0.25, 0.5, 0.125]),
        ("gamma", {"gamma": 0.5}, 0.5),
        ("ema_rate", {"1 - ema_rate": 0.01}, 0.99),
        ("beta", {"beta": 1.1}, 1.1),
        ("mirror_weight", {"mirror_weight": 2.5}, 2.5),
        ("learning_rate", {"learning_rate": 0.003}, 0.003),
    ],
)
def test_each_range_varies_its_own_setting_and_no_other(name, parameters, value):
    config = searched(name)
    assert space.distributions(config).keys() == space.initial_parameters(config).keys() == parameters.keys()
    run = applied(config, parameters)
    assert changed(config, run) == {FIELDS[name]: value}
    assert {field for field, _, _ in differences(config.identity(), run.identity())} == {FIELDS[name]}


def test_every_range_has_a_case_above():
    assert RANGES.keys() == VARIED.keys()


def test_what_is_drawn_lies_between_the_ranges_limits():
    drawn = space.distributions(searched(*VARIED))
    assert {name: (limits.low, limits.high) for name, limits in drawn.items()} == {
        **dict.fromkeys(shares(1, 2, 3, 4), (0.125, 8.0)),
        "gamma": (0.25, 4.0),
        "1 - ema_rate": (0.0001, 0.1),
        "beta": (0.1, 1.2),
        "mirror_weight": (0.1, 3.0),
        "learning_rate": (1e-5, 1e-2),
    }
    assert [name for name, limits in drawn.items() if not limits.log] == ["beta"]  # its range may end near 0


@given(SHARES)
def test_scale_weights_are_the_shares_of_one(values):
    weights = applied(searched("scale_weights"), shares(*values)).objective.scale_weights
    assert math.isclose(sum(weights), 1, abs_tol=4 * 0.5e-4)
    assert all(0 < weight <= 1 for weight in weights)
    for weight, value in zip(weights, values, strict=True):
        assert math.isclose(weight, value / sum(values), rel_tol=0.5e-3)


@given(SHARES, st.sampled_from([0.5, 2.0, 8.0]))
def test_scale_weights_depend_on_proportions_alone(values, factor):
    config = searched("scale_weights")
    scaled = shares(*[factor * value for value in values])
    assert applied(config, shares(*values)).identity() == applied(config, scaled).identity()


@given(st.floats(1e-12, 1e-3), st.floats(1e-3, 0.999), st.floats(0, 1))
def test_ema_rates_stay_within_their_range_and_below_one(least, most, place):
    low, high = 1 - most, 1 - least
    config = searched(ema_rate=(min(low, 0.999), max(high, 0.9991)))
    drawn = space.distributions(config)["1 - ema_rate"]
    horizon = min(max(drawn.low * (drawn.high / drawn.low) ** place, drawn.low), drawn.high)
    rate = applied(config, {"1 - ema_rate": horizon}).teacher.ema_rate
    assert rate < 1
    assert math.isclose(1 - rate, horizon, rel_tol=1e-3)
    rounding = 1e-3  # of 1 - m, as settings keep four digits
    limits = [1 - limit for limit in config.search.ema_rate]
    assert limits[1] * (1 - rounding) <= 1 - rate <= limits[0] * (1 + rounding)


@given(st.floats(0.25, 4.0))
def test_settings_keep_four_digits_of_what_was_drawn(gamma):
    value = applied(searched("gamma"), {"gamma": gamma}).objective.gamma
    assert math.isclose(value, gamma, rel_tol=0.5e-3)
    assert len(f"{value!r}".replace(".", "").lstrip("0")) <= 4


def test_a_trial_is_a_run_in_the_searchs_folder():
    config = searched("gamma")
    run = space.run_settings(config, {"gamma": 2.0}, name="trial-007", seed=42)
    assert type(run) is Config
    assert run.run.url == "/runs/s-search/trial-007"
    assert run.run.seed == 42
    assert (config.run.name, config.run.seed) == ("s", 5)


def test_ema_rates_that_the_warm_up_never_comes_to_are_named():
    (note,) = space.notes(searched("ema_rate"))  # after 900 steps: 1 - 900^-0.75 = 1 - 1 / 164.3
    assert note.startswith("EMA rates above 0.9939 all act as it does: in 900 steps the warm-up")
    assert space.notes(searched("gamma")) == []
    config = searched("ema_rate")
    train = config.train.model_copy(update={"steps": 300_000})  # after which the warm-up is past 0.9999
    assert space.notes(config.model_copy(update={"train": train})) == []

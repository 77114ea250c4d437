"""What a dry run says, by arithmetic on a pace that is given."""

import re

import pytest

from tune.estimate import Pace, expected_steps, plan
from tune.settings import SearchConfig


def config_of(**search):
    return SearchConfig.model_validate(
        {
            "run": {"name": "x"},
            "data": {"url": "/data"},
            "train": {"steps": 900},
            "checkpoint": {"every": 50},
            "search": {"trials": 10, "top": 2, "seeds": 3} | search,
        }
    )


def test_the_steps_of_a_trial_on_average():
    # all trials take 100 steps, a third goes on to 300, a ninth to 900
    assert expected_steps(config_of()) == pytest.approx(100 + 200 / 3 + 600 / 9)
    # rungs at the checkpoints after 225 and 450
    assert expected_steps(config_of(reduction=2)) == pytest.approx(250 + 200 / 2 + 450 / 4)
    assert expected_steps(config_of(reduction=None)) == 900


def test_the_plan():
    text = plan(config_of(hours=3), 4, Pace(start_s=30, step_s=2))
    assert "trials at the same time: 4" in text
    assert "one trial: about 30 min (0.5 steps/s, 30 s to start and score)" in text
    # three turns of 1830 s, or of 30 + 2 x 233.3
    assert "10 trials: at most 1 h 32 min" in text
    assert "10 trials: about 25 min if one in 3 goes on at each of the steps 100, 300" in text
    assert "trials: no longer than 3 h" in text
    assert "then 9 runs over seeds: about 1 h 32 min" in text
    assert re.search(r"^gamma +0.25 to 4 +log +1$", text, re.MULTILINE)
    assert re.search(r"^1 - ema_rate +0.0001 to 0.1 +log +0.001$", text, re.MULTILINE)


def test_without_early_stopping_there_is_one_time():
    text = plan(config_of(reduction=None, beta=[0.1, 1.2]), 1, Pace(start_s=5, step_s=0.01))
    assert text.count("10 trials:") == 1 and "10 trials: at most 2 min" in text
    assert "one trial: about 14 s" in text
    assert re.search(r"^beta +0.1 to 1.2 +linear +0.6$", text, re.MULTILINE)

"""What a search comes to, on runs over seeds whose scores are made up."""

import numpy as np
import pytest
from score_tables import make_run

from tune import conclusion
from tune.settings import SearchConfig
from tune.study import Trial


@pytest.fixture
def config(tmp_path):
    return config_of(tmp_path)


def config_of(folder, **search):
    return SearchConfig.model_validate(
        {
            "run": {"name": "made", "storage": str(folder), "seed": 5},
            "data": {"url": "/data"},
            "train": {"steps": 4},
            "checkpoint": {"every": 2},
            "search": {"seeds": 2, "scale_weights": None, "ema_rate": None, "reduction": None} | search,
        }
    )


def trial(number: int, value: float, **parameters: float) -> Trial:
    drawn = {"gamma": 1.0 + number} | parameters
    return Trial(number, "finished", drawn, {4: {"psnr": value}}, 4, (value,), None, 60.0)


def train(config, trials, psnr):
    """Stands for the training: ``psnr`` by trial and seed."""
    for run in conclusion.configs_over_seeds(config, trials):
        number = int(run.run.name[6:10])
        value = psnr[number][run.run.seed]
        if value is not None:
            settings = run.model_dump(mode="json", exclude={"data", "train"})
            make_run(run.run.storage, {2: value - 3, 4: value}, **settings)


def test_the_runs_over_seeds_are_of_other_seeds_and_of_the_trials_settings(config):
    runs = conclusion.configs_over_seeds(config, [trial(0, 20.0), trial(3, 21.0)])
    assert [(run.run.name, run.run.seed, run.objective.gamma) for run in runs] == [
        ("trial-0000-seed6", 6, 1.0),
        ("trial-0003-seed6", 6, 4.0),
        ("trial-0000-seed7", 7, 1.0),
        ("trial-0003-seed7", 7, 4.0),
    ]
    assert {run.run.storage for run in runs} == {config.url} and {run.evaluation.actors for run in runs} == {1}


def test_the_best_over_seeds_is_chosen_and_not_the_best_of_the_search(config):
    trials = [trial(0, 20.0), trial(3, 25.0), trial(2, 24.0)]
    train(config, trials, {0: {6: 20.0, 7: 21.0}, 2: {6: 22.0, 7: 22.5}, 3: {6: 20.5, 7: 20.0}})
    found = conclusion.conclude(config, trials)
    assert found.best.number == 2
    assert [row[0] for row in found.table.rows] == ["the paper's setting", "trial 3", "trial 2"]
    first, second, third = found.sentences
    spread = np.std([20.0, 21.0], ddof=1)
    assert (
        f"over 2 seeds that the search had not used: the paper's setting 20.50 ± {spread:.2f}; trial 2 22.25" in first
    )
    # both images gain 2 and 1.5 dB: the interval over images and seeds goes from the one to the other
    assert "Trial 2 minus the paper's setting: +1.75 [+1.50, +2.00]" in second and "is better by more than" in second
    assert "with seed 5, the paper's setting had 20.00 and trial 3 had 25.00; the best of many" in third


def test_a_difference_within_the_noise_is_called_so(config):
    trials = [trial(0, 20.0), trial(3, 25.0)]
    train(config, trials, {0: {6: 20.0, 7: 21.0}, 3: {6: 21.5, 7: 20.0}})
    found = conclusion.conclude(config, trials)
    assert found.best.number == 3 and "[-1.00, +1.50]" in found.sentences[1]
    assert "contains 0: these seeds and images do not tell the two apart" in found.sentences[1]


def test_the_papers_setting_may_be_best(config):
    trials = [trial(0, 20.0), trial(3, 25.0)]
    train(config, trials, {0: {6: 20.0, 7: 21.0}, 3: {6: 19.5, 7: 20.0}})
    found = conclusion.conclude(config, trials)
    assert found.best.number == 0
    assert "None of the best trials, trial 3, does better than the paper's setting" in found.sentences[1]


@pytest.mark.parametrize(
    ("objective", "difference"),
    # in these runs LPIPS is minus the PSNR, so that the sum is 21 times the PSNR
    [("psnr - 20 lpips", "+7.875 [+5.25, +10.5]"), ("lpips", "-0.3750 [-0.5000, -0.2500]")],
)
def test_sums_are_compared_image_by_image_and_lower_may_be_better(tmp_path, objective, difference):
    config = config_of(tmp_path, objectives=[objective])
    trials = [trial(0, 1.0), trial(3, 2.0)]
    train(config, trials, {0: {6: 20.0, 7: 21.0}, 3: {6: 20.5, 7: 21.25}})
    found = conclusion.conclude(config, trials)
    assert found.best.number == 3
    assert difference in found.sentences[1] and "is better by more than the noise" in found.sentences[1]


def test_without_two_runs_of_the_paper_and_another_nothing_is_concluded(config):
    trials = [trial(0, 20.0), trial(3, 25.0)]
    train(config, trials, {0: {6: 20.0, 7: None}, 3: {6: 20.5, 7: 20.0}})
    assert conclusion.conclude(config, trials) is None

"""What a search comes to, on runs over seeds whose scores are made up."""

from types import SimpleNamespace

import numpy as np
import pytest
from score_tables import draw_arms, make_run

from pipeline.launch import concurrent_runs
from tune import conclusion
from tune import search as command
from tune.settings import SearchConfig
from tune.study import Trial


@pytest.fixture
def config(tmp_path):
    return config_of(tmp_path)


def config_of(folder, **search):
    return SearchConfig.model_validate(
        {
            "run": {"name": "made", "root": str(folder), "seed": 5},
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
            make_run(run.run.root, {2: value - 3, 4: value}, **settings)


def test_the_runs_over_seeds_are_of_other_seeds_and_of_the_trials_settings(config):
    runs = conclusion.configs_over_seeds(config, [trial(0, 20.0), trial(3, 21.0)])
    assert [(run.run.name, run.run.seed, run.objective.gamma) for run in runs] == [
        ("trial-0000-seed6", 6, 1.0),
        ("trial-0003-seed6", 6, 4.0),
        ("trial-0000-seed7", 7, 1.0),
        ("trial-0003-seed7", 7, 4.0),
    ]
    assert {run.run.root for run in runs} == {config.url}


def test_the_top_trials_are_trained_over_as_many_seeds_as_are_asked_for(tmp_path, monkeypatch):
    trials = [trial(3, 25.0), trial(0, 24.0), trial(1, 23.0), trial(2, 22.0)]
    study = SimpleNamespace(best=lambda: trials, trial=lambda number: trials[1])
    trained = []
    monkeypatch.setattr(concurrent_runs, "train_all", lambda configs, concurrent: trained.extend(configs) or {})
    monkeypatch.setattr(conclusion, "conclude", lambda config, compared: None)
    command.over_seeds(config_of(tmp_path, top=2, seeds=4), study)
    assert {run.run.name.split("-seed")[0] for run in trained} == {"trial-0000", "trial-0001", "trial-0003"}
    assert len({run.run.seed for run in trained}) == 4 and len(trained) == 3 * 4


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
    # means over seeds: 20, 21; 20.5, 20; 22, 22.5. The two effects leave -1/3, 1/3; 5/12, -5/12; -1/12, 1/12 with two
    # degrees of freedom, for a variance of 0.2917; t is 6.2053 with 2.5% / 2; images don't differ
    assert (
        "Trial 2 minus the paper's setting: +1.75 [-1.60, +5.10] (95% interval over seeds and images, for all 2 "
        in second
    )
    assert "settings that are compared with it together). The interval contains 0" in second
    assert "with seed 5, the paper's setting had 20.00 and trial 3 had 25.00; the best of many" in third


def test_a_difference_within_the_noise_is_called_so(config):
    trials = [trial(0, 20.0), trial(3, 25.0)]
    train(config, trials, {0: {6: 20.0, 7: 21.0}, 3: {6: 21.5, 7: 20.0}})
    found = conclusion.conclude(config, trials)
    # 1.5 and -1, of which the mean has a standard error of 1.25; of one degree of freedom t is 12.706
    assert found.best.number == 3 and "+0.25 [-15.63, +16.13] (95% interval over seeds" in found.sentences[1]
    assert "contains 0: these seeds and images do not tell the two apart" in found.sentences[1]


def test_the_papers_setting_may_be_best(config):
    trials = [trial(0, 20.0), trial(3, 25.0)]
    train(config, trials, {0: {6: 20.0, 7: 21.0}, 3: {6: 19.5, 7: 20.0}})
    found = conclusion.conclude(config, trials)
    assert found.best.number == 0
    assert "None of the best trials, trial 3, does better than the paper's setting" in found.sentences[1]


@pytest.mark.parametrize(
    ("objective", "difference"),
    # in these runs LPIPS is minus the PSNR, so that the sum is 21 times the PSNR; the mean of 0.5 and 0.48 has a
    # standard error of 0.01, and t is 12.706
    [("psnr - 20 lpips", "+10.29 [+7.622, +12.96]"), ("lpips", "-0.4900 [-0.6171, -0.3629]")],
)
def test_sums_are_compared_image_by_image_and_lower_may_be_better(tmp_path, objective, difference):
    config = config_of(tmp_path, objectives=[objective])
    trials = [trial(0, 1.0), trial(3, 2.0)]
    train(config, trials, {0: {6: 20.0, 7: 21.0}, 3: {6: 20.5, 7: 21.48}})
    found = conclusion.conclude(config, trials)
    assert found.best.number == 3
    assert difference in found.sentences[1] and "is better by more than the noise" in found.sentences[1]


def test_without_two_runs_of_the_paper_and_another_nothing_is_concluded(config):
    trials = [trial(0, 20.0), trial(3, 25.0)]
    train(config, trials, {0: {6: 20.0, 7: None}, 3: {6: 20.5, 7: 20.0}})
    assert conclusion.conclude(config, trials) is None


@pytest.mark.parametrize("images", [20, 500])
def test_of_equal_settings_the_best_is_rarely_called_better(config, images):
    draw, trials = np.random.default_rng(3), [trial(number, 20.0) for number in range(4)]
    false, none = 0, 0
    for _ in range(400):
        scores = draw_arms(draw, 4, 3, images)
        best, sentences = conclusion.judge(config, trials, {arm: dict(enumerate(scores[arm])) for arm in range(4)})
        none += best.number == 0
        false += "better by more than the noise" in sentences[1]
    assert false <= 0.05 * 400
    assert 60 <= none <= 140  # of four equal ones


def test_a_difference_far_beyond_the_noise_is_called_better(config):
    draw, trials = np.random.default_rng(4), [trial(number, 20.0) for number in range(4)]
    scores = draw_arms(draw, 4, 3, 100)
    scores[2] += 5
    best, sentences = conclusion.judge(config, trials, {arm: dict(enumerate(scores[arm])) for arm in range(4)})
    assert best.number == 2 and "leaves out 0: the trial is better by more than the noise" in sentences[1]


@pytest.mark.parametrize(
    ("seeds", "said"),
    [
        ((6, 8), "+5.00; of one seed in common, nothing can be said of others."),
        ((8, 9), "they have no seed in common."),
    ],
)
def test_without_seeds_in_common_nothing_is_claimed(config, seeds, said):
    draw = np.random.default_rng(5)
    scores = {seed: draw.normal(20, 1, 9) for seed in (6, 7)}
    other = {seed: scores.get(seed, draw.normal(20, 1, 9)) + 5 for seed in seeds}
    _, sentences = conclusion.judge(config, [trial(0, 20.0), trial(3, 20.0)], {0: scores, 3: other})
    assert sentences[1] == f"Trial 3 minus the paper's setting: {said}"

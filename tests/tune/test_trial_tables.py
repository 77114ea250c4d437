"""Trials in words and tables: numbers, titles, order, however far a trial is."""

import pytest
from searches import EVERY_RANGE, proportions

from tune import space, trial_tables
from tune.settings import VARIED

pytestmark = pytest.mark.usefixtures("without_waiting_for_the_disk")


def to_table(played):
    return trial_tables.trials_table(played.config, played.study.best())


def test_the_table_has_the_chosen_checkpoints_scores_and_the_settings(search):
    played = search()
    played.play([20.0, 23.456, 21.0])
    parameters = played.play([24.0, 19.0])
    table = to_table(played)
    assert table.heading == "checkpoints chosen by PSNR, student network, split: dev, protocol: rgb_u8, LPIPS: alex"
    assert list(table.columns) == ["trial", "PSNR dB", "SSIM", "LPIPS", "step", "scale weights", "gamma", "EMA rate"]
    assert table.rows[0][:5] == ["1", "24.00", "0.5000", "0.2500", "100"]
    assert table.rows[1] == ["0 (paper)", "23.46", "0.5100", "0.2400", "200", "0.25 0.25 0.25 0.25", "1", "0.999"]
    weights, gamma, rate = table.rows[0][5:]
    assert weights == " ".join(f"{share:.2f}" for share in proportions(parameters))
    assert float(gamma) == pytest.approx(parameters["gamma"], rel=1e-3)
    assert 1 - float(rate) == pytest.approx(parameters["1 - ema_rate"], rel=1e-3) and len(rate) <= 10
    assert "0 (paper)" in str(table)


def test_objectives_come_first_and_a_sum_beside_its_metrics(search):
    played = search(objectives=["lpips", "psnr - 20 lpips"])
    played.play([20.0, 23.4567], lpips=0.2)
    table = to_table(played)
    assert list(table.columns[:6]) == ["trial", "LPIPS", "psnr - 20 lpips", "PSNR dB", "SSIM", "step"]
    assert table.rows[0][:6] == ["0 (paper)", "0.1900", "19.66", "23.46", "0.5100", "200"]
    assert table.heading.endswith(", LPIPS: alex")


def test_without_lpips_it_is_not_spoken_of(search):
    played = search()
    played.play([20.0], lpips=None)
    assert "LPIPS" not in to_table(played).heading and "LPIPS" not in to_table(played).columns


def test_only_what_is_searched_is_a_column(search):
    played = search(scale_weights=None, gamma=None, **EVERY_RANGE)
    played.play([20.0])
    parameters = played.play([21.0])
    table = to_table(played)
    assert list(table.columns[5:]) == ["EMA rate", "beta", "lambda", "learning rate"]
    assert table.rows[1][5:] == ["0.999", "0.6", "0.8", "0.0002"]
    assert [float(text) for text in table.rows[0][6:]] == [
        pytest.approx(parameters[name], rel=1e-3) for name in ("beta", "mirror_weight", "learning_rate")
    ]


def test_all_trials_have_their_state_last_step_and_a_column_for_each_weight(search):
    played = search()
    played.play([20.0])
    played.play([20.0, 19.0], "prune")
    played.play([], "fail")
    table = trial_tables.all_trials_table(played.config, played.study.trials())
    weights = ["w_1 (coarsest)", "w_2", "w_3", "w_4 (finest)"]
    assert list(table.columns) == [
        *("trial", "state", "PSNR dB", "SSIM", "LPIPS", "step", "last step"),
        *(*weights, "gamma", "EMA rate", "minutes"),
    ]
    assert table.heading == to_table(played).heading
    paper, stopped, failed = table.rows
    assert paper[:7] == ["0 (paper)", "finished", "20.00", "0.5000", "0.2500", "100", "100"]
    assert paper[7:13] == ["0.25", "0.25", "0.25", "0.25", "1", "0.999"] and float(paper[13]) >= 0
    assert stopped[:7] == ["1", "pruned", "20.00", "0.5000", "0.2500", "100", "200"]
    assert failed[:7] == ["2", "failed", "nan", "nan", "nan", "", "0"]


def test_a_trial_that_was_cut_off_while_it_was_drawn_has_no_settings(search):
    played = search()
    played.play([20.0])
    played.study._study.ask().suggest_float("scale_1", 1 / 8, 8.0, log=True)
    trials = played.study.trials()
    cut_off = trial_tables.all_trials_table(played.config, trials).rows[1]
    assert cut_off[:2] == ["1", "running"] and set(cut_off[7:]) == {""}
    assert set(trial_tables.trials_table(played.config, trials).rows[1][5:]) == {""}


def test_failed_trials_have_their_settings_and_reason(search):
    played = search()
    played.play([20.0], "fail")
    played.play([20.0])
    assert trial_tables.failed_rows(played.config, played.study.trials()) == [
        ["0", "scale weights 0.25 0.25 0.25 0.25\ngamma 1\nEMA rate 0.999", "out of memory"]
    ]


def test_counts(search):
    played = search()
    assert trial_tables.counts(played.study.trials()) == "0 trials"
    played.play([20.0])
    assert trial_tables.counts(played.study.trials()) == "1 trial: 1 finished"
    for end in ("prune", "prune", "fail", None):
        played.play([20.0], end)
    assert trial_tables.counts(played.study.trials()) == "5 trials: 1 finished, 2 pruned, 1 failed, 1 running"


def test_the_line_of_a_trials_settings_says_what_the_table_does(search):
    played = search()
    played.play([20.0])
    parameters = played.play([21.0])
    line = trial_tables.settings_line(played.config, space.initial_parameters(played.config))
    assert line == "scale weights 0.25 0.25 0.25 0.25, gamma 1, EMA rate 0.999"
    weights, gamma, rate = to_table(played).rows[0][5:]
    assert (
        trial_tables.settings_line(played.config, parameters)
        == f"scale weights {weights}, gamma {gamma}, EMA rate {rate}"
    )


@pytest.mark.parametrize(
    ("psnr", "end", "line"),
    [
        ([20.0, 21.5, 21.0], "finish", "finished: psnr 21.50, lpips 0.2400"),
        ([20.0], "prune", "pruned at step 100: psnr 20.00, lpips 0.2500"),
        ([20.0], "fail", "failed: out of memory"),
        ([20.0, 21.0], None, "resumes later at step 200: psnr 21.00, lpips 0.2400"),
        ([], None, "resumes later: no scores yet"),
    ],
)
def test_how_a_trial_stands_in_one_line(search, psnr, end, line):
    played = search(objectives=["psnr", "lpips"])
    played.play(psnr, end)
    assert trial_tables.outcome(played.config, played.study.trial(0)) == line


def test_every_searched_setting_has_its_names(search):
    config = search(**EVERY_RANGE).config
    assert len(trial_tables.trials_table(config, []).columns) == len(["trial", "PSNR dB", "step"]) + len(VARIED)
    names = space.distributions(config)
    assert len({trial_tables.label(name) for name in names}) == len(names)

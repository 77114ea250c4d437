"""A search's trials in their storage: handed out, scored, compared, and all there after a kill."""

import math
import os
import socket
import subprocess
import threading

import optuna
import pytest
from studies import Searches, scores

from tune import space
from tune import study as study_module
from tune.study import FEWEST


@pytest.fixture(scope="module")
def begun(tmp_path_factory, without_waiting_for_the_disk):
    """A search with one finished trial, for tests that add none."""
    searches = Searches(tmp_path_factory.mktemp("begun"))
    finished(searches.open(), scores())
    return searches


def finished(study, *values):
    """Run a trial for each of ``values`` to its end; their numbers."""
    numbers = []
    for value in values:
        number, _ = study.next()
        study.record(number, 900, value)
        study.finish(number)
        numbers.append(number)
    return numbers


def states(study):
    return [trial.state for trial in study.trials()]


@pytest.mark.parametrize("sampler", ["tpe", "gp", "random"])
def test_the_papers_setting_comes_first_and_all_others_within_the_ranges(searches, sampler):
    study = searches.open(search__sampler=sampler, search__scale_weights=(0.125, 8.0))
    config = searches.config(search__scale_weights=(0.125, 8.0))
    number, parameters = study.next()
    assert (number, parameters) == (0, space.initial_parameters(config))
    assert space.run_settings(config, parameters, "first", seed=0).identity() == config.identity()
    study.fail(number, "for the test")
    limits = space.distributions(config)
    for expected in range(1, 4):
        number, parameters = study.next()
        assert number == expected
        assert parameters.keys() == limits.keys()
        assert all(limits[name].low <= parameters[name] <= limits[name].high for name in limits)
        assert parameters != space.initial_parameters(config)
        assert study.trial(number).parameters == parameters


def test_no_more_trials_than_asked_for_however_they_ended(searches):
    study = searches.open(search__trials=4)
    for end in (study.prune, lambda number: study.fail(number, "no room"), study.finish):
        number, _ = study.next()
        study.record(number, 100, scores())
        end(number)
    assert study.next()[0] == 3
    assert study.next() is None
    assert states(study) == ["pruned", "failed", "finished", "running"]


def test_more_trials_continue_a_search_that_ended(searches):
    study = searches.open(search__trials=2)
    finished(study, scores(21), scores(22))
    assert study.next() is None
    study = searches.open(search__trials=4)
    assert finished(study, scores(23), scores(24)) == [2, 3]
    assert study.next() is None
    assert [trial.values for trial in study.best()] == [(24,), (23,), (22,), (21,)]


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_another_seed_draws_others_and_the_same_seed_the_same(tmp_path, sampler):
    drawn = []
    for place, seed in enumerate([0, 0, 1]):
        (tmp_path / str(place)).mkdir()
        study = Searches(tmp_path / str(place)).open(search__sampler=sampler, run__seed=seed)
        drawn.append([study.next()[1] for _ in range(3)])
    assert drawn[0] == drawn[1]
    assert drawn[0][0] == drawn[2][0]  # the paper's
    assert drawn[0][1:] != drawn[2][1:]


def test_running_trials_come_first_after_a_kill_with_the_same_parameters(searches):
    study = searches.open(search__trials=5)
    given = dict(study.next() for _ in range(4))
    study.record(1, 100, scores())
    study.finish(1)
    study.record(2, 100, scores(20.5))
    before = study.trials()
    study = searches.open(search__trials=5)
    assert study.trials() == before
    assert dict(study.next() for _ in range(3)) == {number: given[number] for number in (0, 2, 3)}
    assert study.next()[0] == 4
    assert study.next() is None
    assert study.trial(2).scores == {100: scores(20.5)}
    assert states(study) == ["running", "finished", "running", "running", "running"]


def test_running_trials_go_on_even_where_fewer_are_asked_for_now(searches):
    study = searches.open()
    for _ in range(3):
        study.next()
    study = searches.open(search__trials=1)
    assert [study.next()[0] for _ in range(3)] == [0, 1, 2]
    assert study.next() is None


@pytest.mark.parametrize("sampler", ["tpe", "gp", "random"])
def test_a_trial_killed_while_it_was_drawn_keeps_what_it_has_and_gets_the_rest(searches, sampler):
    study = searches.open(search__sampler=sampler)
    study.next()
    limits = space.distributions(searches.config())
    half = searches.raw.ask()
    has = half.suggest_float("gamma", 0.25, 4.0, log=True)
    study = searches.open(search__sampler=sampler)
    assert study.next()[0] == 0
    number, parameters = study.next()
    assert number == half.number == 1
    assert parameters["gamma"] == has
    assert parameters.keys() == limits.keys()
    assert limits["1 - ema_rate"].low <= parameters["1 - ema_rate"] <= limits["1 - ema_rate"].high
    assert study.trial(1).parameters == parameters


def test_the_first_trial_stays_the_papers_when_it_was_killed_while_it_was_drawn(searches):
    searches.open()
    searches.raw.ask().suggest_float("gamma", 0.25, 4.0, log=True)
    assert searches.open().next() == (0, space.initial_parameters(searches.config()))


def test_the_first_trial_is_the_papers_when_the_search_was_killed_before_it_was_named(searches, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(optuna.Study, "enqueue_trial", killed)
        searches.open()
    assert searches.open().next() == (0, space.initial_parameters(searches.config()))


def test_the_first_trial_is_named_once(searches):
    for _ in range(3):
        study = searches.open()
    assert study.next()[1] == space.initial_parameters(searches.config())
    assert study.next()[1] != space.initial_parameters(searches.config())


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_sampler_does_not_repeat_its_draws_after_a_kill(searches, sampler):
    drawn = []
    for _ in range(3):
        study = searches.open(search__sampler=sampler)
        begun = len(study.trials())
        drawn += [study.next()[1]["gamma"] for _ in range(begun + 3)][begun:]
    assert len(drawn) == len(set(drawn)) == 9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__steps": 901}, "train.steps: 900 before, 901 now"),
        ({"run__seed": 3}, "seed: 0 before, 3 now"),
        ({"data": ("other",)}, r"manifest_sha256: \['checksum'\] before, \['other'\] now"),
        ({"objective__beta": 0.5}, "objective.beta: 0.6 before, 0.5 now"),
        ({"search__gamma": (0.5, 4)}, r"ranges.gamma: \[0.25, 4.0\] before, \[0.5, 4.0\] now"),
        ({"search__ema_rate": (0.99, 0.9999)}, r"ranges.1 - ema_rate: \[0.0001, 0.1\] before, \[0.0001, 0.01\] now"),
        ({"search__gamma": None}, r"ranges.gamma: \[0.25, 4.0\] before, None now"),
        ({"search__beta": (0.5, 1)}, r"ranges.beta: None before, \[0.5, 1.0\] now"),
        ({"search__objectives": ["ssim"]}, r"objectives: \['psnr'\] before, \['ssim'\] now"),
        ({"search__objectives": ["psnr", "ssim"]}, r"objectives: \['psnr'\] before, \['psnr', 'ssim'\] now"),
        ({"checkpoint__metric": "ssim", "search__objectives": ["psnr"]}, "checkpoint.metric: psnr before, ssim now"),
        ({"checkpoint__network": "averaged"}, "checkpoint.network: student before, averaged now"),
        ({"checkpoint__every": 50}, "checkpoint.every: 100 before, 50 now"),
        ({"search__reduction": 3.5}, "reduction: 3.0 before, 3.5 now"),
        ({"search__reduction": None}, "reduction: 3.0 before, None now"),
    ],
)
def test_other_settings_or_data_are_refused_with_both_values(begun, changes, message):
    with pytest.raises(ValueError, match=f"a search named s exists with other .*\n(.*\n)*  {message}"):
        begun.open(**changes)


def test_a_refused_search_changes_nothing(begun):
    for changes in ({"run__seed": 3}, {"data": ("other",)}):
        with pytest.raises(ValueError, match="choose another"):
            begun.open(**changes)
    assert states(begun.open()) == ["finished"]


@pytest.mark.parametrize("changes", [{"evaluation__protocols": ["cidnet"]}, {"evaluation__lpips": "vgg"}])
def test_scores_that_are_measured_otherwise_are_refused(searches, changes):
    finished(searches.open(search__objectives=["psnr", "lpips"]), scores())
    with pytest.raises(ValueError, match="evaluation"):
        searches.open(search__objectives=["psnr", "lpips"], **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"search__trials": 64, "search__hours": 1.0, "search__concurrent": 2, "search__top": 1, "search__seeds": 2},
        {"search__sampler": "tpe"},
        {"checkpoint__keep_last": 1, "train__log_every": 1, "run__max_failures": 0, "data__url": "/moved"},
    ],
)
def test_what_cannot_change_the_trials_may_change(begun, changes):
    assert states(begun.open(**changes)) == ["finished"]


def test_two_searches_share_a_database(searches, tmp_path):
    url = f"sqlite:///{tmp_path}/all.db"
    finished(searches.open(search__database=url), scores())
    assert states(searches.open(search__database=url, run__name="other", run__seed=9)) == []


def test_a_folder_may_have_any_name(tmp_path):
    (tmp_path / "a %20b#c?d").mkdir()
    finished(Searches(tmp_path / "a %20b#c?d").open(), scores())
    assert (tmp_path / "a %20b#c?d" / "s-search" / "study.db").exists()


@pytest.mark.parametrize("url", ["sqlite:////nowhere/at/all.db", "nonsense://host/name"])
def test_a_storage_that_cannot_be_opened_is_named(searches, url):
    with pytest.raises(ValueError, match=f"search.database: {url} can't be opened: "):
        searches.open(search__database=url)


def test_a_checkpoint_that_is_known_changes_nothing(searches):
    study = searches.open()
    number, _ = study.next()
    study.record(number, 100, scores(20))
    study.record(number, 200, scores(21))
    before = study.trial(number), searches.raw.trials[number].intermediate_values
    study = searches.open()
    study.record(number, 100, scores(30))
    study.record(number, 200, scores(30))
    assert (study.trial(number), searches.raw.trials[number].intermediate_values) == before


@pytest.mark.parametrize(
    ("metric", "chosen"), [("psnr", 300), ("ssim", 400), ("lpips", 100)], ids=["psnr", "ssim: the newest", "lpips"]
)
def test_the_best_checkpoint_by_its_metric_gives_the_values(searches, metric, chosen):
    study = searches.open(checkpoint__metric=metric, search__objectives=["psnr", "psnr - 20 lpips"])
    number, _ = study.next()
    trial = study.trial(number)
    assert (trial.state, trial.scores, trial.chosen, trial.values) == ("running", {}, None, None)
    by_step = {
        100: scores(20, 0.25, 0.25),
        200: scores(21, 0.75, 0.5),
        300: scores(22, 0.5, 1),
        400: scores(19, 0.75, 1),
    }
    for step in (200, 100, 400, 300):  # evaluations may end in any order
        study.record(number, step, by_step[step])
    trial = study.trial(number)
    assert list(trial.scores.items()) == list(by_step.items())
    assert trial.chosen == chosen
    best = by_step[chosen]
    assert trial.values == (best["psnr"], best["psnr"] - 20 * best["lpips"])


def test_optuna_has_the_values_of_finished_trials(searches):
    study = searches.open(search__objectives=["psnr", "lpips"])
    finished(study, scores(21, lpips=0.25))
    assert searches.raw.trials[0].values == [21, 0.25]
    assert [direction.name for direction in searches.raw.directions] == ["MAXIMIZE", "MINIMIZE"]


def test_a_stopped_trial_has_its_last_value_in_optuna(searches):
    study = searches.open()
    number, _ = study.next()
    for step, psnr in ((100, 20), (200, 22), (300, 21)):
        study.record(number, step, scores(psnr))
    study.prune(number)
    trial = searches.raw.trials[number]
    assert trial.intermediate_values == {100: 20, 200: 22, 300: 22}  # of the best checkpoint so far
    assert trial.value == 22
    assert trial.state.name == "PRUNED"
    assert study.trial(number).values == (22,)
    assert study.best() == []


def test_a_failed_trial_keeps_its_reason(searches):
    study = searches.open()
    number, _ = study.next()
    study.fail(number, "RuntimeError: CUDA out of memory")
    for opened in (study, searches.open()):
        trial = opened.trial(number)
        assert (trial.state, trial.failure, trial.values) == ("failed", "RuntimeError: CUDA out of memory", None)
        assert opened.next()[0] > number
    assert study.best() == study.front() == []


def test_a_trial_takes_time_once_it_has_ended(searches):
    study = searches.open()
    number, _ = study.next()
    assert study.trial(number).seconds is None
    study.fail(number, "for the test")
    assert 0 <= study.trial(number).seconds < 60


@pytest.mark.parametrize("sampler", ["tpe", "gp"])
@pytest.mark.parametrize("objectives", [["lpips"], ["psnr", "lpips"]], ids=["one", "two"])
def test_samplers_learn_from_all_kinds_of_ends(searches, sampler, objectives):
    study = searches.open(search__sampler=sampler, search__objectives=objectives)
    for index in range(13):
        number, _ = study.next()
        study.record(number, 100, scores(20 + index % 5, lpips=0.1 + index % 3))
        if index % 7 == 6:
            study.fail(number, "for the test")
        else:
            (study.prune if index % 4 == 3 else study.finish)(number)
    number, parameters = searches.open(search__sampler=sampler, search__objectives=objectives).next()
    assert (number, parameters.keys()) == (13, {"gamma", "1 - ema_rate"})


@pytest.mark.parametrize(
    ("objective", "order"), [("psnr", [1, 3, 0, 2]), ("lpips", [2, 0, 3, 1]), ("psnr - 20 lpips", [0, 2, 1, 3])]
)
def test_the_best_trial_comes_first(searches, objective, order):
    study = searches.open(search__objectives=[objective])
    finished(study, scores(22, lpips=0.2), scores(24, lpips=0.4), scores(20, lpips=0.19), scores(23, lpips=0.39))
    number, _ = study.next()
    study.record(number, 100, scores(30, lpips=0.0))
    study.prune(number)
    study.record(study.next()[0], 100, scores(30, lpips=0.0))
    assert [trial.number for trial in study.best()] == order
    assert [trial.number for trial in study.front()] == order[:1]


@pytest.mark.parametrize(
    ("objectives", "front", "behind"),
    [(["lpips", "psnr"], [1, 2, 0], [5, 4, 3]), (["psnr", "lpips"], [0, 2, 1], [4, 5, 3])],
)
def test_of_two_objectives_the_front_comes_first_and_then_who_is_least_dominated(searches, objectives, front, behind):
    study = searches.open(search__objectives=objectives)
    finished(study, scores(24, lpips=0.5), scores(20, lpips=0.1), scores(22, lpips=0.3))  # none dominates another
    finished(study, scores(19, lpips=0.6), scores(23, lpips=0.55), scores(21, lpips=0.35))  # dominated by 5, 1 and 1
    assert [trial.number for trial in study.front()] == front
    assert [trial.number for trial in study.best()] == front + behind
    finished(study, scores(24, lpips=0.5))  # an equal one is on the front too
    assert sorted(trial.number for trial in study.front()) == [0, 1, 2, 6]


def made_up(study, count):
    """Trials in which gamma decides which have a good PSNR, the EMA rate which have a good LPIPS; else the reverse."""
    for _ in range(count):
        number, drawn = study.next()
        gamma, horizon = math.log2(drawn["gamma"]) / 2, math.log10(drawn["1 - ema_rate"]) / 1.5 + 5 / 3  # -1 to 1
        psnr = 30 - gamma if gamma < -0.4 else 20 + horizon
        lpips = 0.1 + 0.01 * horizon if horizon < -0.4 else 0.5 - 0.01 * gamma
        study.record(number, 900, scores(psnr, lpips=lpips))
        study.finish(number)


def test_importances_find_the_parameter_that_decides_each_objective(searches):
    study = searches.open(search__objectives=["psnr", "lpips"], search__trials=100)
    made_up(study, 40)
    of_psnr, of_lpips = study.importances()
    for importances in (of_psnr, of_lpips):
        assert importances.keys() == {"gamma", "1 - ema_rate"}
        assert sum(importances.values()) == pytest.approx(1)
    assert of_psnr["gamma"] > 0.8
    assert of_lpips["1 - ema_rate"] > 0.8


def test_a_parameter_that_decides_which_trials_are_stopped_is_important(searches):
    """Of those that finish, gamma decides little: their scores are of the EMA rate."""
    study = searches.open(search__trials=100)
    for _ in range(40):
        number, parameters = study.next()
        is_good = abs(math.log(parameters["gamma"])) < 0.3
        study.record(number, 100, scores(20 if is_good else 30))  # what was better at the time counts less than how far
        if is_good:
            study.record(number, 900, scores(25 + 0.1 * math.log(parameters["1 - ema_rate"])))
            study.finish(number)
        else:
            study.prune(number)
    assert study.importances()[0]["gamma"] > 0.4


def test_importances_need_enough_finished_trials(searches):
    study = searches.open()
    finished(study, *[scores(20 + index) for index in range(FEWEST - 1)])
    assert study.importances() == [{}]
    finished(study, scores(19))
    assert sum(study.importances()[0].values()) == pytest.approx(1)


def test_trials_that_are_all_alike_say_nothing_of_importances(searches):
    study = searches.open()
    finished(study, *[scores(20)] * FEWEST)
    assert study.importances() == [{}]


@pytest.fixture
def quick_beats(monkeypatch):
    monkeypatch.setattr(study_module, "HEARTBEAT_S", 0.5)


def driver_of(searches, **changes):
    """Stands for another process that ran the search last."""
    driver = {"host": socket.gethostname(), "pid": os.getppid(), "at": 1.0} | changes
    searches.raw.set_user_attr(study_module.DRIVER, driver)


def test_a_search_that_another_process_runs_is_refused(searches, quick_beats, capsys):
    study = searches.open()
    driver_of(searches)
    beating = threading.Timer(0.5, driver_of, (searches,), {"at": 2.0})
    beating.start()
    with pytest.raises(ValueError, match=rf"process {os.getppid()} on .* runs this search; stop it first"):
        study.acquire_lease()
    beating.join()
    assert "waiting to see whether it still does" in capsys.readouterr().out


def test_a_search_whose_process_ended_or_is_silent_is_taken(searches, quick_beats, capsys):
    ended = subprocess.Popen(["true"])
    ended.wait()
    study = searches.open()
    driver_of(searches, pid=ended.pid)
    study.acquire_lease()
    assert capsys.readouterr().out == ""
    driver_of(searches, host="elsewhere")
    study.acquire_lease()
    assert "on elsewhere" in capsys.readouterr().out
    study.release_lease()
    study.acquire_lease()
    assert capsys.readouterr().out == ""


def test_the_time_that_trials_were_run_is_kept(searches):
    study = searches.open(search__hours=1.0)
    study.acquire_lease()
    study.heartbeat(600)
    study.heartbeat(1200)
    assert searches.open(search__hours=1.0).seconds_left() == 1800
    assert searches.open(search__hours=0.25).seconds_left() == 0
    assert searches.open().seconds_left() is None


def test_an_upgrade_of_optuna_that_names_the_id_of_a_trial_otherwise(searches):
    number, _ = searches.open().next()
    assert searches.open().record(number, 100, {"psnr": 20.0, "ssim": 0.5, "lpips": 0.3})  # another process's trial
    assert searches.open().trial(number).scores[100]["psnr"] == 20.0

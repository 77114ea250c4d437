"""What a search comes to: its best settings trained again over seeds, beside the paper's.

The best of many trials is best by luck as well. So the top few and the first trial, the paper's setting, are trained
with seeds that the search has not seen, and these runs alone decide. The best of these few is best by luck too, though
less: the intervals of their differences hold for all of them together, so that the choice among them is free.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.reporting.comparison import chosen_table
from pipeline.reporting.intervals import LEVEL, Difference, differences_to_first
from pipeline.reporting.text_table import TextTable
from pipeline.run import history
from pipeline.run.history import Run
from pipeline.run.scores import headline_rows
from pipeline.settings.config import Config
from tune import space
from tune.goal import Goal
from tune.settings import SearchConfig
from tune.study import Trial
from tune.trials import run_name

ByImage = Mapping[int, Mapping[int, NDArray[np.float64]]]  # the first objective's values, by trial and seed


@dataclass(frozen=True)
class Conclusion:
    """What the runs over seeds say.

    Attributes:
        best: the trial whose settings did best over seeds, by the first objective.
        sentences: how it differs from the paper's setting, in plain words.
        table: scores over seeds, the paper's setting first.
    """

    best: Trial
    sentences: Sequence[str]
    table: TextTable


def configs_over_seeds(search: SearchConfig, trials: Sequence[Trial]) -> list[Config]:
    """The settings of a run for each seed and trial; the seeds are others than the search's."""
    seeds = [search.run.seed + 1 + index for index in range(search.search.seeds)]
    return [
        space.run_settings(search, trial.parameters, _name(trial, seed), seed) for seed in seeds for trial in trials
    ]


def conclude(search: SearchConfig, trials: Sequence[Trial]) -> Conclusion | None:
    """Compare the trials' settings by their runs over seeds; none where the paper's or all others have failed.

    Args:
        search: the settings of the search.
        trials: the paper's setting, then the best ones, best first.

    Raises:
        ValueError: the runs' scores do not compare, since they were made otherwise.
    """
    runs = {trial.number: finished for trial in trials if len(finished := _finished(search, trial)) > 1}
    if 0 not in runs or len(runs) == 1:
        return None
    table = chosen_table({arm_name(number): seeds for number, seeds in runs.items()}, "dev")
    values = {number: {seed: _by_image(search, run) for seed, run in seeds.items()} for number, seeds in runs.items()}
    best, sentences = judge(search, [trial for trial in trials if trial.number in runs], values)
    return Conclusion(best, sentences, table)


def judge(search: SearchConfig, trials: Sequence[Trial], values: ByImage) -> tuple[Trial, Sequence[str]]:
    """The best of the trials over seeds, and in sentences how it differs from the paper's setting.

    Args:
        search: the settings of the search.
        trials: the paper's setting, then the best ones of the search, best first.
        values: the first objective's value for each image, float64 [images], by the trial's number and seed.
    """
    goal, paper = search.objectives[0], arm_name(0)
    sign = 1 if goal.direction == "maximize" else -1
    best = max(trials, key=lambda trial: sign * _mean(values[trial.number]))
    spreads = [f"{arm_name(number)} {_spread(goal, values[number])}" for number in dict.fromkeys((0, best.number))]
    said = [
        f"{goal.text} of the chosen checkpoints on the development split, over {len(values[best.number])} seeds "
        f"that the search had not used: {'; '.join(spreads)} (mean ± standard deviation over seeds)."
    ]
    if best.number == 0:
        others = ", ".join(arm_name(number) for number in values if number)
        said.append(f"None of the best trials, {others}, does better than {paper} over these seeds.")
    else:
        found = differences_to_first(values).get(best.number)
        said.append(f"Trial {best.number} minus {paper}: {_difference(goal, found, len(values) - 1)}")
    in_search = [
        f"{arm_name(trial.number)} had {goal.format_value(trial.values[0])}" for trial in trials[:2] if trial.values
    ]
    said.append(
        f"In the search itself, with seed {search.run.seed}, {' and '.join(in_search)}; the best of many trials is "
        "biased upwards, which is why other seeds decide."
    )
    return best, said


def arm_name(number: int) -> str:
    """What a trial's settings are called."""
    return "the paper's setting" if number == 0 else f"trial {number}"


def _difference(goal: Goal, difference: Difference | None, compared: int) -> str:
    """The difference of one setting among those ``compared`` with the paper's, and what it proves."""
    if difference is None:
        return "they have no seed in common."
    mean, low, high = (goal.format_value(value, "+") for value in (difference.mean, difference.low, difference.high))
    if difference.seeds == 1 or math.isnan(difference.low):
        reason = "of one seed in common" if difference.seeds == 1 else "of scores that are not finite"
        return f"{mean}; {reason}, nothing can be said of others."
    together = f", for all {compared} settings that are compared with it together" * (compared > 1)
    interval = f"{mean} [{low}, {high}] ({LEVEL:.0%} interval over seeds and images{together})"
    if difference.low <= 0 <= difference.high:
        return f"{interval}. The interval contains 0: these seeds and images do not tell the two apart."
    better = (difference.low > 0) == (goal.direction == "maximize")
    verdict = "better" if better else "worse"
    return f"{interval}. The interval leaves out 0: the trial is {verdict} by more than the noise."


def _name(trial: Trial, seed: int) -> str:
    return f"{run_name(trial.number)}-seed{seed}"


def _finished(search: SearchConfig, trial: Trial) -> dict[int, Run]:
    """The trial's finished runs over seeds, by seed."""
    configs = configs_over_seeds(search, [trial])
    return {
        config.run.seed: Run.load(config.run.url)
        for config in configs
        if history.is_finished(config.run.url, config.train.steps)
    }


def _by_image(search: SearchConfig, run: Run) -> NDArray[np.float64]:
    """The first objective's value for each image in their order, float64 [images], by the run's chosen checkpoint."""
    assert run.chosen is not None
    rows = headline_rows(run.scores_of(run.chosen, "dev"), search.evaluation.protocols[0])
    rows = rows[rows["method"] == search.checkpoint.network]
    wide = rows.pivot(index="key", columns="metric", values="value").sort_index()
    factors = search.objectives[0].factors
    values: NDArray[np.float64] = np.sum([factor * wide[name].to_numpy() for name, factor in factors.items()], axis=0)
    return values


def _mean(seeds: Mapping[int, NDArray[np.float64]]) -> float:
    return float(np.mean([values.mean() for values in seeds.values()]))


def _spread(goal: Goal, seeds: Mapping[int, NDArray[np.float64]]) -> str:
    deviation = float(np.std([values.mean() for values in seeds.values()], ddof=1))
    return f"{goal.format_value(_mean(seeds))} ± {goal.format_value(deviation)}"

"""What a search comes to: its best settings trained again over seeds, beside the paper's.

The best of many trials is best by luck as well. So the top few and the first trial, the paper's setting, are trained
with seeds that the search has not seen, and these runs alone decide.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pipeline.config import Config
from pipeline.evaluation import results, scores
from pipeline.evaluation.results import Run
from pipeline.evaluation.tables import TextTable
from pipeline.reporting.comparison import chosen_table
from tune import space
from tune.objective import Objective
from tune.settings import SearchConfig
from tune.study import Trial
from tune.trials import run_name, side_by_side

Runs = Mapping[int, Mapping[int, Run]]  # by trial and seed


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


def configs_over_seeds(search: SearchConfig, trials: Sequence[Trial]) -> dict[tuple[int, int], Config]:
    """The settings of a run for each trial and seed; the seeds are others than the search's."""
    seeds = [search.run.seed + 1 + index for index in range(search.search.seeds)]
    base = side_by_side(search)
    return {
        (trial.number, seed): space.applied(base, trial.parameters, f"{run_name(trial.number)}-seed{seed}", seed)
        for seed in seeds
        for trial in trials
    }


def trained(search: SearchConfig, trials: Sequence[Trial]) -> Runs:
    """The runs over seeds that are finished, of those trials of which there are at least two."""
    runs: dict[int, dict[int, Run]] = {}
    for (number, seed), config in configs_over_seeds(search, trials).items():
        if results.is_finished(config.run.url, config.train.steps):
            runs.setdefault(number, {})[seed] = Run.load(config.run.url)
    return {number: seeds for number, seeds in runs.items() if len(seeds) > 1}


def conclude(search: SearchConfig, trials: Sequence[Trial], runs: Runs) -> Conclusion:
    """Compare the trials' settings by their runs over seeds.

    Args:
        search: the settings of the search.
        trials: the paper's setting, then the best ones, best first.
        runs: of at least the paper's setting.
    """
    objective = search.objectives[0]
    values = {number: _values(search, objective, seeds) for number, seeds in runs.items()}
    means = {number: _mean(each) for number, each in values.items()}
    sign = 1 if objective.direction == "maximize" else -1
    best = max(means, key=lambda number: sign * means[number])
    by_number = {trial.number: trial for trial in trials}
    names = {number: arm_name(number) for number in sorted(runs, key=lambda each: [*by_number].index(each))}
    table = chosen_table({name: runs[number] for number, name in names.items()}, "dev")
    sentences = _sentences(search, trials, by_number[best], values)
    return Conclusion(by_number[best], sentences, table)


def arm_name(number: int) -> str:
    """What a trial's settings are called."""
    return "the paper's setting" if number == 0 else f"trial {number}"


def _sentences(
    search: SearchConfig, trials: Sequence[Trial], best: Trial, values: Mapping[int, Mapping[int, pd.Series]]
) -> list[str]:
    objective = search.objectives[0]
    in_search = [
        f"{arm_name(trial.number)} had {objective.shown(trial.values[0])}" for trial in trials[:2] if trial.values
    ]
    seeds = len(values[best.number])
    spreads = [f"{arm_name(number)} {_spread(values[number])}" for number in dict.fromkeys((0, best.number))]
    said = [
        f"{objective.text} of the chosen checkpoints on the development split, over {seeds} seeds that the search had "
        f"not used: {'; '.join(spreads)} (mean ± standard deviation over seeds)."
    ]
    if best.number == 0:
        said.append(f"None of the {len(values) - 1} best trials does better than the paper's setting over these seeds.")
    else:
        differences = _differences(values[0], values[best.number])
        low, high = scores.difference_interval(differences)
        said.append(
            f"trial {best.number} minus the paper's setting: {differences.mean():+.4g} [{low:+.4g}, {high:+.4g}] (95% "
            f"bootstrap interval over images and seeds). {_verdict(objective, low, high)}"
        )
    said.append(
        f"In the search itself, with seed {search.run.seed}, {' and '.join(in_search)}; the best of many trials is "
        "flattered, which is why other seeds decide."
    )
    return said


def _verdict(objective: Objective, low: float, high: float) -> str:
    if low <= 0 <= high:
        return "The interval contains 0: these seeds and images do not tell the two apart."
    better = (low > 0) == (objective.direction == "maximize")
    return f"The interval leaves out 0: the trial is {'better' if better else 'worse'} by more than the noise."


def _values(search: SearchConfig, objective: Objective, seeds: Mapping[int, Run]) -> dict[int, pd.Series]:
    """The objective's value for each image, by seed."""
    return {seed: _by_image(search, objective, run) for seed, run in seeds.items()}


def _by_image(search: SearchConfig, objective: Objective, run: Run) -> pd.Series:
    assert run.chosen is not None
    rows = run.scores_of(run.chosen, "dev")
    shown = (rows["protocol"] == search.evaluation.protocols[0]) | (rows["metric"] == "lpips")
    rows = rows[shown & (rows["method"] == search.checkpoint.weights)]
    wide = rows.pivot(index="key", columns="metric", values="value").sort_index()
    return sum(factor * wide[metric] for metric, factor in objective.factors.items())


def _differences(first: Mapping[int, pd.Series], other: Mapping[int, pd.Series]) -> NDArray[np.float64]:
    """Paired differences, float64 [seeds, images]."""
    return np.stack([(other[seed] - first[seed]).to_numpy() for seed in sorted(first.keys() & other.keys())])


def _mean(seeds: Mapping[int, pd.Series]) -> float:
    return float(np.mean([values.mean() for values in seeds.values()]))


def _spread(seeds: Mapping[int, pd.Series]) -> str:
    return f"{_mean(seeds):.4g} ± {np.std([values.mean() for values in seeds.values()], ddof=1):.2g}"

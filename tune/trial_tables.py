"""Trials in words and as tables: what the command prints and the page shows of them."""

import math
from collections.abc import Mapping, Sequence

from pipeline.reporting import run_summary
from pipeline.reporting.tables import FORMATS
from pipeline.reporting.text_table import TextTable
from tune import space
from tune.goal import Goal
from tune.settings import SearchConfig
from tune.study import State, Study, Trial

STATES: Mapping[State, str] = {
    "finished": "finished",
    "pruned": "pruned",
    "failed": "failed",
    "running": "running",
}
TITLES = {
    space.HORIZON: "EMA rate",
    "gamma": "gamma",
    "beta": "beta",
    "mirror_weight": "lambda",
    "learning_rate": "learning rate",
}
LABELS = {
    space.HORIZON: "EMA rate, 1 - m",
    "gamma": "illumination exponent gamma",
    "beta": "illumination strength beta",
    "mirror_weight": "mirror loss weight lambda",
    "learning_rate": "learning rate",
}


def counts(trials: Sequence[Trial]) -> str:
    """How many trials there are, and how they stand."""
    states = [trial.state for trial in trials]
    parts = [f"{states.count(state)} {name}" for state, name in STATES.items() if state in states]
    return f"{len(trials)} trial{'s' * (len(trials) != 1)}{': ' if parts else ''}{', '.join(parts)}"


def unfinished(config: SearchConfig, study: Study) -> list[str]:
    """A sentence on what is left to do, if anything is."""
    if study.is_complete():
        return []
    trials = study.trials()
    ended = sum(trial.state != "running" for trial in trials)
    is_late = study.seconds_left() == 0
    why = f"The search came to the end of its {config.search.hours:g} h" if is_late else "The search is not at its end"
    return [f"{why}. Trials begun: {len(trials)} of {config.search.trials}; ended: {ended}."]


def settings_line(config: SearchConfig, parameters: space.Parameters) -> str:
    """The settings that a trial's parameters stand for, in one line."""
    return ", ".join(_named(_setting_texts(config, parameters, joined=True)))


def outcome(config: SearchConfig, trial: Trial) -> str:
    """How a trial stands when it is no longer run, in one line."""
    state = "resumes later" if trial.state == "running" else STATES[trial.state]
    at = f" at step {max(trial.scores)}" if trial.state in ("pruned", "running") and trial.scores else ""
    values = zip(config.objectives, trial.values or (), strict=False)
    reached = ", ".join(f"{objective.text} {objective.format_value(value)}" for objective, value in values)
    return f"{state}{at}: {trial.failure or reached or 'no scores yet'}"


def trials_table(config: SearchConfig, trials: Sequence[Trial]) -> TextTable:
    """Trials in the given order: scores of their chosen checkpoints, and the settings that they were trained with."""
    metrics = _metrics(config, trials)
    columns = ["trial", *_score_titles(config, metrics), "step", *_setting_titles(config, joined=True)]
    rows = [
        [
            _name(trial),
            *_scores(config, trial, metrics),
            _chosen_step(trial),
            *_setting_texts(config, trial.parameters, joined=True).values(),
        ]
        for trial in trials
    ]
    return TextTable(_heading(config, metrics), columns, rows)


def all_trials_table(config: SearchConfig, trials: Sequence[Trial]) -> TextTable:
    """All there is to know of trials, with a column for each scale's weight."""
    metrics = _metrics(config, trials)
    scores, settings = _score_titles(config, metrics), _setting_titles(config, joined=False)
    rows = [
        [
            _name(trial),
            STATES[trial.state],
            *_scores(config, trial, metrics),
            _chosen_step(trial),
            str(max(trial.scores, default=0)),
            *_setting_texts(config, trial.parameters, joined=False).values(),
            "" if trial.seconds is None else f"{trial.seconds / 60:.1f}",
        ]
        for trial in trials
    ]
    columns = ["trial", "state", *scores, "step", "last step", *settings, "minutes"]
    return TextTable(_heading(config, metrics), columns, rows)


def failed_rows(config: SearchConfig, trials: Sequence[Trial]) -> list[list[str]]:
    """Number, settings and reason of each trial that failed."""
    return [
        [
            str(trial.number),
            "\n".join(_named(_setting_texts(config, trial.parameters, joined=True))),
            trial.failure or "no reason is known",
        ]
        for trial in trials
        if trial.state == "failed"
    ]


def title(objective: Goal) -> str:
    """What an objective is called: a metric with its unit, a sum as the user wrote it."""
    return FORMATS[objective.text][0] if objective.text in FORMATS else objective.text


def label(name: str) -> str:
    """What a parameter is called where there is room, as in figures."""
    if name in LABELS:
        return LABELS[name]
    ends = {0: " (coarsest)", len(space.SHARES) - 1: " (finest)"}
    scale = space.SHARES.index(name)
    return f"w_{scale + 1}{ends.get(scale, '')}"


def chosen_scores(trial: Trial) -> Mapping[str, float]:
    """The scores of a trial's chosen checkpoint; empty before the first."""
    return {} if trial.chosen is None else trial.scores[trial.chosen]


def as_coordinates(config: SearchConfig, parameters: space.Parameters) -> dict[str, float]:
    """Where a trial is in the space of settings: as its parameters, but scale weights are proportions.

    Empty for a trial that was cut off before all of its parameters were drawn.
    """
    if not space.distributions(config).keys() <= parameters.keys():
        return {}
    settings = space.run_settings(config, parameters, config.run.name, config.run.seed)
    values = {
        **dict(zip(space.SHARES, settings.objective.scale_weights, strict=True)),
        "gamma": settings.objective.gamma,
        space.HORIZON: 1 - settings.teacher.ema_rate,
        "beta": settings.objective.beta,
        "mirror_weight": settings.objective.mirror_weight,
        "learning_rate": settings.optimizer.learning_rate,
    }
    return {name: values[name] for name in space.distributions(config)}


def _name(trial: Trial) -> str:
    return f"{trial.number}{' (paper)' * (trial.number == 0)}"


def _chosen_step(trial: Trial) -> str:
    return "" if trial.chosen is None else str(trial.chosen)


def _heading(config: SearchConfig, metrics: Sequence[str]) -> str:
    """What the numbers of a table of trials are."""
    checkpoint, evaluation = config.checkpoint, config.evaluation
    chosen = f"by {run_summary.metric_name(checkpoint.metric)}"
    known = {*metrics, *(metric for objective in config.objectives for metric in objective.factors)}
    parts = [f"checkpoints chosen {chosen}, {checkpoint.network} network, split: dev"]
    parts.append(f"protocol: {evaluation.protocols[0]}")
    return ", ".join([*parts, f"LPIPS: {evaluation.lpips}"] if "lpips" in known else parts)


def _metrics(config: SearchConfig, trials: Sequence[Trial]) -> list[str]:
    """The metrics that some trial has a score of and that are no objective themselves."""
    objectives = [objective.text for objective in config.objectives]
    known = {metric for trial in trials for metric in chosen_scores(trial)}
    return [metric for metric in FORMATS if metric in known and metric not in objectives]


def _score_titles(config: SearchConfig, metrics: Sequence[str]) -> list[str]:
    return [*map(title, config.objectives), *(FORMATS[metric][0] for metric in metrics)]


def _scores(config: SearchConfig, trial: Trial, metrics: Sequence[str]) -> list[str]:
    """The objectives' values, then the metrics' scores, of the chosen checkpoint."""
    values = trial.values or [math.nan] * len(config.objectives)
    scores = chosen_scores(trial)
    texts = [objective.format_value(value) for objective, value in zip(config.objectives, values, strict=True)]
    return texts + [run_summary.number(scores.get(metric, math.nan), metric) for metric in metrics]


def _setting_titles(config: SearchConfig, *, joined: bool) -> list[str]:
    return list(_setting_texts(config, {}, joined=joined))


def _setting_texts(config: SearchConfig, parameters: space.Parameters, *, joined: bool) -> dict[str, str]:
    """The searched settings by their titles; empty texts when not all parameters are there.

    ``joined``: the scale weights are one of the settings, not one for each scale.
    """
    values = as_coordinates(config, parameters)
    texts = {name: _setting_text(name, values[name]) if values else "" for name in space.distributions(config)}
    weights = {label(name): texts.pop(name) for name in space.SHARES if name in texts}
    if joined and weights:
        weights = {"scale weights": " ".join(weights.values()).strip()}
    return weights | {TITLES[name]: text for name, text in texts.items()}


def _setting_text(name: str, value: float) -> str:
    if name in space.SHARES:
        return f"{value:.2f}"
    # 8 digits: all that there are of the rate, without those that 1 - m has from binary fractions
    return f"{1 - value:.8g}" if name == space.HORIZON else f"{value:.4g}"


def _named(texts: Mapping[str, str]) -> list[str]:
    return [f"{name} {text}" for name, text in texts.items() if text]

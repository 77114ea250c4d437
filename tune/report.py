"""What a search found, as one HTML page: sentences, tables and figures."""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate, combinations

import numpy as np

from pipeline.reporting import run_summary
from pipeline.reporting.figures import MARKED_POINTS, Limits, Points, bars, scatter
from pipeline.reporting.page import blocks
from pipeline.reporting.page.blocks import Block, Chart, gather_charts
from pipeline.reporting.page.render import render_page
from pipeline.reporting.text_table import TextTable
from tune import space, trial_tables
from tune.goal import Goal
from tune.settings import SearchConfig
from tune.study import State, Study, Trial

SHOWN = 10  # best trials
# in figures, where failed trials are not shown
COLOURS: Mapping[State, str] = {"running": "0.55", "pruned": "tab:orange", "finished": "tab:blue"}
BEST, PAPER = "tab:green", "0.1"
PAPERS = "the paper's setting"
AT_THE_EDGE = "Points at the edge of a figure lie beyond it."
FENCE = 1.5  # interquartile ranges beyond the quartiles
MARGIN = 0.06  # of an axis, at both ends
Places = Mapping[int, tuple[float, float]]  # x and y by trial number


def render(
    config: SearchConfig,
    study: Study,
    conclusion: Sequence[str] = (),
    comparison: TextTable | None = None,
    best_settings: str = "",
) -> str:
    """The page of a search as HTML, however far it is.

    Args:
        config: the settings of the search.
        study: its trials.
        conclusion: what came out, in sentences.
        comparison: the best settings' scores over seeds.
        best_settings: the settings to train with from now on, as YAML.
    """
    trials = study.trials()
    best = study.best()[:1] if len(config.objectives) == 1 else study.front()
    outcome = [blocks.Paragraph(sentence) for sentence in [*conclusion, *trial_tables.unfinished(config, study)]]
    sections: dict[str, list[Block]] = {
        "Results": [*outcome, *([comparison] if comparison else [])],
        "Best trials": _best_trials(config, study),
        "History": _history(config, trials, best),
        "Learning curves": _learning_curves(config, trials, best),
        "Parameter importance": _importances(config, study),
        "Slices": _slices(config, trials, best),
        "Trade-off": _trade_offs(config, trials, best),
        "Failed trials": _failed_trials(config, trials),
        "All trials": _all_trials(config, trials),
        "Best settings": [blocks.Preformatted(best_settings)] if best_settings else [],
        "Settings of the search": [
            blocks.Details("All settings of the search", [blocks.Descriptions(_settings(config))])
        ],
    }
    state = f"{trial_tables.counts(trials)}; time: {_duration(study.seconds)}"
    return render_page(f"Search: {config.run.name}", [blocks.Paragraph(state, "state")], sections)


def _best_trials(config: SearchConfig, study: Study) -> list[Block]:
    several = len(config.objectives) > 1
    trials = study.front() if several else study.best()[:SHOWN]
    if not trials:
        return []
    table = trial_tables.trials_table(config, trials)
    note = "The Pareto front: no other finished trial is as good in all objectives and better in one."
    return [blocks.Paragraph(note), table] if several else [table]


def _history(config: SearchConfig, trials: Sequence[Trial], best: Sequence[Trial]) -> list[Block]:
    """Each trial's value, a figure for each objective."""
    charts = []
    for index, objective in enumerate(config.objectives):
        places = {trial.number: (float(trial.number), trial.values[index]) for trial in trials if trial.values}
        finished = [places[trial.number] for trial in trials if trial.state == "finished" and trial.number in places]
        numbers = [number for number, _ in finished]
        so_far = list(accumulate((value for _, value in finished), max if objective.direction == "maximize" else min))
        if finished:  # it holds up to the newest trial
            numbers.append(float(trials[-1].number))
            so_far.append(so_far[-1])
        line = Points("best so far", numbers, so_far, BEST, marker="", width=1.5, steps=True)
        svg = scatter(
            [line, *_groups(trials, best, places)],
            x_label="trial",
            y_label=_axis(objective),
            y_limits=_focus(trials, best, places, 1),
        )
        charts.append(Chart(f"{trial_tables.title(objective)} of each trial", svg))
    note = f"Values of the chosen checkpoints, also of trials that were pruned. {AT_THE_EDGE}"
    return gather_charts(charts, note)


def _learning_curves(config: SearchConfig, trials: Sequence[Trial], best: Sequence[Trial]) -> list[Block]:
    """Each trial's value over steps, a figure for each objective."""
    longest = max((len(trial.scores) for trial in trials), default=0)
    marker = "." if longest <= MARKED_POINTS else ""
    first_rung = min(config.rungs, default=0)
    among = {state: [trial for trial in trials if trial.state == state] for state in COLOURS}
    charts = []
    for objective in config.objectives:
        groups = [
            Points(trial_tables.STATES[state], *_curves(among[state], objective), colour, marker, width=0.8)
            for state, colour in COLOURS.items()
        ]
        groups.append(Points(PAPERS, *_curves(trials[:1], objective), PAPER, marker, width=1.6))
        groups.append(Points(_name_of(best), *_curves(best, objective), BEST, marker, width=2.2))
        last = [max(trial.scores.items()) for trial in among["pruned"] if trial.scores]
        ends = [float(step) for step, _ in last], [objective.value(scores) for _, scores in last]
        groups.append(Points("", *ends, COLOURS["pruned"], "x"))
        # what comes before trials may be pruned is steep, and would leave little room for the rest
        at_first = [objective.value(trial.scores[first_rung]) for trial in trials if first_rung in trial.scores]
        at_end = [objective.value(trial_tables.chosen_scores(trial)) for trial in among["finished"]]
        svg = scatter(
            groups,
            x_label="step",
            y_label=_axis(objective),
            y_limits=_limits([*_inner(at_first), *_inner(at_end)]) if at_first else None,
            marks={"trials are pruned": config.rungs},
        )
        charts.append(Chart(f"{trial_tables.title(objective)} over steps", svg))
    return gather_charts(charts, "Values of each checkpoint. Crosses: where trials were pruned.")


def _importances(config: SearchConfig, study: Study) -> list[Block]:
    """How much each parameter matters, for the objectives for which that can be said."""
    titles = map(trial_tables.title, config.objectives)
    found = {title: parts for title, parts in zip(titles, study.importances(), strict=True) if parts}
    if not found:
        return []
    names = sorted(space.distributions(config), key=lambda name: -sum(parts[name] for parts in found.values()))
    svg = bars(
        [trial_tables.label(name) for name in names],
        {title: [parts[name] for name in names] for title, parts in found.items()},
        x_label="importance, in parts of 1",
    )
    note = (
        "By PED-ANOVA: how much each parameter decides whether a trial is among the best; trials that were stopped "
        "early count as worse than those that went further. Few trials say little. Scale weights count as they were "
        "drawn, before they are made to sum to 1."
    )
    return gather_charts([Chart("Importance of the parameters", svg)], note)


def _slices(config: SearchConfig, trials: Sequence[Trial], best: Sequence[Trial]) -> list[Block]:
    """Each objective over each searched setting."""
    placed = {trial.number: trial_tables.as_coordinates(config, trial.parameters) for trial in trials}
    valued = [trial for trial in trials if trial.values and placed[trial.number]]
    content: list[Block] = []
    for index, objective in enumerate(config.objectives):
        charts = []
        for name, limits in space.distributions(config).items():
            is_share = name in space.SHARES
            places = {
                trial.number: (placed[trial.number][name], trial.values[index]) for trial in valued if trial.values
            }
            svg = scatter(
                _groups(trials, best, places),
                x_label=trial_tables.label(name),
                y_label=_axis(objective),
                log_x=limits.log and not is_share,
                x_limits=(0.0, 1.0) if is_share else (limits.low, limits.high),
                y_limits=_focus(trials, best, places, 1),
            )
            charts.append(Chart(f"{trial_tables.title(objective)} by {trial_tables.label(name)}", svg))
        if found := gather_charts(charts):
            titles = [blocks.Heading(trial_tables.title(objective))] if len(config.objectives) > 1 else []
            content += [*titles, *found]
    return [blocks.Paragraph(f"Each point is a trial. {AT_THE_EDGE}", "note"), *content] if content else []


def _trade_offs(config: SearchConfig, trials: Sequence[Trial], best: Sequence[Trial]) -> list[Block]:
    """Finished trials by each pair of objectives; of a single objective, by PSNR and another metric."""
    finished = [trial for trial in trials if trial.state == "finished"]
    objectives = config.objectives
    if len(objectives) == 1:
        names = {name for trial in finished for name in trial_tables.chosen_scores(trial)}
        other = "lpips" if "lpips" in names else "ssim"
        objectives = (Goal.parse("psnr"), Goal.parse(other))
    charts = []
    for one, two in combinations(objectives, 2):
        needed = {*one.factors, *two.factors}
        places = {
            trial.number: (one.value(scores), two.value(scores))
            for trial in finished
            if needed <= (scores := trial_tables.chosen_scores(trial)).keys()
        }
        # with a third objective, trials of the front may be dominated in these two
        front = sorted(places[trial.number] for trial in best) if len(config.objectives) == 2 else []
        line = Points("", [x for x, _ in front], [y for _, y in front], BEST, marker="", width=1.2)
        svg = scatter(
            [line, *_groups(finished, best, places)],
            x_label=_axis(one),
            y_label=_axis(two),
            x_limits=_focus(finished, best, places, 0),
            y_limits=_focus(finished, best, places, 1),
        )
        charts.append(Chart(f"{trial_tables.title(one)} and {trial_tables.title(two)} of finished trials", svg))
    return gather_charts(charts, AT_THE_EDGE)


def _failed_trials(config: SearchConfig, trials: Sequence[Trial]) -> list[Block]:
    rows = trial_tables.failed_rows(config, trials)
    return [blocks.Table(["trial", "settings", "reason"], rows, "texts")] if rows else []


def _all_trials(config: SearchConfig, trials: Sequence[Trial]) -> list[Block]:
    if not trials:
        return []
    table = trial_tables.all_trials_table(config, trials)
    note = blocks.Paragraph(f"{table.heading}; a click on a column's head sorts by it", "note")
    return [note, blocks.Table(table.columns, table.rows, "sortable")]


def _settings(config: SearchConfig) -> dict[str, str]:
    """The settings of the search as they were resolved."""
    resolved = {
        "objectives": [f"{objective.direction} {objective.text}" for objective in config.objectives],
        "database": config.study_url,
    }
    values = config.search.model_dump(mode="json") | resolved
    return {name: run_summary.text(value) for name, value in values.items()} | {"rungs": run_summary.text(config.rungs)}


def _axis(objective: Goal) -> str:
    return f"{trial_tables.title(objective)}{' (lower is better)' * (objective.direction == 'minimize')}"


def _groups(trials: Sequence[Trial], best: Sequence[Trial], places: Places) -> list[Points]:
    """Those trials that have a place: by their state, and again the best and the paper's, which stand out."""
    members = {trial_tables.STATES[state]: [trial for trial in trials if trial.state == state] for state in COLOURS}
    looks = {trial_tables.STATES[state]: (colour, "o", state != "finished") for state, colour in COLOURS.items()}
    members |= {_name_of(best): list(best), PAPERS: [trial for trial in trials if trial.number == 0]}
    looks |= {_name_of(best): (BEST, "D", True), PAPERS: (PAPER, "*", False)}
    groups = []
    for name, among in members.items():
        shown = [places[trial.number] for trial in among if trial.number in places]
        groups.append(Points(name, [x for x, _ in shown], [y for _, y in shown], *looks[name]))
    return groups


def _curves(trials: Sequence[Trial], objective: Goal) -> tuple[list[float], list[float]]:
    """Values of the trials over steps as one line with gaps between the trials."""
    steps: list[float] = []
    values: list[float] = []
    for trial in trials:
        steps += [*map(float, trial.scores), math.nan]
        values += [*map(objective.value, trial.scores.values()), math.nan]
    return steps, values


def _focus(trials: Sequence[Trial], best: Sequence[Trial], places: Places, axis: int) -> Limits | None:
    """Ends of an axis that pruned trials don't stretch: it holds finished ones, the best and the paper's."""
    finished = [trial.number for trial in trials if trial.state == "finished"]
    usual = _inner([places[number][axis] for number in finished if number in places])
    needed = [places[number][axis] for number in (0, *(trial.number for trial in best)) if number in places]
    return _limits([*usual, *needed])


def _inner(values: Sequence[float]) -> list[float]:
    """Those within Tukey's fences."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return []
    low, high = np.quantile(known, [0.25, 0.75])
    return [value for value in known if low - FENCE * (high - low) <= value <= high + FENCE * (high - low)]


def _limits(values: Sequence[float]) -> Limits | None:
    """Ends of an axis for these values; with fewer than two different ones it is left to matplotlib."""
    known = [value for value in values if math.isfinite(value)]
    if len(set(known)) < 2:
        return None
    margin = MARGIN * (max(known) - min(known))
    return min(known) - margin, max(known) + margin


def _name_of(best: Sequence[Trial]) -> str:
    return f"best: trial {best[0].number}" if len(best) == 1 else "Pareto front"


def _duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"

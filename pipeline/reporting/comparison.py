"""The report of several runs beside each other, by arms and seeds."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from pipeline import storage
from pipeline.reporting import run_summary, tables
from pipeline.reporting.figures import Line
from pipeline.reporting.page import blocks
from pipeline.reporting.page.blocks import Block, Chart, View, gather_charts
from pipeline.reporting.page.render import render_page
from pipeline.reporting.run_summary import NOT_LOSSES, PANELS, PICTURED
from pipeline.reporting.text_table import TextTable
from pipeline.run import record
from pipeline.run.history import Run
from pipeline.run.scores import Table
from pipeline.settings.config import differences
from pipeline.settings.evaluation import SPLITS, Split

Arms = Mapping[str, Mapping[int, Run]]
NO_VALUES = pd.Series(dtype=float)
BANDS = "Lines: mean over an arm's seeds, at the steps that all of them have come to. Bands: lowest to highest seed."


def render(arms: Arms) -> str:
    """The report as HTML; ``ValueError`` when the runs' scores do not compare."""
    runs = _runs(arms)
    sections: dict[str, list[Block]] = {
        "Scores": [block for split in SPLITS for block in _score_tables(arms, split)],
        "What differs": _differing_settings(arms),
        "Scores over steps": gather_charts(_score_charts(arms), BANDS),
        "Training": gather_charts(_training_charts(arms), BANDS),
        "An image by each arm": _image_by_arm(arms),
        "Runs": [_table_of_runs(arms)],
    }
    count = f"{len(runs)} runs in {len(arms)} arm{'s' * (len(arms) > 1)}; the runs of one arm differ in the seed alone"
    reasons = {run.name: record.stop_reason(run.url) for run in runs}
    alarms = [blocks.Paragraph(f"{name} stopped: {reason}", "alarm") for name, reason in reasons.items() if reason]
    return render_page("Comparison of runs", [blocks.Paragraph(count, "state"), *alarms], sections)


def chosen_table(arms: Arms, split: Split) -> TextTable:
    """The arms' scores on a split by the chosen checkpoint of each run.

    Raises:
        ValueError: one of the runs has no scores on that split, or they do not compare.
    """
    for run in _runs(arms):
        if run_summary.scores_of_chosen(run, split).empty:
            raise ValueError(f"{run.url}: has no scores on the {split} split yet")
    weights = _weights(arms)
    rows = {run.url: run_summary.scores_of_chosen(run, split) for run in _runs(arms)}
    return tables.arms_table(_by_arm(arms, rows, weights), f"chosen checkpoints, {weights} weights")


def mean_of_newest(table: Table, count: int) -> Table:
    """Each image's scores averaged over the newest ``count`` checkpoints, as the rows of one checkpoint.

    An image that one of them could not score has no number, and the reason of one of them.
    """
    newest = table[table["step"].isin(sorted(table["step"].unique())[-count:])]
    groups = newest.groupby(["split", "data", "key", "method", "metric", "protocol"], sort=False)
    values = groups["value"].agg(lambda each: each.mean(skipna=False))
    others = groups[["checkpoint", "step", "reason", "lpips_sha256", "libraries", "device", "precision"]].first()
    return others.join(values).reset_index()


def _score_tables(arms: Arms, split: Split) -> list[Block]:
    """The arms' scores on one split: of the chosen checkpoints, and of each run's last ones."""
    runs = _runs(arms)
    missing = [run.name for run in runs if run_summary.scores_of_chosen(run, split).empty]
    if missing:
        said = split == "dev" or len(missing) < len(runs)
        return [blocks.Paragraph(f"No table of {split}: not scored on it yet: {', '.join(missing)}.", "note")] * said
    content: list[Block] = [blocks.Heading(f"Chosen checkpoints on the {split} split"), chosen_table(arms, split)]
    alike = {run.url: run_summary.comparable_scores(run, split) for run in runs}
    last = min([runs[0].config.evaluation.last, *(table["step"].nunique() for table in alike.values())])
    if last > 1:
        weights = _weights(arms)
        of = f"mean of the last {last} checkpoints"
        rows = _by_arm(arms, {url: mean_of_newest(table, last) for url, table in alike.items()}, weights)
        content.append(blocks.Heading(f"{of.capitalize()} on the {split} split"))
        content.append(tables.arms_table(rows, f"{of}, {weights} weights"))
    return content


def _differing_settings(arms: Arms) -> list[Block]:
    identities = {arm: next(iter(seeds.values())).identity for arm, seeds in arms.items()}
    reference, *others = identities.values()
    names = dict.fromkeys(name for other in others for name, _, _ in differences(reference, other) if name != "seed")
    rows = [[arm, *(run_summary.text(_at(identity, name)) for name in names)] for arm, identity in identities.items()]
    return [blocks.Table(["arm", *names], rows)] if names else []


def _score_charts(arms: Arms) -> list[Chart]:
    runs = [run for run in _runs(arms) if run.chosen is not None]
    if not runs:
        return []
    weights = _weights(arms)
    means = {run.url: run_summary.means_by_step(run_summary.comparable_scores(run, "dev")) for run in runs}
    columns = tables.shown_columns(pd.concat([run_summary.scores_of_chosen(run, "dev") for run in runs]))
    return [
        run_summary.chart(
            f"{run_summary.title(column)}, dev, {weights} weights", _lines(arms, means, (weights, *column))
        )
        for column in columns
    ]


def _training_charts(arms: Arms) -> list[Chart]:
    metrics = {run.url: run_summary.metrics_by_step(run) for run in _runs(arms)}
    names = list(dict.fromkeys(name for table in metrics.values() for name in table))
    losses = {name: "Loss" if name == "loss" else f"Loss term: {name}" for name in names if name not in NOT_LOSSES}
    panels = {name: panel for name, panel in PANELS.items() if name in names}
    return [
        run_summary.chart(title, _lines(arms, metrics, name), log=name in losses)
        for name, title in {**losses, **panels}.items()
    ]


def _image_by_arm(arms: Arms) -> list[Block]:
    """The worst image of the first run of which there is a picture by each arm."""
    first = _runs(arms)[0]
    shown = {arm: seeds.get(first.config.run.seed, next(iter(seeds.values()))) for arm, seeds in arms.items()}
    pictures = {arm: run.pictures(run.chosen, "dev") if run.chosen else {} for arm, run in shown.items()}
    order = run_summary.best_first(first, "dev")
    common = [key for key in order if all("enhanced" in pictures[arm].get(key, {}) for arm in arms)]
    if not common:
        return []
    key = common[-1]
    views = []
    for arm, run in shown.items():
        caption = run_summary.caption(run_summary.scores_of_chosen(run, "dev"), key, PICTURED)
        views.append(View(arm, caption, storage.read_bytes(pictures[arm][key]["enhanced"])))
    of_first = next(iter(pictures.values()))[key]
    views += [View(name, "", storage.read_bytes(of_first[name])) for name in ("low", "clean") if name in of_first]
    names = [view.name for view in views]
    note = (
        f"{key}: of the images pictured by each arm the worst of {first.name}, rank {order.index(key) + 1} of "
        f"{len(order)}; by the {PICTURED} of the chosen checkpoints of {', '.join(run.name for run in shown.values())}."
    )
    return [blocks.Paragraph(note, "note"), blocks.Comparison(key, views, names, [*names[1:], names[0]])]


def _table_of_runs(arms: Arms) -> blocks.Table:
    chosen = {run.url: run_summary.scores_of_chosen(run, "dev") for run in _runs(arms)}
    scored = [table for table in chosen.values() if len(table)]
    columns = tables.shown_columns(pd.concat(scored)) if scored else []
    rows = []
    for arm, seeds in arms.items():
        for seed, run in seeds.items():
            cells = run_summary.mean_texts(chosen[run.url], _weights(arms), columns)
            rows.append([run.name, arm, str(seed), run_summary.progress(run), run.chosen or "none", *cells])
    titles = [f"dev {title}" for title in tables.column_titles(columns)]
    return blocks.Table(["run", "arm", "seed", "progress", "chosen checkpoint", *titles], rows)


def _runs(arms: Arms) -> list[Run]:
    return [run for seeds in arms.values() for run in seeds.values()]


def _weights(arms: Arms) -> str:
    """The method that is compared: the one that ranks the first run's checkpoints."""
    return _runs(arms)[0].config.checkpoint.network


def _by_arm(arms: Arms, rows: Mapping[str, Table], method: str) -> dict[str, dict[int, Table]]:
    return {
        arm: {seed: rows[run.url][rows[run.url]["method"] == method] for seed, run in seeds.items()}
        for arm, seeds in arms.items()
    }


def _lines(arms: Arms, tables_: Mapping[str, pd.DataFrame], column: Any) -> list[Line]:
    """A line for each arm, from one column of its runs' tables by step."""
    lines = []
    for arm, seeds in arms.items():
        columns = [tables_[run.url].get(column, NO_VALUES) for run in seeds.values() if run.url in tables_]
        lines.append(Line.of_seeds(arm, columns))
    return lines


def _at(settings: Mapping[str, Any], name: str) -> Any:
    value: Any = settings
    for part in name.split("."):
        value = value[part]
    return value

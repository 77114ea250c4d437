"""The report of a run, or of several beside each other, as one HTML page that needs nothing but itself."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel

from pipeline import storage
from pipeline.reporting import comparison, run_summary, tables
from pipeline.reporting.figures import Line
from pipeline.reporting.page import blocks
from pipeline.reporting.page.blocks import Block, Chart, View, gather_charts
from pipeline.reporting.page.render import render_page
from pipeline.reporting.run_summary import NOT_LOSSES, PANELS, PICTURED
from pipeline.run import history, record, scores
from pipeline.run.history import Run
from pipeline.run.pictures import BRIGHTEST_ERROR, EXTREMES, VIEWS
from pipeline.run.scores import Table
from pipeline.settings.config import Config
from pipeline.settings.evaluation import SPLITS, Split

REPORT = "report.html"
METHODS = {"low": "input", "gamma": "gamma", "enhanced": PICTURED}  # whose scores stand below a view
TITLES = {"gamma": "gamma corrected"}
IMAGES_OVER_TRAINING, CHECKPOINTS_OVER_TRAINING = 3, 5


def write_report(runs: Sequence[Run], url: str) -> None:
    """Write the report of ``runs`` to the file ``url``."""
    storage.write_text(url, render_report(runs))


def render_report(runs: Sequence[Run]) -> str:
    """The report as HTML; pictures are read from the runs' storage.

    Raises:
        ValueError: the runs do not compare: they were scored on different data, or two have the same settings and seed.
    """
    return _render(runs[0]) if len(runs) == 1 else comparison.render(history.arms(runs))


def _render(run: Run) -> str:
    splits = [split for split in SPLITS if len(run_summary.scores_of_chosen(run, split))]
    sections: dict[str, list[Block]] = {
        "Scores": _score_tables(run, splits),
        "Images": [block for split in splits for block in _images(run, split)],
        "Scores over steps": gather_charts(_score_charts(run)),
        "Training": gather_charts(_training_charts(run)),
        "Images over training": _images_over_training(run),
        "Scores of each image": [_image_scores(run, split) for split in splits],
        "Settings": _settings(run.config),
        "Provenance": [blocks.Descriptions(_provenance(run))],
    }
    head = [blocks.Paragraph(run_summary.progress(run), "state")]
    if reason := record.stop_reason(run.url):
        head.append(blocks.Paragraph(f"Training stopped: {reason}", "alarm"))
    return render_page(run.name, head, sections)


def _score_tables(run: Run, splits: Sequence[Split]) -> list[Block]:
    if run.chosen is None:
        return [blocks.Paragraph("No checkpoint of this run has been scored yet.")]
    settings = run.config.checkpoint
    rows = run.scores[(run.scores["split"] == "dev") & (run.scores["data"] == run.data)]
    count, elsewhere = scores.rows_like_newest(rows)["checkpoint"].nunique(), rows["checkpoint"].nunique()
    metric = run_summary.metric_name(settings.metric)
    chosen = f"{run.chosen}, the best of {count} by the {metric} of its {settings.network} weights on the dev split."
    if elsewhere > count:
        chosen += f" {elsewhere - count} more were scored on another kind of device, before the run was moved."
    content: list[Block] = [blocks.Paragraph(chosen)]
    for split in splits:
        content += [blocks.Heading(f"On the {split} split"), tables.run_table(run, split)]
    return content


def _score_charts(run: Run) -> list[Chart]:
    """Scores on the development split over steps, a figure for each protocol and metric."""
    if run.chosen is None:
        return []
    chosen = run_summary.scores_of_chosen(run, "dev")
    means, of_chosen = run_summary.means_by_step(run_summary.comparable_scores(run, "dev")), scores.means(chosen)
    trained = [method for method in of_chosen.index if method not in scores.BASELINES]
    charts = []
    for column in tables.shown_columns(chosen):
        lines = [Line(method, means[method, *column]) for method in trained]
        levels = {name: float(of_chosen.at[name, column]) for name in scores.BASELINES if name in of_chosen.index}
        step = int(chosen["step"].iloc[0])
        charts.append(run_summary.chart(f"{run_summary.title(column)}, dev", lines, levels=levels, chosen=step))
    return charts


def _training_charts(run: Run) -> list[Chart]:
    metrics = run_summary.metrics_by_step(run)
    losses = [Line(name, metrics[name]) for name in metrics if name not in NOT_LOSSES]
    return [run_summary.chart("Loss and its terms", losses, log=True)] + [
        run_summary.chart(title, [Line(title, metrics[name])]) for name, title in PANELS.items() if name in metrics
    ]


def _images(run: Run, split: Split) -> list[Block]:
    """The chosen checkpoint's worst and best images among those with pictures, to be compared."""
    assert run.chosen is not None
    rows, pictures = run_summary.scores_of_chosen(run, split), run.pictures(run.chosen, split)
    order = run_summary.best_first(run, split)
    shown = [key for key in order if "enhanced" in pictures.get(key, {})]
    if not shown:
        return []
    metric = run_summary.metric_name(run.config.checkpoint.metric)
    note = (
        f"The worst images by {metric}, then the best, enhanced by the {PICTURED}. Drag the boundary or use arrow keys."
    )
    content: list[Block] = [blocks.Paragraph(note, "note")]
    for key in dict.fromkeys([*reversed(shown[-EXTREMES:]), *shown[:EXTREMES]]):
        content.append(blocks.Heading(f"{key}: rank {order.index(key) + 1} of {len(order)} on {split}"))
        content.append(_comparison_of_views(key, pictures[key], rows))
    return content


def _comparison_of_views(key: str, pictures: Mapping[str, str], rows: Table) -> blocks.Comparison:
    views = []
    for name in VIEWS:
        if name in pictures and name != "error":
            caption = run_summary.caption(rows, key, METHODS[name]) if name in METHODS else ""
            views.append(View(TITLES.get(name, name), caption, storage.read_bytes(pictures[name])))
    error = None
    if "error" in pictures:
        caption, ends = "mean absolute difference of enhanced and clean", ("0", f"{BRIGHTEST_ERROR} and more")
        error = View("error", caption, storage.read_bytes(pictures["error"]), ends)
    names = [view.name for view in views]
    left = [name for name in names if name != "clean"]
    right = [name for name in names if name in ("enhanced", "clean")]
    return blocks.Comparison(key, views, left, right, error)


def _images_over_training(run: Run) -> list[Block]:
    """What became of the same images: those that every checkpoint has pictures of, if it has any."""
    scored = run.scores[run.scores["split"] == "dev"].sort_values("step", kind="stable")["checkpoint"].unique()
    pictures = {name: run.pictures(name, "dev") for name in scored}
    pictures = {name: of_checkpoint for name, of_checkpoint in pictures.items() if of_checkpoint}
    if len(pictures) < 2:
        return []
    keys = sorted(set.intersection(*(set(of_checkpoint) for of_checkpoint in pictures.values())))
    places = np.linspace(0, len(pictures) - 1, min(len(pictures), CHECKPOINTS_OVER_TRAINING)).round().astype(int)
    names = [list(pictures)[place] for place in places]
    content: list[Block] = []
    for key in keys[:IMAGES_OVER_TRAINING]:
        views = []
        for name in names:
            if "enhanced" in pictures[name][key]:
                rows = run.scores_of(name, "dev")
                title = f"step {rows['step'].iloc[0]}{' (chosen)' * (name == run.chosen)}"
                picture = storage.read_bytes(pictures[name][key]["enhanced"])
                views.append(View(title, run_summary.caption(rows, key, PICTURED), picture))
        if "clean" in pictures[names[-1]][key]:
            views.append(View("clean", "", storage.read_bytes(pictures[names[-1]][key]["clean"])))
        content += [blocks.Heading(key), blocks.Strip(views)]
    return content


def _image_scores(run: Run, split: Split) -> blocks.Details:
    """All of the chosen checkpoint's numbers on a split: a row for each image, what was trained first."""
    rows = run_summary.scores_of_chosen(run, split)
    values = rows.set_index(["key", "method", "protocol", "metric"])["value"].unstack(["method", "protocol", "metric"])
    columns = tables.shown_columns(rows)
    methods = sorted(set(rows["method"]), key=lambda method: (method in scores.BASELINES, scores.METHODS.index(method)))
    shown = [(method, *column) for method in methods for column in columns]
    titles = [f"{method}\n{title}" for method in methods for title in tables.column_titles(columns)]
    cells = [
        [str(key), *(run_summary.number(of_image[name], name[-1]) for name in shown)]
        for key, of_image in values.iterrows()
    ]
    table = blocks.Table(["image", *titles], cells, "sortable")
    return blocks.Details(f"{run.chosen} on {split}, {len(cells)} images", [table])


def _settings(config: Config) -> list[Block]:
    changed = blocks.Table(["setting", "value", "default"], _changed(config), "texts")
    return [changed, blocks.Details("All settings", [blocks.Preformatted(config.to_yaml())])]


def _changed(settings: BaseModel, prefix: str = "") -> list[list[str]]:
    """The settings that are not at their defaults: dotted name, value, default."""
    found: list[list[str]] = []
    texts = settings.model_dump(mode="json")
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        if isinstance(value, BaseModel):
            found += _changed(value, f"{prefix}{name}.")
        elif value != field.default:  # a setting that must be given has none, so it is always shown
            default = "none" if field.is_required() else run_summary.text(field.default)
            found.append([f"{prefix}{name}", run_summary.text(texts[name]), default])
    return found


def _provenance(run: Run) -> dict[str, str]:
    lpips = run.scores[run.scores["lpips_sha256"].notna()]
    weights = sorted(set(lpips["protocol"] + " " + lpips["lpips_sha256"]))
    found = {
        "run": run.url,
        **{name: _lines(value) for name, value in run.provenance.items()},
        "LPIPS weights, SHA-256": _lines(weights),
        "scored by": _lines(sorted(run.scores["libraries"].dropna().unique())),
        "scored on": _lines(sorted((run.scores["device"] + ", " + run.scores["precision"]).dropna().unique())),
    }
    return {name: text for name, text in found.items() if text}


def _lines(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {version}" for name, version in value.items())
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)

"""What the reports of one run and of several have in common: texts, means and figures of a run."""

import json
from collections.abc import Sequence
from typing import Any

import pandas as pd

from pipeline.reporting import tables
from pipeline.reporting.figures import Line, draw
from pipeline.reporting.page.blocks import Chart
from pipeline.run import checkpoint, ranking, scores
from pipeline.run.history import Run
from pipeline.run.scores import Column, Table
from pipeline.settings.evaluation import Split

PICTURED = "student"  # the method whose pictures are kept
PANELS = {
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "ema_rate": "EMA rate of the teacher",
    "images_per_s": "Images per second",
    "skipped_pairs": "Broken pairs skipped",
}
NOT_LOSSES = {"step", "epoch", *PANELS}  # any other number of the training log is a term of the loss


def progress(run: Run) -> str:
    """How far the run has come."""
    steps = run.config.train.steps
    if (run.scores["checkpoint"] == checkpoint.name_at(steps)).any():
        return f"finished: {steps} steps"
    logged = [int(record["step"]) for record in run.metrics]
    return f"step {max([0, *logged, *run.scores['step']])} of {steps}"


def metrics_by_step(run: Run) -> pd.DataFrame:
    """The training log; where a step was done twice, after a restart, the later record counts."""
    if not run.metrics:
        return pd.DataFrame()
    table = pd.DataFrame(run.metrics).drop_duplicates("step", keep="last").set_index("step").sort_index()
    return table.select_dtypes("number").astype(float)


def scores_of_chosen(run: Run, split: Split) -> Table:
    """The chosen checkpoint's scores; empty when none is chosen, or it has not been scored on that split."""
    return run.scores_of(run.chosen or "", split)


def comparable_scores(run: Run, split: Split) -> Table:
    """All checkpoints' scores on a split as far as they compare with those of the chosen one."""
    return scores.comparable_rows(run.scores[run.scores["split"] == split], scores_of_chosen(run, split))


def means_by_step(table: Table) -> pd.DataFrame:
    """Means over the images: a row for each step, a column for each (method, protocol, metric)."""
    groups = table.groupby(["step", "method", "protocol", "metric"])["value"]
    means = groups.agg(lambda values: values.mean(skipna=False))
    return means.unstack(["method", "protocol", "metric"]).sort_index()


def best_first(run: Run, split: Split) -> list[str]:
    """The images by the chosen checkpoint's scores that rank it; those without a number come last."""
    values = ranking.score_of_images(scores_of_chosen(run, split), run.config)
    return list(values.sort_values(ascending=not run.config.checkpoint.higher_is_better, kind="stable").index)


def mean_texts(table: Table, method: str, columns: Sequence[Column]) -> list[str]:
    """The means of a checkpoint's scores by one method, one for each of the columns."""
    means = scores.means(table) if len(table) else pd.DataFrame()
    known = [method in means.index and column in means for column in columns]
    return [
        number(means.at[method, column] if is_known else float("nan"), column[1])
        for column, is_known in zip(columns, known, strict=True)
    ]


def caption(table: Table, key: str, method: str) -> str:
    """One image's scores by one method."""
    columns = tables.shown_columns(table)
    texts = mean_texts(table[table["key"] == key], method, columns)
    named = (f"{title} {value}" for title, value in zip(tables.column_titles(columns), texts, strict=True))
    return ", ".join(each.replace(" ", "\N{NO-BREAK SPACE}") for each in named)


def number(value: float, metric: str) -> str:
    """A score with as many digits as its metric has."""
    return format(value, tables.FORMATS[metric][1])


def metric_name(metric: str) -> str:
    """A metric's name without its unit."""
    return tables.FORMATS[metric][0].split()[0]


def title(column: Column) -> str:
    """A figure's title."""
    return f"{tables.FORMATS[column[1]][0]} ({column[0]})"


def chart(caption: str, lines: Sequence[Line], **options: Any) -> Chart:
    """A figure of the lines, with the options of ``figures.draw``."""
    return Chart(caption, draw(lines, **options))


def text(value: Any) -> str:
    """A setting as text."""
    return value if isinstance(value, str) else json.dumps(value, default=str)

"""Scores as tables, for the terminal and the report alike, each under a line that says what its numbers are."""

from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np
import pandas as pd

from pipeline.reporting.intervals import LEVEL, Difference, differences_to_first
from pipeline.reporting.text_table import TextTable
from pipeline.run import scores
from pipeline.run.history import Run
from pipeline.run.scores import Column, Table
from pipeline.settings.evaluation import Split

FORMATS = {"psnr": ("PSNR dB", ".2f"), "ssim": ("SSIM", ".4f"), "lpips": ("LPIPS", ".4f")}
LPIPS_DIGITS = 8  # of the weights' checksum
NAMES_SHOWN = 5


class Cell(str):
    """A cell's text that also knows, unrounded, what numbers it shows and what they are of."""

    of: Mapping[str, str]
    numbers: Mapping[str, float]

    def __new__(cls, text: str, of: Mapping[str, str], **numbers: float) -> Self:
        """The text, with what it is of (method, protocol, metric) and its numbers by name."""
        cell = super().__new__(cls, text)
        cell.of, cell.numbers = of, numbers
        return cell


def checkpoint_table(table: Table, split: Table | None = None, last: int = 0) -> TextTable:
    """The scores of one checkpoint on one split, a row for each method.

    Args:
        table: the checkpoint's rows.
        split: the rows of all the run's checkpoints on that split; below each trained method stands the mean of the
            newest ones, since the chosen checkpoint's own scores are biased upwards.
        last: how many of the newest.
    """
    values, columns = scores.means(table), shown_columns(table)
    newest = scores.means_of_newest(split, table, last) if split is not None else []
    rows = []
    for method, row in values.iterrows():
        rows.append([str(method), *_cells(row, columns)])
        if len(newest) > 1 and method not in scores.BASELINES:
            mean = sum(each.loc[method] for each in newest) / len(newest)
            rows.append([f"  mean of last {len(newest)}", *_cells(mean, columns)])
    return TextTable(heading(table), ["method", *column_titles(columns)], rows, notes(table))


def candidates_table(candidates: Mapping[str, Table]) -> TextTable:
    """Several candidates on the same images, and each one's paired difference to the first.

    Args:
        candidates: rows of one method and split for each candidate, by the name to show.

    Raises:
        ValueError: their data, images or protocols differ.
    """
    first = next(iter(candidates.values()))
    for name, other in candidates.items():
        _check_comparable(name, first, other)
    together = pd.concat(candidates.values())
    columns = shown_columns(together)
    rows = [[name, *_cells(scores.means(table).iloc[0], columns)] for name, table in candidates.items()]
    alone = {name: {0: table} for name, table in candidates.items()}
    found = {column: _differences(alone, column) for column in columns}
    for name in list(candidates)[1:]:
        rows.append([f"{name} - reference", *(_difference(found[column][name], column) for column in columns)])
    missing = dict.fromkeys(note for table in candidates.values() for note in notes(table))
    how = [_how(each) for each in list(found.values())[:1] if each]
    return TextTable(heading(together, checkpoint=False), ["", *column_titles(columns)], rows, [*missing, *how])


def run_table(run: Run, split: Split) -> TextTable:
    """The chosen checkpoint's scores beside the mean of the last ones; ``ValueError`` when there are none."""
    if run.chosen is None:
        raise ValueError(f"{run.url}: no checkpoint could be scored; the reasons are in the output above")
    rows = run.scores_of(run.chosen, split)
    if rows.empty:
        raise ValueError(f"{run.url}: {run.chosen} has not been scored on the {split} split")
    return checkpoint_table(rows, run.scores[run.scores["split"] == split], run.config.evaluation.last)


def arms_table(arms: Mapping[str, Mapping[int, Table]], of: str) -> TextTable:
    """Mean and standard deviation over seeds of each arm, and its paired difference to the first arm.

    Args:
        arms: for each arm and seed the rows of one run, of one method and split.
        of: what the rows are the scores of, for the heading.

    Raises:
        ValueError: their data, images or protocols differ.
    """
    runs = [table for tables in arms.values() for table in tables.values()]
    for name, tables in arms.items():
        for table in tables.values():
            _check_comparable(name, runs[0], table)
    together = pd.concat(runs)
    columns = shown_columns(together)
    found = {column: _differences(arms, column) for column in columns}
    rows = []
    for name, tables in arms.items():
        cells = [str(len(tables))]
        for column in columns:
            difference = found[column].get(name)
            cells += [_mean_and_deviation(tables, column), _difference(difference, column) if difference else ""]
        rows.append([name, *cells])
    titles = [title for name in column_titles(columns) for title in (name, "difference to reference")]
    how = ["mean ± standard deviation over seeds", *(_how(each) for each in list(found.values())[:1] if each)]
    head = f"{of}, {heading(together, checkpoint=False)}"
    return TextTable(head, ["arm", "seeds", *titles], rows, [*notes(together), "; ".join(how)])


def heading(table: Table, *, checkpoint: bool = True) -> str:
    """What the numbers of a table are: checkpoint, split, protocols, LPIPS weights, number of images."""
    first = table.iloc[0]
    protocols = ", ".join(dict.fromkeys(table.loc[table["metric"] != "lpips", "protocol"]))
    parts = [f"checkpoint: {first['checkpoint']}"] if checkpoint else []
    parts += [f"split: {first['split']}", f"protocol: {protocols}"]
    lpips = table[(table["metric"] == "lpips") & table["lpips_sha256"].notna()]
    for backbone, checksum in dict(zip(lpips["protocol"], lpips["lpips_sha256"], strict=True)).items():
        parts.append(f"LPIPS: {backbone} (weights {checksum[:LPIPS_DIGITS]})")
    devices = sorted(set(table["device"].dropna()) - {"cpu"})
    parts += [f"scored on: {', '.join(devices)}"] if devices else []
    return ", ".join([*parts, f"{table['key'].nunique()} images"])


def notes(table: Table) -> list[str]:
    """Why numbers are missing, if any are: one line for each reason."""
    missing = table[table["reason"].notna()]
    lines = []
    for (metric, reason), rows in missing.groupby(["metric", "reason"], sort=False):
        keys = list(dict.fromkeys(rows["key"]))
        whole = len(keys) == table["key"].nunique()
        where = "" if whole else f" for {', '.join(keys[:NAMES_SHOWN])}{' ...' if len(keys) > NAMES_SHOWN else ''}"
        lines.append(f"{FORMATS[metric][0].split()[0]} left out{where}: {reason}")
    return lines


def shown_columns(table: Table) -> list[Column]:
    """The columns of ``scores.means`` in which there is anything to show: LPIPS without weights has none."""
    values = scores.means(table)
    present = table.groupby(["protocol", "metric"])["reason"].agg(lambda reasons: reasons.isna().any())
    return [column for column in values.columns if present[column]]


def column_titles(columns: Sequence[Column]) -> list[str]:
    """A title for each column, which names its protocol, or its backbone, where there are several."""
    names = {lpips: {name for name, metric in columns if (metric == "lpips") == lpips} for lpips in (False, True)}
    return [
        f"{name} {FORMATS[metric][0]}" if len(names[metric == "lpips"]) > 1 else FORMATS[metric][0]
        for name, metric in columns
    ]


def _cells(values: pd.Series, columns: Sequence[Column]) -> list[Cell]:
    cells = []
    for protocol, metric in columns:
        mean = float(values.get((protocol, metric), float("nan")))
        of = {"method": str(values.name), "protocol": protocol, "metric": metric}
        cells.append(Cell(format(mean, FORMATS[metric][1]), of, mean=mean))
    return cells


def _differences(arms: Mapping[str, Mapping[int, Table]], column: Column) -> dict[str, Difference]:
    """The arms' differences to the first, their values paired by seed and image."""
    return differences_to_first(
        {
            name: {seed: _by_image(table, column).sort_index().to_numpy() for seed, table in tables.items()}
            for name, tables in arms.items()
        }
    )


def _by_image(table: Table, column: Column) -> pd.Series:
    rows = table[(table["protocol"] == column[0]) & (table["metric"] == column[1])]
    return rows.set_index("key")["value"]


def _difference(difference: Difference, column: Column) -> Cell:
    protocol, metric = column
    style = "+" + FORMATS[metric][1]
    mean, low, high = (format(value, style) for value in (difference.mean, difference.low, difference.high))
    text = mean if np.isnan(difference.low) else f"{mean} [{low}, {high}]"
    of = {"protocol": protocol, "metric": metric}
    return Cell(text, of, mean=difference.mean, low=difference.low, high=difference.high)


def _how(differences: Mapping[str, Difference]) -> str:
    """What the differences of a column are."""
    seeds = {difference.seeds for difference in differences.values()}
    over = "images" if seeds == {1} else "seeds and images"
    together = f", which holds for all {len(differences)} of a column together" if len(differences) > 1 else ""
    single = "; one seed says nothing of others" if 1 in seeds else ""
    return f"differences: mean [{LEVEL:.0%} t interval over {over}{together}]{single}"


def _mean_and_deviation(tables: Mapping[int, Table], column: Column) -> str:
    style = FORMATS[column[1]][1]
    values = np.array([_by_image(table, column).mean(skipna=False) for table in tables.values()])
    deviation = f" ± {values.std(ddof=1):{style}}" if len(values) > 1 else ""
    return f"{values.mean():{style}}{deviation}"


def _check_comparable(name: str, first: Table, other: Table) -> None:
    for column, what in (("data", "data set"), ("split", "split"), ("key", "images")):
        if set(first[column]) != set(other[column]):
            raise ValueError(f"{name}: was scored on another {what} than the first; score both on the same one")
    if set(zip(first["protocol"], first["metric"], strict=True)) != set(
        zip(other["protocol"], other["metric"], strict=True)
    ):
        raise ValueError(f"{name}: was scored by other protocols than the first; score both by the same ones")
    if conditions := set(scores.conditions_of(other)) - set(scores.conditions_of(first)):
        raise ValueError(
            f"{name}: was scored in {', '.join(conditions)}, unlike the first; score both on one kind of device, as "
            "pipeline/evaluate.py --compare does"
        )
    weights = pd.concat([first, other])[["protocol", "lpips_sha256"]].dropna().drop_duplicates()
    if weights["protocol"].duplicated().any():
        raise ValueError(f"{name}: its LPIPS is by other weights than the first one's; score both by the same ones")

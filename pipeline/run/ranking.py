"""Which of a run's checkpoints is the best, by its scores on the development split."""

import pandas as pd

from pipeline.run import scores
from pipeline.run.scores import Table
from pipeline.settings.config import Config


def rank_checkpoints(table: Table, config: Config) -> list[str]:
    """Names of the checkpoints scored on the development split, best first; of equal ones the newest first.

    The rows are those of one data set, since scores on others may lie beside some checkpoints. Those that were not
    scored on the kind of device that the newest one was, before the run was moved, are left out. A checkpoint whose
    score is not a number, such as one with an image that could not be scored, comes last.
    """
    rows = scores.rows_like_newest(_ranking_rows(table[table["split"] == "dev"], config))
    values = rows.groupby(["checkpoint", "step"])["value"].agg(lambda values: values.mean(skipna=False))
    best_first = sorted(values.items(), key=lambda item: (config.checkpoint.sort_key(item[1], item[0][1]), item[0]))
    return [name for (name, _), _ in best_first]


def score_of_images(table: Table, config: Config) -> pd.Series:
    """Of one checkpoint's scores those that rank it, by image."""
    return _ranking_rows(table, config).set_index("key")["value"]


def _ranking_rows(table: Table, config: Config) -> Table:
    settings = config.checkpoint
    protocol = config.evaluation.lpips if settings.metric == "lpips" else config.evaluation.protocols[0]
    wanted = {"method": settings.network, "metric": settings.metric, "protocol": protocol}
    return table[(table[list(wanted)] == pd.Series(wanted)).all(axis=1)]

"""A table of scores as JSON: each number that is printed, unrounded, with all that it is a score of."""

import json
import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from pipeline.reporting.tables import Cell
from pipeline.reporting.text_table import TextTable
from pipeline.run.scores import Table

EQUAL = "infinite: images are equal to their clean ones"
ALONE = "a single image has no interval"


def as_json(printed: TextTable, scored: Mapping[str, Table]) -> str:
    """The printed table as JSON.

    ``numbers`` is a list with an entry for each cell: the row it stands in, what it is of, and its ``mean``; of a
    paired difference also the ends of its interval, ``low`` and ``high``. A number that is not finite is null, and
    ``reason`` says why.

    Args:
        printed: what was printed.
        scored: the rows that it was made of, by the name of what was scored.
    """
    together = pd.concat(scored.values())
    lpips = together[(together["metric"] == "lpips") & together["lpips_sha256"].notna()]
    document = {
        "checkpoints": {name: table["checkpoint"].iloc[0] for name, table in scored.items()},
        "split": together["split"].iloc[0],
        "data_sha256": together["data"].iloc[0],
        "images": together["key"].nunique(),
        "lpips_sha256": dict(zip(lpips["protocol"], lpips["lpips_sha256"], strict=True)),
        "numbers": [
            _number(row[0].strip(), cell, together) for row in printed.rows for cell in row if isinstance(cell, Cell)
        ],
        "notes": list(printed.notes),
    }
    return json.dumps(document, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def _number(row: str, cell: Cell, scored: Table) -> dict[str, Any]:
    finite = {name: value if math.isfinite(value) else None for name, value in cell.numbers.items()}
    return {"row": row, **cell.of, **finite} | ({"reason": _reason(cell, scored)} if None in finite.values() else {})


def _reason(cell: Cell, scored: Table) -> str:
    """Why a number is not finite: images that are equal, one image alone, or the reasons of those that have none."""
    if not math.isnan(cell.numbers["mean"]):
        return ALONE if math.isfinite(cell.numbers["mean"]) else EQUAL
    rows = scored[scored["reason"].notna()]
    for name, value in cell.of.items():
        rows = rows[rows[name] == value]
    return "; ".join(dict.fromkeys(f"{key}: {reason}" for key, reason in zip(rows["key"], rows["reason"], strict=True)))

"""The table of scores: one row for each number, with all that must be known to compare it with another.

<run>/checkpoint-00001000/scores-dev.parquet   a checkpoint's rows, written once all of them are known
<run>/scores.parquet                           all rows of the run, put together from those

Columns:
    checkpoint, step   what was scored; of pictures and of weights without state.json the folder's name, and step 0
    split, data        on which images: ``train``, ``dev`` or ``test``, and the SHA-256 of the data set's manifest
    key                which of them
    method             ``input``, ``gamma`` (one exponent for all), ``student``, ``averaged``, or ``images``
    metric, protocol   ``psnr`` in dB or ``ssim`` by a protocol of ``iaml.score``; ``lpips`` by a backbone
    value              the number; not finite where ``reason`` says why there is none
    reason             why the image could not be scored, else null
    lpips_sha256       checksum of the backbone's weights, for LPIPS
    libraries          versions of what computed it
    device, precision  where and how it was computed: ``cpu`` or the GPU's name; ``float32``
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeAlias

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.run.checkpoint import step_of
from pipeline.settings.evaluation import SPLITS, Split
from pipeline.terminal import log_once

TABLE, UNREADABLE = "scores.parquet", ".unreadable"
SCHEMA = pa.schema(
    [
        *[pa.field(name, pa.string()) for name in ("checkpoint", "split", "data", "key", "method", "metric")],
        *[
            pa.field(name, pa.string())
            for name in ("protocol", "reason", "lpips_sha256", "libraries", "device", "precision")
        ],
        pa.field("step", pa.int64()),
        pa.field("value", pa.float64()),
    ]
)
METHODS = ("input", "gamma", "student", "averaged", "images")  # in the order of tables
BASELINES = ("input", "gamma")  # the same for every checkpoint

Table: TypeAlias = pd.DataFrame
Column = tuple[str, str]  # a column of means: protocol and metric


def scores_file(split: Split) -> str:
    """Name of the file beside a checkpoint that holds its scores on ``split``."""
    return f"scores-{split}.parquet"


def to_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The table of such rows; columns that a row lacks are null."""
    return pa.Table.from_pylist(list(rows), schema=SCHEMA).to_pandas(use_threads=False)


def write(url: str, table: Table) -> None:
    """Write a table of scores as Parquet, whole or not at all."""
    sink = pa.BufferOutputStream()
    whole = pa.Table.from_pandas(table, schema=SCHEMA, preserve_index=False)
    pq.write_table(whole, sink, compression="zstd", write_page_checksum=True)
    storage.write_bytes(url, sink.getvalue().to_pybytes())


def read(url: str) -> Table:
    """Read a table of scores; ``ValueError`` when it is none, or damaged."""
    data = storage.read_bytes(url)
    try:
        file = pq.ParquetFile(pa.BufferReader(data), pre_buffer=False, page_checksum_verification=True)
        missing = [name for name in SCHEMA.names if name not in file.schema_arrow.names]
        if missing:  # which reading would pass over
            raise pa.ArrowKeyError(f"without {', '.join(missing)}")
        table = file.read(columns=SCHEMA.names, use_threads=False).cast(SCHEMA)
        return table.to_pandas(use_threads=False, ignore_metadata=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{url}: is not a table of scores ({error}); score the checkpoint again") from error


def read_or_empty(url: str) -> Table:
    """The rows in a file of scores; none where there is no such file, or where it is damaged, as is said then."""
    try:
        return read(url)
    except FileNotFoundError:
        return to_table([])
    except ValueError as error:
        log_once(f"ignored as if not scored: {error}")
        return to_table([])


def store(url: str, table: Table) -> Table:
    """Add rows to a file of scores, in the place of older ones of the same kind; returns all rows of their data.

    A file that can't be read is kept beside it, since another version may have written it.
    """
    before = read_or_empty(url)
    if before.empty and storage.exists(url):
        storage.write_bytes(f"{url}{UNREADABLE}", storage.read_bytes(url))
    rows = pd.concat([before, table], ignore_index=True)
    kind = ["data", "key", "method", "metric", "protocol"]
    rows = rows.drop_duplicates(kind, keep="last", ignore_index=True)
    write(url, rows)
    return rows[rows["data"].isin(table["data"])].reset_index(drop=True)


def read_run(run: str) -> Table:
    """All scores of a run's checkpoints, not of copies of them, oldest first; empty when none has been scored."""
    folders = [storage.join(run, name) for name in storage.listdir(run) if step_of(name) is not None]
    wanted = {scores_file(split) for split in SPLITS}
    urls = [storage.join(folder, name) for folder in folders for name in storage.listdir(folder) if name in wanted]
    return pd.concat(map(read_or_empty, urls), ignore_index=True) if urls else to_table([])


def rebuild_run_table(run: str) -> Table:
    """Write all scores of a run's checkpoints as its one table, and return it."""
    table = read_run(run)
    write(storage.join(run, TABLE), table)
    return table


def conditions_of(table: Table) -> pd.Series:
    """What each row was computed in, such as ``float32 on gpu``; rows of other conditions are not compared."""
    return (table["precision"] + " on " + table["device"].where(table["device"] == "cpu", "gpu")).fillna("unknown")


def rows_like_newest(table: Table) -> Table:
    """Of one split's rows those that were computed in the conditions of the newest checkpoint's."""
    newest = conditions_of(table[table["step"] == table["step"].max()])
    return table[conditions_of(table).isin(newest)]


def covers(
    table: Table, keys: Collection[str], columns: Collection[Column], lpips_sha256: str | None, conditions: str
) -> bool:
    """Whether a checkpoint's rows hold all these columns for all these images and methods.

    LPIPS counts by these weights alone, and all counts as it was computed in these conditions.
    """
    good = table[table["reason"].isna() & (conditions_of(table) == conditions)]
    good = good[(good["metric"] != "lpips") | (good["lpips_sha256"] == lpips_sha256)]
    images = good[good["key"].isin(keys)].groupby(["method", "protocol", "metric"])["key"].nunique()
    wanted = [(method, *column) for method in table["method"].unique() for column in columns]
    return bool(wanted) and all(images.get(each, 0) == len(keys) for each in wanted)


def means(table: Table) -> Table:
    """Means over the images: a row for each method, a column for each (protocol, metric), LPIPS last.

    A mean over a subset of the images would be biased, so it is NaN where one is missing.
    """
    groups = table.groupby(["method", "protocol", "metric"], sort=False)["value"]
    wide = groups.agg(lambda values: values.mean(skipna=False)).unstack(["protocol", "metric"], sort=False)
    columns = sorted(wide.columns, key=lambda column: column[1] == "lpips")
    return wide.reindex(index=[method for method in METHODS if method in wide.index], columns=columns)


def headline_rows(table: Table, protocol: str) -> Table:
    """The rows by one protocol, and those of LPIPS: a number for each metric."""
    return table[(table["protocol"] == protocol) | (table["metric"] == "lpips")]


def comparable_rows(table: Table, like: Table) -> Table:
    """Of one split's rows those of checkpoints that were scored as ``like`` was, by the same columns."""
    rows = table.merge(like[["data", "protocol", "metric"]].drop_duplicates())
    each = [of_checkpoint for _, of_checkpoint in rows.groupby("step") if _kind(of_checkpoint) == _kind(like)]
    return pd.concat(each, ignore_index=True) if each else rows.iloc[:0]


def means_of_newest(split: Table, like: Table, count: int) -> list[Table]:
    """``means`` of each of the newest ``count`` checkpoints in ``split`` that were scored as ``like`` was."""
    return [means(table) for _, table in list(comparable_rows(split, like).groupby("step"))[-count:]]  # oldest first


def _kind(table: Table) -> set[tuple[str, ...]]:
    """What a checkpoint was scored by; images without a number, which may lack the rest, say nothing of it."""
    good = table[table["reason"].isna()].fillna({"lpips_sha256": ""}).assign(conditions=conditions_of)
    names = ("method", "protocol", "metric", "lpips_sha256", "conditions")
    return set(zip(*(good[name] for name in names), strict=True))

"""The tables of data sets without shards, and settings of runs on them."""

from dataclasses import replace
from pathlib import Path

from pipeline.data.manifest import PairRecord, ShardRecord, write_manifest
from pipeline.settings.config import Config

PAIR = PairRecord(
    "train-0", "train-000000.tar", 512, 9, 2048, 9, 48, 32, 0.1, 0.5, "a" * 64, "0" * 64, "0" * 16, "0" * 16,
    "scene", "train",
)  # fmt: skip


def data_set(folder: Path, **clean: str) -> str:
    """URL of the tables of a data set whose pairs bear the keys ``train_0``...; values name their clean images."""
    pairs = [
        replace(PAIR, key=key.replace("_", "-"), split=key.split("_")[0], high_sha256=image * 64)
        for key, image in clean.items()
    ]
    splits = sorted({pair.split for pair in pairs})
    write_manifest(
        str(folder), [ShardRecord(f"{split}-000000.tar", split, 1, 1, "0" * 64, 1) for split in splits], pairs
    )
    for split in splits:
        (folder / f"{split}-000000.tar").touch()
    return str(folder)


def config(
    url: str, *extra: str, runs: Path | str = "/nowhere", data: dict[str, object] | None = None, **train: object
) -> Config:
    return Config.model_validate(
        {
            "run": {"name": "r", "root": str(runs)},
            "data": {"url": url, "extra_urls": extra} | (data or {}),
            "train": {"steps": 4} | train,
        }
    )

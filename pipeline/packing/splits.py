"""The cut of pairs into scenes and splits, and of splits into shards: a function of the images and the settings alone.

Pairs of one scene, by a name in their keys or by clean images that look alike, stay on one side of a cut.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.data.manifest import SPLITS
from pipeline.packing.pairing import PairPaths
from pipeline.settings.packing import PackSettings
from pipeline.terminal import bullet_list


@dataclass(frozen=True)
class CheckedPair:
    """A pair whose pixels could be read, and what the manifest says of them."""

    pair: PairPaths
    width: int
    height: int
    low_luminance: float
    high_luminance: float
    low_phash: str
    high_phash: str
    unoriented: tuple[Path, ...]


@dataclass(frozen=True)
class Plan:
    """Which scene and split each key belongs to, and which pairs lie in which shard."""

    scenes: Mapping[str, str]
    splits: Mapping[str, str]
    shards: Mapping[str, Sequence[CheckedPair]]


def plan_shards(checked: Sequence[CheckedPair], settings: PackSettings) -> Plan:
    """Decide scene, split and shard of every pair: a pure function of the images and the settings."""
    names = _scene_names([one.pair.key for one in checked], settings.scene_pattern)
    scenes = group_scenes(checked, names, settings.near_duplicate_bits)
    dev_scenes = choose_dev_scenes([one.pair for one in checked], scenes, settings.dev_fraction, settings.seed)
    splits = {one.pair.key: "dev" if scenes[one.pair.key] in dev_scenes else one.pair.split for one in checked}
    shards: dict[str, Sequence[CheckedPair]] = {}
    for split in SPLITS:
        members = [one for one in checked if splits[one.pair.key] == split]
        count = -(-len(members) // settings.shard_pairs)
        for index in range(count):
            start, end = (len(members) * edge // count for edge in (index, index + 1))
            shards[f"{split}-{index:06d}.tar"] = members[start:end]
    return Plan(scenes, splits, shards)


def group_scenes(checked: Sequence[CheckedPair], names: Sequence[str | None], bits: int) -> dict[str, str]:
    """The scene of each key: pairs of one name or with near-duplicate clean images, and all they lead to.

    A scene is called after the first of its keys.
    """
    parent = list(range(len(checked)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = index = parent[parent[index]]
        return index

    def join(one: int, two: int) -> None:
        first, second = sorted((root(one), root(two)))
        parent[second] = first

    hashes = np.array([int(one.high_phash, 16) for one in checked], dtype=np.uint64)
    first_of_name: dict[str, int] = {}
    for index, name in enumerate(names):
        if name is not None:
            join(first_of_name.setdefault(name, index), index)
        for near in np.flatnonzero(np.bitwise_count(hashes[:index] ^ hashes[index]) <= bits):
            join(int(near), index)
    return {one.pair.key: checked[root(index)].pair.key for index, one in enumerate(checked)}


def choose_dev_scenes(pairs: Sequence[PairPaths], scenes: Mapping[str, str], fraction: float, seed: int) -> set[str]:
    """Whole training scenes that hold about ``fraction`` of the training pairs, at least one of two.

    Scenes that the test split shows too are left to training: a development score on them would say
    nothing about new scenes.
    """
    training = Counter(scenes[pair.key] for pair in pairs if pair.split == "train")
    free = training.keys() - {scenes[pair.key] for pair in pairs if pair.split == "test"}
    if fraction == 0 or len(training) < 2 or not free:
        return set()
    wanted = fraction * training.total()
    chosen: set[str] = set()
    # By hash and not by a generator: the choice stays the same whatever the version of numpy.
    for scene in sorted(free, key=lambda scene: hashlib.sha256(f"{seed}/{scene}".encode()).digest()):
        if sum(training[one] for one in chosen) + training[scene] <= wanted:
            chosen.add(scene)
    return chosen or {min(free, key=lambda scene: (training[scene], scene))}


def explain_missing_dev_split(plan: Plan, counts: Mapping[str, int], settings: PackSettings) -> str | None:
    """Why training pairs were not cut into a development split, though they should; none where they were."""
    if settings.dev_fraction == 0 or not counts["train"] or counts["dev"]:
        return None
    scenes = {plan.scenes[key] for key, split in plan.splits.items() if split == "train"}
    why = "are one scene" if len(scenes) == 1 else "all show scenes of the test split"
    return (
        f"the {counts['train']} training pairs {why}. Name their scenes with --scene-pattern, lower "
        f"--near-duplicate-bits (now {settings.near_duplicate_bits}) if they only look alike, or add more scenes"
    )


def _scene_names(keys: Sequence[str], pattern: str | None) -> list[str | None]:
    if pattern is None:
        return [None] * len(keys)
    matches = [re.search(pattern, key) for key in keys]
    missed = [key for key, match in zip(keys, matches, strict=True) if match is None or match[1] is None]
    if missed:
        raise ValueError(f"scene_pattern {pattern!r} finds no scene in {len(missed)} keys:\n{bullet_list(missed)}")
    return [match[1] for match in matches if match is not None]

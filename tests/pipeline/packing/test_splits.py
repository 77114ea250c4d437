"""The cut of pairs into scenes, splits and shards."""

from collections import Counter
from pathlib import Path

import pytest
from pydantic import ValidationError
from source_pairs import add_pair, all_pairs, settings

from pipeline.data.manifest import load_manifest
from pipeline.packing.shard_writer import pack
from pipeline.settings.packing import PackSettings

REAL_PAIRS = Path(__file__).parents[4] / "shared/data/lol-v1-part"


@pytest.mark.parametrize("shard_pairs", [1, 5, 8, 100])
def test_shards_are_full_but_even(shard_pairs: int, source: Path) -> None:
    report = pack(settings(source, shard_pairs=shard_pairs))
    records = all_pairs(report.url)
    for split in ("train", "dev", "test"):
        sizes = Counter(record.shard for record in records if record.split == split).values()
        assert max(sizes) <= shard_pairs
        assert max(sizes) - min(sizes) <= 1
        assert len(sizes) == report.shards[split] == -(-report.pairs[split] // shard_pairs)


def test_scenes_never_straddle_training_and_development(source: Path) -> None:
    chosen = set()
    for seed in range(4):
        report = pack(settings(source, out=str(source.parent / f"out{seed}"), dev_fraction=0.2, seed=seed))
        manifest = load_manifest(report.url)
        assert report.scenes == 13
        assert report.pairs == {"train": 16, "dev": 4, "test": 3}
        dev_numbers = {int(record.key.removeprefix("train-")) // 2 for record in manifest.pairs("dev")}
        train_numbers = {int(record.key.removeprefix("train-")) // 2 for record in manifest.pairs("train")}
        assert not dev_numbers & train_numbers
        chosen.add(frozenset(dev_numbers))
    assert len(chosen) > 1


def test_a_small_fraction_still_holds_out_a_scene_and_zero_none(source: Path) -> None:
    assert pack(settings(source, dev_fraction=0.01)).pairs["dev"] == 2
    assert pack(settings(source, dev_fraction=0, out=str(source.parent / "none"))).pairs["dev"] == 0


def test_a_single_scene_is_not_cut_and_the_report_says_what_helps(tmp_path: Path) -> None:
    for number in range(4):
        add_pair(tmp_path / "set", "train", f"{number}.png", seed=1)
    report = pack(settings(tmp_path / "set"))
    assert report.pairs == {"train": 4, "dev": 0, "test": 0}
    assert "WARNING: no development split" in str(report)
    for help_ in ("the 4 training pairs are one scene", "--scene-pattern", "--near-duplicate-bits (now 8)", "add more"):
        assert help_ in str(report)


def test_training_scenes_that_are_all_tested_give_no_development_split_and_it_is_said(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for number in range(3):
            add_pair(tmp_path / "set", split, f"{number}.png", seed=number)
    report = pack(settings(tmp_path / "set"))
    assert report.pairs == {"train": 3, "dev": 0, "test": 3}
    assert "the 3 training pairs all show scenes of the test split" in str(report)


def test_whoever_wants_no_development_split_or_has_no_training_pairs_is_told_nothing(tmp_path: Path) -> None:
    add_pair(tmp_path / "set", "train", "1.png", seed=1)
    add_pair(tmp_path / "eval15", "", "1.png", seed=1)
    for source, changes in ((tmp_path / "set", {"dev_fraction": 0}), (tmp_path / "eval15", {})):
        assert "no development split" not in str(
            pack(settings(source, out=str(tmp_path / source.name / "out"), **changes))
        )


def test_a_pattern_names_scenes(tmp_path: Path) -> None:
    for number in range(6):
        add_pair(tmp_path / "set", "", f"s{number // 3}_{number}.png", seed=number)
    report = pack(settings(tmp_path / "set", scene_pattern=r"s(\d+)_"))
    scenes = {record.key: record.scene for record in all_pairs(report.url)}
    assert scenes == {f"train-s{n // 3}_{n}": f"train-s{n // 3}_{n // 3 * 3}" for n in range(6)}
    with pytest.raises(ValueError, match=r"finds no scene in 6 keys:\n  train-s0_0"):
        pack(settings(tmp_path / "set", out=str(tmp_path / "other"), scene_pattern="frame(.)"))
    for wrong, message in (("no group", "has no group"), ("(", "is not a regular expression")):
        with pytest.raises(ValidationError, match=message):
            settings(tmp_path / "set", scene_pattern=wrong)


def test_test_scenes_among_the_training_pairs_are_reported_and_stay(source: Path) -> None:
    add_pair(source, "our485", "900.png", seed=101, noise=4)
    report = pack(settings(source))
    assert report.near_duplicates == (("train-900", "test-1"),)
    splits = {record.key: record.split for record in all_pairs(report.url)}
    assert (splits["train-900"], splits["test-1"]) == ("train", "test")
    assert "WARNING: 1 training pairs show a scene of the test split:\n  train-900 and test-1" in str(report)


@pytest.mark.skipif(not REAL_PAIRS.is_dir(), reason="the real pairs of LOL-v1 are not here")
def test_real_scenes_stay_together(tmp_path: Path) -> None:
    report = pack(PackSettings(source=REAL_PAIRS, out=str(tmp_path / "out")))
    scenes = {record.key: record.scene for record in all_pairs(report.url)}
    assert len({scenes[f"train-{number}"] for number in (43, 44, 45, 46)}) == 1
    assert scenes["train-43"] != scenes["train-47"]
    assert scenes["train-2"] != scenes["train-5"]

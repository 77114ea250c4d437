"""What is checked before anything starts: data sets, held-out images, and the run that is to be continued."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from s3 import S3Server, forget_clients

from pipeline import storage
from pipeline.data.manifest import PairRecord, ShardRecord, write_manifest
from pipeline.launch import trainer
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
            "run": {"name": "r", "storage": str(runs)},
            "data": {"url": url, "extra_urls": extra} | (data or {}),
            "train": {"steps": 4} | train,
        }
    )


def test_all_data_sets_are_loaded_the_first_one_first(tmp_path: Path) -> None:
    one = data_set(tmp_path / "one", train_0="1", dev_0="2")
    two = data_set(tmp_path / "two", train_0="3")
    assert [manifest.url for manifest in trainer.check_data(config(one, two))] == [one, two]
    with pytest.raises(ValueError, match=r"two: split 'dev' holds no pairs"):
        trainer.check_data(config(two, one))


def test_a_data_set_without_training_pairs_is_refused(tmp_path: Path) -> None:
    one = data_set(tmp_path / "one", train_0="1", dev_0="2")
    two = data_set(tmp_path / "two", test_0="3")
    with pytest.raises(ValueError, match=r"two: split 'train' holds no pairs"):
        trainer.check_data(config(one, two))


def test_held_out_images_among_the_training_ones_are_refused(tmp_path: Path) -> None:
    url = data_set(tmp_path, train_0="1", train_1="2", train_2="3", dev_0="4", dev_1="3", test_0="2", test_1="5")
    with pytest.raises(ValueError) as error:
        trainer.check_data(config(url))
    assert str(error.value) == (
        f"{url}: 2 held-out images are training images as well: dev-1 (dev) is train-2, test-0 (test) is train-1; "
        "pack again without them"
    )


@pytest.mark.parametrize("held_out_in_the_first", [True, False])
def test_held_out_images_may_be_training_images_of_no_data_set(held_out_in_the_first: bool, tmp_path: Path) -> None:
    held_out = data_set(tmp_path / "held-out", train_0="1", dev_0="2", test_5="6")
    trained = data_set(tmp_path / "trained", train_0="3", train_1="6", dev_0="5")
    urls = (held_out, trained) if held_out_in_the_first else (trained, held_out)
    with pytest.raises(ValueError, match=rf"^{held_out}: 1 .* images of {trained}: test-5 \(test\) is train-1;"):
        trainer.check_data(config(*urls))


def test_a_run_is_continued_with_its_own_settings_and_data_alone(tmp_path: Path) -> None:
    one = data_set(tmp_path / "one", train_0="1", dev_0="2")
    two = data_set(tmp_path / "two", train_0="3", dev_0="4")
    runs = tmp_path / "runs"
    first = config(one, two, runs=runs)

    def provenance(settings: Config) -> dict[str, object]:
        return trainer.provenance_of(trainer.check_data(settings))

    trainer.check_run(first, provenance(first))
    trainer.claim(first, provenance(first))
    stored = json.loads((runs / "r/provenance.json").read_text())
    assert stored["data"] == [one, two]
    assert [len(checksum) for checksum in stored["manifest_sha256"]] == [64, 64]

    trainer.check_run(first, provenance(first))
    longer, swapped, fewer = config(one, two, runs=runs, steps=5), config(two, one, runs=runs), config(one, runs=runs)
    with pytest.raises(ValueError, match=r"other settings or data.*\n  train.steps: 4 before, 5 now$"):
        trainer.check_run(longer, provenance(longer))
    for other in (swapped, fewer):
        with pytest.raises(ValueError, match=r"data: manifest \w{12}, \w{12} before, \w{12}.* now$"):
            trainer.check_run(other, provenance(other))


def test_data_sets_may_move(tmp_path: Path) -> None:
    one = data_set(tmp_path / "one", train_0="1", dev_0="2")
    runs = tmp_path / "runs"
    before = config(one, runs=runs)
    trainer.claim(before, trainer.provenance_of(trainer.check_data(before)))
    Path(one).rename(tmp_path / "moved")
    after = config(str(tmp_path / "moved"), runs=runs)
    trainer.check_run(after, trainer.provenance_of(trainer.check_data(after)))


@pytest.mark.parametrize("door", ["write_bytes", "exists"])
def test_storage_that_refuses_is_a_plain_error(door: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url: str, *_: object, **__: object) -> None:
        raise PermissionError(f"{url}: access denied")

    monkeypatch.setattr(storage, door, refuse)
    monkeypatch.setattr(storage, "delete", lambda url: None)
    with pytest.raises(ValueError, match=rf"{tmp_path}/r: .*access denied"):
        trainer.check_run(config("/data", runs=tmp_path), {})


def test_a_wrong_bucket_key_or_secret_is_a_plain_error(
    s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = s3.make_bucket()
    for url, reason in (("s3://nothing-here/set", "no such bucket"), (f"{bucket}/set", "there is no manifest")):
        with pytest.raises(ValueError, match=rf"^{url}/manifest.parquet: .*{reason}"):
            trainer.check_data(config(url))
    with pytest.raises(ValueError, match=r"^s3://nothing-here/r: .*no such bucket"):
        trainer.check_run(config("/data", runs="s3://nothing-here"), {})
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    forget_clients()
    with pytest.raises(ValueError, match=rf"^{bucket}/set/manifest.parquet: cannot be read .*AWS_SECRET_ACCESS_KEY"):
        trainer.check_data(config(f"{bucket}/set"))

"""What a run's folder says of the run: a run is resumed with its own settings and data alone."""

import json
from pathlib import Path

import pytest
from tables import config, data_set

from pipeline import storage
from pipeline.launch import preflight
from pipeline.launch.provenance import collect_provenance
from pipeline.run import record
from pipeline.settings.config import Config


def test_a_run_is_continued_with_its_own_settings_and_data_alone(tmp_path: Path) -> None:
    one = data_set(tmp_path / "one", train_0="1", dev_0="2")
    two = data_set(tmp_path / "two", train_0="3", dev_0="4")
    runs = tmp_path / "runs"
    first = config(one, two, runs=runs)

    def provenance(settings: Config) -> dict[str, object]:
        return collect_provenance(preflight.check_data(settings))

    record.check_run(first, provenance(first))
    record.claim(first, provenance(first))
    stored = json.loads((runs / "r/provenance.json").read_text())
    assert stored["data"] == [one, two]
    assert [len(checksum) for checksum in stored["manifest_sha256"]] == [64, 64]

    record.check_run(first, provenance(first))
    longer, swapped, fewer = config(one, two, runs=runs, steps=5), config(two, one, runs=runs), config(one, runs=runs)
    with pytest.raises(ValueError, match=r"other settings or data.*\n  train.steps: 4 before, 5 now$"):
        record.check_run(longer, provenance(longer))
    for other in (swapped, fewer):
        with pytest.raises(ValueError, match=r"data: manifest \w{12}, \w{12} before, \w{12}.* now$"):
            record.check_run(other, provenance(other))


def test_data_sets_may_move(tmp_path: Path) -> None:
    one = data_set(tmp_path / "one", train_0="1", dev_0="2")
    runs = tmp_path / "runs"
    before = config(one, runs=runs)
    record.claim(before, collect_provenance(preflight.check_data(before)))
    Path(one).rename(tmp_path / "moved")
    after = config(str(tmp_path / "moved"), runs=runs)
    record.check_run(after, collect_provenance(preflight.check_data(after)))


@pytest.mark.parametrize("door", ["write_bytes", "exists"])
def test_storage_that_refuses_is_a_plain_error(door: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(url: str, *_: object, **__: object) -> None:
        raise PermissionError(f"{url}: access denied")

    monkeypatch.setattr(storage, door, refuse)
    monkeypatch.setattr(storage, "delete", lambda url: None)
    with pytest.raises(ValueError, match=rf"{tmp_path}/r: .*access denied"):
        record.check_run(config("/data", runs=tmp_path), {})

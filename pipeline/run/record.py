"""What a run's folder says of the whole run: its settings and provenance, its metrics, and why it gave up.

<run>/settings.yaml     the resolved settings; whoever stores them has taken the run's name
<run>/provenance.json   git hash, manifest checksums, library versions
<run>/metrics.jsonl     one record for each logged step
<run>/stopped.txt       why the run gave up, if it did
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pipeline import storage
from pipeline.run import checkpoint
from pipeline.run.checkpoint import PROVENANCE, SETTINGS
from pipeline.settings.config import Config, differences
from pipeline.settings.files import read_settings
from pipeline.terminal import log_once

METRICS, EVENTS, STOPPED = "metrics.jsonl", "tensorboard", "stopped.txt"
RAY_SNAPSHOT = "checkpoint_manager_snapshot.json"  # Ray Train's list of a run's checkpoints, of which all must be there


def check_run(config: Config, provenance: dict[str, Any]) -> None:
    """Check that the run's storage can be used, and that a run of this name is the one to resume.

    Raises:
        ValueError: a run of this name has other settings or data, or its storage can't be read or written to.
    """
    url = config.run.url
    storage.check_writable(url)
    try:
        if storage.exists(storage.join(url, SETTINGS)):
            _refuse_another_run(config, provenance, url)
    except OSError as error:
        raise ValueError(f"{url}: cannot be read ({error})") from error


def claim(config: Config, provenance: dict[str, Any]) -> None:
    """Take the run's name by storing settings and provenance, unless they are there and the run is resumed."""
    url = config.run.url
    known = storage.join(url, SETTINGS)
    if storage.exists(known):
        _refuse_another_run(config, provenance, url)  # it may have begun since it was checked
        for stale in (STOPPED, RAY_SNAPSHOT):
            storage.delete(storage.join(url, stale))
        return
    storage.write_text(storage.join(url, PROVENANCE), json.dumps(provenance, indent=2))
    storage.write_text(known, config.to_yaml())


def stop(run: str, reason: str) -> None:
    """Store why a run gives up, since workers that are started again would come to the same end."""
    storage.write_text(storage.join(run, STOPPED), reason)


@contextmanager
def stop_on_value_error(run: str) -> Iterator[None]:
    """Within, a ``ValueError``, which is for the user to settle, is stored as why the run gives up."""
    try:
        yield
    except ValueError as error:
        stop(run, " ".join(str(error).split()))
        raise


def stop_reason(run: str) -> str:
    """Why a run gave up; empty where it didn't."""
    url = storage.join(run, STOPPED)
    return storage.read_text(url).strip() if storage.exists(url) else ""


def read_provenance(run: str) -> dict[str, Any]:
    """What a run's weights come from besides its settings; where its own file is damaged, by a checkpoint's copy.

    Empty where none can be read.
    """
    own = [name for name in storage.listdir(run) if checkpoint.step_of(name) is not None]
    for url in (storage.join(run, *name, PROVENANCE) for name in ((), *((name,) for name in own))):
        try:
            found = json.loads(storage.read_bytes(url))
            if data_of(found):
                return dict(found)
            reason = "lacks manifest_sha256"
        except FileNotFoundError:
            reason = "is missing"
        except ValueError as error:
            reason = f"can't be read ({error})"
        log_once(f"{url}: {reason}; ignored")
    return {}


def data_of(provenance: Any) -> str | None:
    """SHA-256 of the manifest of the first data set that a provenance names; none where it names none."""
    match provenance:
        case {"manifest_sha256": [str(checksum), *_]}:
            return checksum
    return None


def read_metrics(run: str) -> list[dict[str, Any]]:
    """The records of a run so far, oldest first; lines that can't be read are ignored, as is logged."""
    url = storage.join(run, METRICS)
    if not storage.exists(url):
        return []
    lines = storage.read_bytes(url).splitlines()
    records = [_record(line) for line in lines]
    damaged = [number for number, record in enumerate(records, 1) if record is None]
    if damaged:
        log_once(f"{url}: ignored {len(damaged)} of {len(lines)} lines that can't be read, the first is {damaged[0]}")
    return [record for record in records if record is not None]


def _refuse_another_run(config: Config, provenance: dict[str, Any], url: str) -> None:
    before = Config.model_validate(read_settings(storage.join(url, SETTINGS)))
    found = [f"{name}: {old} before, {new} now" for name, old, new in differences(before.identity(), config.identity())]
    known = read_provenance(url)
    checksums = known.get("manifest_sha256", [])
    if checksums != provenance["manifest_sha256"]:
        shown = (
            ", ".join(one[:12] for one in several) or "unknown"
            for several in (checksums, provenance["manifest_sha256"])
        )
        found.append("data: manifest {} before, {} now".format(*shown))
    starts = [each.get("start_from", {}).get("sha256", {}) for each in (known, provenance)]
    if starts[0] != starts[1]:
        shown = (", ".join(one[:12] for one in each.values()) or "nothing" for each in starts)
        found.append("run.start_from: weights {} before, {} now".format(*shown))
    if found:
        others = f", and --run.start-from {url} to begin with its weights" if before.network == config.network else ""
        raise ValueError(
            f"{url}: a run of this name exists with other settings or data; choose another run.name{others}\n  "
            + "\n  ".join(found)
        )


def _record(line: bytes) -> dict[str, Any] | None:
    """The record in a line: numbers by name, one of them ``step``; none where it is damaged."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    is_whole = isinstance(record, dict) and all(isinstance(value, int | float) for value in record.values())
    return record if is_whole and isinstance(record.get("step"), int) else None

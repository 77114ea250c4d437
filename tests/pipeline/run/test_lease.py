"""The lease of a run: of several processes one trains it, on disk and on S3; who died or fell silent is replaced."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from s3 import S3Server

from pipeline import storage
from pipeline.run import lease

ROOT = Path(__file__).parents[3]
HEARTBEAT_S = 0.3
HOLD = """
import sys, time
from pipeline.run import lease
lease.HEARTBEAT_S, lease.POLL_S = map(float, sys.argv[2:])
try:
    with lease.hold(sys.argv[1]) as id:
        print("HELD", id, flush=True)
        time.sleep(60)
except ValueError as error:
    print(error, flush=True)
    sys.exit(2)
"""


@pytest.fixture(params=["disk", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of a run."""
    if request.param == "disk":
        return str(tmp_path / "run")
    server: S3Server = request.getfixturevalue("s3")
    return f"{server.make_bucket()}/run"


@pytest.fixture(autouse=True)
def _short_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "HEARTBEAT_S", HEARTBEAT_S)
    monkeypatch.setattr(lease, "POLL_S", HEARTBEAT_S / 3)


def start(run: str) -> "subprocess.Popen[str]":
    """A process that holds the lease, or says why it doesn't."""
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, run, str(HEARTBEAT_S), str(HEARTBEAT_S / 3)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )


def line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout
    return process.stdout.readline()


def write_holder(run: str, **changes: Any) -> None:
    """A lease of a process on another machine, which does not beat."""
    fields = vars(lease.Holder.this_process()) | {"host": "node7", "user": "anna", "machine": "another"} | changes
    storage.write_text(storage.join(run, lease.LEASE), json.dumps(fields))


def test_a_second_process_is_told_who_trains_the_run_and_since_when(run: str) -> None:
    first = start(run)
    held = line(first).split()[1]
    holder = json.loads(storage.read_text(storage.join(run, lease.LEASE)))
    with pytest.raises(ValueError) as refusal, lease.hold(run):
        pass
    assert re.fullmatch(
        rf"{run}: process {first.pid} of {holder['user']} on {holder['host']} has trained this run since "
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d[+-]\d\d:\d\d; wait for it, stop it, or choose another run.name",
        str(refusal.value),
    )
    lease.check(run, held)
    with pytest.raises(lease.LeaseLostError, match=f"process {first.pid} of"):
        lease.check(run, "another id")
    first.send_signal(signal.SIGINT)
    first.wait(20)
    assert storage.listdir(run) == []
    with lease.hold(run):
        assert storage.listdir(run) == [lease.LEASE]


def test_one_of_many_that_start_at_the_same_moment_gets_it(run: str) -> None:
    processes = [start(run) for _ in range(3)]
    said = [
        next(text for text in iter(lambda p=process: line(p), "") if "waiting" not in text) for process in processes
    ]
    assert sum(text.startswith("HELD") for text in said) == 1, said
    assert sum("has trained this run since" in text for text in said) == 2
    for process in processes:
        process.kill()


def test_a_killed_process_of_this_machine_is_replaced_at_once(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    first = start(run)
    line(first)
    first.kill()  # and not waited for: a container may have nobody who does
    while (Path(f"/proc/{first.pid}/stat").read_text().rpartition(")")[2].split()[0]) != "Z":
        time.sleep(0.01)
    with lease.hold(run):
        assert capsys.readouterr().out == ""
    first.wait()


def test_a_process_of_another_machine_is_replaced_when_it_has_been_silent(
    run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_holder(run, since="2026-11-25 12:01:33+00:00", pid=4711)
    began = time.monotonic()
    with lease.hold(run):
        assert time.monotonic() - began >= lease.BEATS * HEARTBEAT_S
    told = capsys.readouterr().out
    assert told == (
        f"{run}: process 4711 of anna on node7 has trained this run since 2026-11-25 12:01:33+00:00; "
        "waiting up to 1 s for a sign of it\n"
    )


def test_a_process_whose_number_another_one_has_by_now_is_gone() -> None:
    holder = lease.Holder.this_process()
    assert not holder.is_gone()
    assert lease.replace(holder, started="1").is_gone()
    assert not lease.replace(holder, started="1", machine="another").is_gone()


def test_who_finds_the_lease_taken_stops_and_leaves_it_alone(run: str) -> None:
    first = start(run)
    line(first)
    write_holder(run, since="2026-11-25 12:01:33+00:00", pid=4711)
    assert line(first) == (
        f"{run}: process 4711 of anna on node7 has trained this run since 2026-11-25 12:01:33+00:00 and took it over "
        "from this process, which missed its heartbeats\n"
    )
    assert first.wait(20) == 2
    assert json.loads(storage.read_text(storage.join(run, lease.LEASE)))["host"] == "node7"


def test_a_lease_that_is_deleted_or_spoilt_is_written_again(run: str) -> None:
    where = storage.join(run, lease.LEASE)
    storage.write_text(where, "{")  # half of one
    with lease.hold(run) as held:
        for spoil in (lambda: storage.delete(where), lambda: storage.write_text(where, "")):
            spoil()
            deadline = time.monotonic() + 20
            while not (found := storage.read_version(where)) or not found[0] or json.loads(found[0])["id"] != held:
                assert time.monotonic() < deadline
                time.sleep(HEARTBEAT_S / 3)


def test_conditional_writes(run: str) -> None:
    url = storage.join(run, "file")
    assert storage.read_version(url) is None
    assert storage.write_if(url, b"one", "some version") is None
    first = storage.write_if(url, b"one", None)
    assert first and storage.read_version(url) == (b"one", first)
    assert storage.write_if(url, b"two", None) is None
    second = storage.write_if(url, b"two", first)
    assert second and storage.write_if(url, b"three", first) is None
    assert storage.read_version(url) == (b"two", second)
    assert storage.listdir(run) == ["file"]

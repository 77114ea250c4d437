"""What a command says comes to the terminal, in a stable form; all else is in its log."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
from terminals import Terminal

from pipeline import storage, terminal

PRINTS = """
import logging, os, sys, warnings
from pipeline import terminal
terminal.log("before")
with terminal.session({log!r}):
    print("a library's line")
    os.write(2, b"a line of a library in another language\\n")
    warnings.warn("of the future", FutureWarning)
    logging.warning("a warning")
    terminal.log("said")
    {body}
terminal.log("after")
"""


def run(body: str, log: str | None) -> subprocess.CompletedProcess[str]:
    code = PRINTS.format(log=log, body=body)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_what_is_said_comes_to_the_terminal_and_all_else_to_the_log(tmp_path):
    log = tmp_path / "run/log.txt"
    done = run("pass", str(log))
    assert (done.returncode, done.stdout, done.stderr) == (0, "before\nsaid\nafter\n", "")
    assert run("pass", str(log)).stdout == done.stdout
    text = log.read_text()
    for line in (
        "a library's line",
        "a line of a library in another language",
        "of the future",
        "a warning",
        " said\n",
    ):
        assert text.count(line) == 2, "a log is continued"


@pytest.mark.parametrize("with_log", [True, False])
def test_what_fails_names_the_log_which_has_its_traceback(tmp_path, with_log):
    done = run("sys.exit('training stopped: bad data')", str(tmp_path / "log.txt") if with_log else None)
    assert (done.returncode, done.stdout) == (1, "before\nsaid\n")
    assert done.stderr.startswith("training stopped: bad data\ndetails: ") and done.stderr.count("\n") == 2
    log = Path(done.stderr.split()[-1])
    assert "Traceback" in log.read_text() and "a library's line" in log.read_text()
    if not with_log:
        log.unlink()


def test_a_status_that_was_asked_for_is_no_failure():
    done = run("sys.exit(75)", None)
    assert (done.returncode, done.stdout, done.stderr) == (75, "before\nsaid\n", "")


def test_a_log_on_s3_is_continued(s3):
    url = f"{s3.make_bucket()}/run/log.txt"
    for line in ("one", "two"):
        with terminal.session(url):
            terminal.log(line)
    assert [line.split()[-1] for line in storage.read_text(url).splitlines()] == ["one", "two"]


def test_progress_is_one_line_on_a_terminal():
    code = """
from pipeline import terminal
with terminal.session(None):
    terminal.log("step 1/3  loss 0.5  grad_norm 1", live="step 1/3  loss 0.5")
    terminal.log("checkpoint-1 scored: 20", score="student PSNR 20 (checkpoint 1)")
    terminal.log("step 2/3  loss 0.4  grad_norm 1", live="step 2/3  loss 0.4")
    list(terminal.bar(range(3), title="scoring", total=3, unit="image"))
terminal.log("table")
"""
    user = Terminal({"PYTHONPATH": ":".join(sys.path), "TERM": "xterm"}, "-c", code)
    assert user.end() == 0
    first, second, third, *_ = [part for part in user.shown.split("\r\x1b[2K") if part]
    last = "last score: student PSNR 20 (checkpoint 1)"
    assert first == "step 1/3  loss 0.5"
    assert second == f"checkpoint-1 scored: 20\nstep 1/3  loss 0.5  {last}"
    assert third.startswith(f"step 2/3  loss 0.4  {last}")
    assert "grad_norm" not in user.shown and user.shown.endswith("table\n")


def test_bars_are_lines_where_nobody_watches(monkeypatch):
    errors = io.StringIO()
    monkeypatch.setattr(sys, "stderr", errors)
    assert list(terminal.bar(range(5), title="checking", total=5, unit="pair")) == list(range(5))
    assert errors.getvalue() == "checking: 0/5 pair\nchecking: 5/5 pair\n"

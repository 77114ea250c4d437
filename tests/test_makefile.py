"""What make deletes: what the demo made, and nothing that a user has beside it."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from commands import ROOT

STRANGERS = ["demo/notes.txt", "demo/photographs/mine.png", "demo/runs/mine/settings.yaml", "demo/shards/mine.tar"]
MADE = ["demo/shards/train-000000.tar", "demo/shards/pairs.parquet", "demo/runs/demo/settings.yaml"]
# writes a file where it is told to; packing writes its manifest
PYTHON = """#!/bin/sh
while [ "$1" != --out ]; do shift; done
mkdir -p "$2" && touch "$2/manifest.parquet" && echo "$2" >> written
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder with the Makefile, a Python of its own and a user's files."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("requirements.lock", "pyproject.toml", *STRANGERS):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    (tmp_path / ".venv/.ready").touch()
    return tmp_path


def make(clone: Path, target: str) -> None:
    subprocess.run(["make", "--silent", target], cwd=clone, env={**os.environ, "TMPDIR": str(clone)}, check=True)


def files(clone: Path) -> set[str]:
    return {str(path.relative_to(clone)) for path in (clone / "demo").rglob("*") if path.is_file()}


def test_the_demo_leaves_a_users_files_and_nothing_of_its_own_elsewhere(clone: Path) -> None:
    before = set(clone.iterdir())
    make(clone, "demo/shards/manifest.parquet")
    assert files(clone) == {*STRANGERS, "demo/shards/manifest.parquet"}
    written = Path(clone / "written").read_text().splitlines()
    assert len(written) == 3 and written[-1] == "demo/shards"
    assert set(clone.iterdir()) - before == {clone / "written"}  # its temporary folder is gone


def test_clean_deletes_what_the_demo_made_alone(clone: Path) -> None:
    for name in MADE:
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).touch()
    make(clone, "clean")
    assert files(clone) == set(STRANGERS)
    for name in STRANGERS:
        (clone / name).unlink()
    (clone / "demo/photographs").rmdir()
    (clone / "demo/runs/mine").rmdir()
    make(clone, "clean")
    assert not (clone / "demo").exists()

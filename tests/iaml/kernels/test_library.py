"""The kernels' library: compiled once, for this machine, and done without where that fails."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT

from iaml import kernels

COUNT = """
import subprocess
run, compiled = subprocess.run, []
def count(command, **options):
    compiled.extend(["it"] if "-shared" in command else [])
    return run(command, **options)
subprocess.run = count
from iaml import kernels
print(len(compiled), repr(kernels.problem()), len(compiled))
"""
SCORE = """
import torch
from iaml import AutoEncoder, NetworkSettings, TeacherStudent, kernels
torch.manual_seed(0)
loss = TeacherStudent(NetworkSettings(width=1 / 16))(torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64))["loss"]
loss.backward()
print(kernels.problem() or "kernels", float(loss.detach()), sep=chr(10))
"""


def run(code: str, **variables: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT), **variables}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    return done.stdout.splitlines()


@pytest.mark.skipif(bool(kernels.problem()), reason=f"no kernels: {kernels.problem()}")
def test_it_is_compiled_once_and_kept(tmp_path: Path) -> None:
    assert run(COUNT, XDG_CACHE_HOME=str(tmp_path)) == ["0 '' 1"]
    assert run(COUNT, XDG_CACHE_HOME=str(tmp_path)) == ["0 '' 0"]
    names = [path.name for path in (tmp_path / "iaml").iterdir()]
    assert len(names) == 2 and "kernels.lock" in names, names


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("no-such-compiler", "there is no C++ compiler (no-such-compiler)"), ("false", "false fails: status 1")],
)
def test_without_a_compiler_torchs_operators_do_the_same(tmp_path: Path, compiler: str, reason: str) -> None:
    without = run(SCORE, CXX=compiler, XDG_CACHE_HOME=str(tmp_path))
    with_kernels = run(SCORE)
    assert without[0] == reason
    assert float(without[1]) == pytest.approx(float(with_kernels[1]), rel=1e-5)


def test_a_cache_that_cannot_be_written_is_a_reason(tmp_path: Path) -> None:
    (tmp_path / "iaml").write_text("")
    (line,) = run("from iaml import kernels; print(kernels.problem())", XDG_CACHE_HOME=str(tmp_path))
    assert "iaml" in line and "exist" in line.lower()

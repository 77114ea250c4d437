"""Each command's --help ends with examples, which do as they stand."""

import importlib.util
import shlex
import sys
from types import ModuleType

import pytest
from commands import ROOT

from pipeline import ablate, darken, demo_photographs, evaluate, pack, report, train
from pipeline.launch import ablation
from tune import search


class ReachedError(Exception):
    """The command has taken its options and begins its work."""


def reach(*_: object, **__: object) -> None:
    raise ReachedError


WORK = {
    "pipeline/train.py": (train, train, "run dry_run"),
    "tune/search.py": (search, search, "check"),
    "pipeline/evaluate.py": (evaluate, evaluate.Candidate, "find"),
    "pipeline/pack.py": (pack, pack, "pack"),
    "pipeline/darken.py": (darken, darken, "darken_folder"),
    "pipeline/demo_photographs.py": (demo_photographs, demo_photographs, "export_photographs"),
    "pipeline/ablate.py": (ablate, ablation, "configs_of"),
    "pipeline/report.py": (report, report.Run, "load"),
}


def script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.replace("/", "_"), ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def examples(module, path, monkeypatch, capsys):
    """The arguments of the examples with which a command's help ends."""
    monkeypatch.setattr(sys, "argv", [path, "--help"])
    with pytest.raises(SystemExit) as exit:
        module.main()
    assert exit.value.code == 0
    text = capsys.readouterr().out.partition("\nexamples:\n")[2].replace("\\\n", " ")
    lines = [shlex.split(line) for line in text.splitlines()]
    assert all(line[:2] == ["python", path] for line in lines)
    return [line[2:] for line in lines]


@pytest.mark.parametrize("path", WORK)
def test_examples_are_taken(path, monkeypatch, capsys, tmp_path):
    module, place, names = WORK[path]
    found = examples(module, path, monkeypatch, capsys)
    assert len(found) == 2
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in names.split():
        monkeypatch.setattr(place, name, reach)
    for arguments in found:
        monkeypatch.setattr(sys, "argv", [path, *arguments])
        with pytest.raises(ReachedError):
            module.main()


@pytest.mark.parametrize("path", ["cluster/slurm/submit.py", "cluster/ray/submit.py"])
def test_examples_of_the_submit_commands_are_taken(path, monkeypatch, capsys):
    module = script(path)
    found = examples(module, path, monkeypatch, capsys)
    assert len(found) == 2
    for arguments in found:
        command = module.parser().parse_args(arguments).command
        (module.check if "slurm" in path else module.check_places)(command)
        assert command[0] == "python" and command[1] in WORK

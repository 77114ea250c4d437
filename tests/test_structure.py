"""The tests mirror the packages: each module has the test file of its name, or a reason why not."""

import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from commands import ROOT

PACKAGES = ("iaml", "pipeline", "tune")
COMMAND = "is a command, which tests/test_commands.py, test_search.py, test_help.py and test_options.py run"
OPTIONS = "declares options, of which tests/test_options.py has a case each; their rules are in test_config.py"
WITHOUT = {
    **dict.fromkeys(
        (f"pipeline/{name}.py" for name in ("ablate", "darken", "evaluate", "pack", "report", "train")), COMMAND
    ),
    "pipeline/demo_photographs.py": COMMAND,
    "tune/search.py": COMMAND,
    **dict.fromkeys(
        (f"pipeline/settings/{name}.py" for name in ("checkpoint", "darkening", "data", "packing", "run", "train")),
        OPTIONS,
    ),
    "iaml/settings.py": "is the base of all settings, which each of them tests",
    "iaml/objective.py": "is tested as TeacherStudent uses it",
    "pipeline/evaluation/validation.py": "needs Ray Train, which tests/test_commands.py and test_crashes.py start",
    "pipeline/launch/ablation.py": "needs Ray Train, which tests/test_commands.py starts for the ablations",
    "pipeline/launch/dry_run.py": "needs Ray Train, which tests/test_commands.py and test_search.py start for dry runs",
    "pipeline/launch/trainer.py": "needs Ray Train, which tests/test_commands.py and test_crashes.py start",
    "pipeline/packing/photographs.py": "is a list of photographs, which tests/test_options.py exports",
    "pipeline/reporting/comparison.py": "is tested with the page of one run, in test_run_report.py",
    "pipeline/reporting/page/blocks.py": "is data, which page/test_render.py shows",
    "pipeline/reporting/run_summary.py": "is tested by the pages that are made of it, in test_run_report.py",
    "pipeline/training/monitor.py": "is tested by what a run leaves, in tests/test_commands.py and test_telemetry.py",
}
MODULES = sorted(
    path.relative_to(ROOT).as_posix()
    for package in PACKAGES
    for path in (ROOT / package).rglob("*.py")
    if path.name != "__init__.py"
)


@pytest.mark.parametrize("module", MODULES)
def test_each_module_has_the_tests_of_its_name_or_a_reason(module: str) -> None:
    path = Path(module)
    there = (ROOT / "tests" / path.parent / f"test_{path.name}").exists()
    assert there != (module in WITHOUT), f"{module}: {'has tests by now' if there else 'has no test file'}"


def test_reasons_are_of_modules_that_are_there() -> None:
    assert WITHOUT.keys() <= set(MODULES)


def test_no_file_bears_the_name_of_a_module_that_others_import() -> None:
    """``python pipeline/train.py`` puts its folder first on the import path."""
    taken = set(sys.stdlib_module_names) | set(packages_distributions()) | set(PACKAGES)
    for package in ("pipeline", "tune"):
        names = {path.stem for path in (ROOT / package).iterdir() if path.suffix == ".py" or path.is_dir()}
        assert not names & taken, f"{package}/ has {sorted(names & taken)}"

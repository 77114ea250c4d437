"""What the READMEs name is there: links, files and options."""

import re

import pytest
from commands import ROOT

from iaml import Settings
from pipeline.settings.command_line import add_options, argument_parser
from pipeline.settings.darkening import DarkenSettings
from pipeline.settings.evaluation import EvaluateSettings
from pipeline.settings.packing import PackSettings
from tune.settings import SearchConfig

FOLDERS = ("cluster", "pipeline", "tests", "tune")
FOUND = (path for folder in FOLDERS for path in (ROOT / folder).rglob("README.md"))
READMES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in FOUND)]
OWN = ["--dry-run", "--search.dry-run", "--arms", "--seeds", "--at-once", "--config", "--out", "--help"]  # of commands


def text_of(readme: str) -> str:
    return (ROOT / readme).read_text()


def anchors(text: str) -> set[str]:
    """The names by which links reach the headings of a page."""
    names = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", name.lower()).replace(" ", "-") for name in names}


@pytest.mark.parametrize("readme", READMES)
def test_links_lead_to_files_and_headings(readme: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(readme)):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / readme).parent / path if path else ROOT / readme
        assert file.exists(), f"{readme}: {target}"
        if anchor:
            assert anchor in anchors(file.read_text()), f"{readme}: {target}"


@pytest.mark.parametrize("readme", ["pipeline/README.md", "tune/README.md"])
def test_the_tree_names_each_module_and_no_other(readme: str) -> None:
    folder = (ROOT / readme).parent
    tree = text_of(readme).partition("## What is where")[2]
    named = set(re.findall(r"\b(\w+\.py)\b", tree))
    there = {path.name for path in folder.rglob("*.py") if path.name != "__init__.py"}
    if readme.startswith("pipeline"):
        there |= {path.name for path in (ROOT / "iaml").glob("*.py") if path.name != "__init__.py"}
    assert named == there


@pytest.mark.parametrize("readme", [name for name in READMES if not name.startswith("cluster")])
def test_options_are_those_of_the_commands(readme: str) -> None:
    known = set(OWN)
    models: list[type[Settings]] = [SearchConfig, EvaluateSettings, PackSettings, DarkenSettings]
    for model in models:
        parser = argument_parser("")
        add_options(parser, model)
        known |= {option for action in parser._actions for option in action.option_strings}
    commands = re.sub(r"^ .*(cluster/|ray job ).*$", "", text_of(readme), flags=re.MULTILINE)
    used = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*", commands)) - {"--"}
    assert used <= known, sorted(used - known)


def test_the_root_readme_is_two_screens_or_three() -> None:
    assert len(text_of("README.md").splitlines()) <= 150

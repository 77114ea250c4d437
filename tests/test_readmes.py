"""The READMEs tell of what is there: links, files, whole trees, and options that the commands take."""

import io
import logging
import re
import runpy
import sys
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import pytest
from commands import ROOT

FOLDERS = ("iaml", "pipeline", "tune", "cluster", "tests")
READMES = [ROOT / "README.md", *(path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("README.md")))]
COMMANDS = [
    *(
        f"pipeline/{name}.py"
        for name in ("ablate", "darken", "demo_photographs", "evaluate", "pack", "report", "train")
    ),
    "tune/search.py",
    "cluster/ray/submit.py",
    "cluster/slurm/submit.py",
    "cluster/docker/lock.py",
]
OF_OTHERS = {"--env", "--ignorefile", "--set", "--config.file"}  # of apptainer, podman, helm and prometheus
OF_USERS = {"cluster/slurm/site.sh"}
TREES = [
    *(("README.md", folder) for folder in ("iaml", "pipeline", "tune", "cluster")),
    *(("pipeline/README.md", folder) for folder in ("iaml", "pipeline")),
    ("tune/README.md", "tune"),
    ("tests/benchmarks/README.md", "tests/benchmarks"),
]
TREE_LINE = re.compile(r"(?P<indent>(?: {4})+)(?P<names>[\w./-]+(?:, [\w./-]+)*)(?: {2,}.*)?")
SUFFIXES = {".py", ".html", ".css", ".js", ".sh"}

each_readme = pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))


@cache
def options_of(command: str) -> set[str]:
    """The options in a command's ``--help``."""
    before, sys.argv = sys.argv, [command, "--help"]
    try:
        with redirect_stdout(io.StringIO()) as shown, pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / command), run_name="__main__")
    finally:
        sys.argv = before
        logging.disable(logging.NOTSET)  # what a program does to its own process must not outlast it here
    return {"--help"} | set(re.findall(r"^ +(?:-h, )?(--[a-z][\w.-]*)", shown.getvalue(), re.MULTILINE))


def text_of(readme: Path) -> str:
    """Its text, with commands in one line, and paths in the image as in the clone."""
    return readme.read_text().replace("\\\n", " ").replace("/app/", "")


def all_options() -> set[str]:
    return set().union(*map(options_of, COMMANDS))


def sections(text: str) -> set[str]:
    """Headings as links name them."""
    headings = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def tree(readme: Path) -> set[Path]:
    """What stands in the tree below *What is where*, without the folders of which more stands there."""
    text = readme.read_text().partition("## What is where\n")[2].partition("\n## ")[0]
    parents: list[Path] = []
    found: set[Path] = set()
    for line in filter(None, map(TREE_LINE.fullmatch, text.splitlines())):
        names = [name for name in line["names"].split(", ") if "." in name or name.endswith("/")]
        level = len(line["indent"]) // 4 - 1
        parents = parents[:level]
        parent = parents[-1] if parents else ROOT
        found |= {parent / name for name in names}
        parents += [parent / name for name in names[:1] if name.endswith("/")]
    return {path for path in found if not any(path in other.parents for other in found)}


@each_readme
def test_links_lead_to_files_and_sections(readme: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", readme.read_text()):
        if not link.startswith("https://"):
            name, _, section = link.partition("#")
            target = readme.parent / name if name else readme
            assert target.exists(), link
            assert not section or section in sections(target.read_text()), link


@each_readme
def test_files_that_are_named_are_there(readme: Path) -> None:
    text = text_of(readme)
    for path in set(re.findall(rf"(?<![\w/.-])(?:{'|'.join(FOLDERS)})/[\w./-]*\w", text)) - OF_USERS:
        assert (ROOT / path).exists(), path
    modules = [f"/{path.relative_to(ROOT)}" for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    for name in set(re.findall(r"[\w/]+\.py\b", text)):
        assert any(module.endswith(f"/{name.lstrip('/')}") for module in modules), name


@each_readme
def test_commands_take_the_options_that_they_are_given(readme: Path) -> None:
    for command, arguments in re.findall(r"python ([\w/]+\.py)((?:(?! python |`).)*)", text_of(readme)):
        given = set(re.findall(r"(?<!\S)--[a-z][\w.-]*", arguments))
        assert not given or given <= options_of(command), f"{command}{arguments}"


@each_readme
def test_options_that_are_named_are_there(readme: Path) -> None:
    text = text_of(readme)
    named = set(re.findall(r"(?<![\w-])--[a-z]+\.[a-z-]+", text)) | set(re.findall(r"`(--[a-z][\w.-]*)", text))
    assert named - OF_OTHERS <= all_options()


@pytest.mark.parametrize("readme", sorted({readme for readme, _ in TREES}))
def test_trees_name_what_is_there(readme: str) -> None:
    assert [path for path in tree(ROOT / readme) if not path.exists()] == []


@pytest.mark.parametrize("readme, folder", TREES)
def test_trees_leave_no_module_out(readme: str, folder: str) -> None:
    named = tree(ROOT / readme)
    files = [path for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES and path.name != "__init__.py"]
    missing = [path.relative_to(ROOT).as_posix() for path in files if not {path, *path.parents} & named]
    assert files and not missing


def test_the_root_readme_is_two_screens_or_three() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150

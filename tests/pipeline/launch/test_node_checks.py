"""The check of a cluster's nodes: what a node finds, and how little is said of what many find."""

import re
import tomllib
import uuid
from pathlib import Path

import pytest
from datasets import packed

from pipeline.data.manifest import MANIFEST_NAME, load_manifest
from pipeline.launch import node_checks
from pipeline.launch.node_checks import Finding, Needs

ROOT = Path(__file__).parents[3]
NOTE = f".note-{uuid.uuid4().hex}"
PACKAGES = dict.fromkeys((*node_checks.ALIKE, *node_checks.PRESENT), "1.0")


def problems_of(data: dict[str, str] | None = None, runs: Path | None = None, cache: Path | None = None) -> list[str]:
    return list(node_checks.inspect_node(Needs(data or {}, str(runs) if runs else None, NOTE, cache)).problems)


def test_a_node_that_sees_what_the_driver_sees_has_no_problems(tmp_path: Path) -> None:
    manifest = load_manifest(packed(tmp_path / "pairs", test=1))
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / NOTE).touch()
    assert not problems_of({manifest.url: manifest.checksum}, tmp_path / "runs", tmp_path / "cache")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [NOTE]
    Path(manifest.url, MANIFEST_NAME).write_bytes(b"packed by somebody else")
    (found,) = problems_of({manifest.url: manifest.checksum})
    assert found.startswith(
        f"{manifest.url}: is another data set there than where the command runs; all nodes must mount"
    )


def test_a_cache_folder_that_is_not_the_caches_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "iaml-cache").mkdir()
    (tmp_path / "iaml-cache/notes").touch()
    (found,) = problems_of(cache=tmp_path)
    assert found.startswith(f"{tmp_path}/iaml-cache holds somebody else's files; move them away; or choose another")
    assert [path.name for path in tmp_path.rglob("*")] == ["iaml-cache", "notes"]


def test_a_folder_of_the_nodes_own_is_not_the_drivers_though_it_has_its_name(tmp_path: Path) -> None:
    for runs in (tmp_path, tmp_path / "not-mounted"):
        (found,) = problems_of(runs=runs)
        assert found.startswith(
            f"{runs}: is another place there than where the command runs; all nodes must mount the same"
        )
    assert not list(tmp_path.iterdir())  # nothing was made where nothing is mounted
    (found,) = problems_of(data={str(tmp_path / "set"): "0" * 64})
    assert found.startswith(f"{tmp_path}/set: is not there")


@pytest.mark.usefixtures("driver")
def test_where_the_drivers_node_is_the_only_one_its_packages_alone_are_looked_at(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "of the driver")
    node_checks.check_nodes([], "/dev/null/runs", Path("/dev/null/cache"))
    monkeypatch.setattr(node_checks, "LOCK", tmp_path / "requirements.lock")
    node_checks.LOCK.write_text("torch==1.0\n")
    with pytest.raises(ValueError, match=r"torch +1\.0 +2\."):
        node_checks.check_nodes([])
    monkeypatch.delenv("RAY_ADDRESS")
    node_checks.check_nodes([])


def test_many_nodes_are_told_of_in_few_lines() -> None:
    here = PACKAGES | {"torch": "2.13.0+cpu"}
    found = {f"n{index:03}": Finding(here | {"torch": "2.13.0+cu129"}, []) for index in range(200)}
    assert node_checks.describe(found, here, {}) == ""
    for index in range(3, 13):
        found[f"n{index:03}"] = Finding(PACKAGES | {"torch": "2.12.1", "tqdm": "0.9"}, ["/runs: is full"])
    found["n150"] = Finding(here | {"deepspeed": "missing", "tqdm": "missing"}, [])
    found["n151"] = Finding({}, ["no answer"])
    assert node_checks.describe(found, here, {"torch": "2.13.0", "deepspeed": "1.0"}) == (
        "cluster preflight failed:\n"
        "  n003, n004, n005 and 7 more: /runs: is full\n"
        "  n151: no answer\n"
        "  package    requirements.lock  driver      nodes\n"
        "  torch      2.13.0             2.13.0+cpu  2.12.1 on n003, n004, n005 and 7 more\n"
        "  deepspeed  1.0                1.0         missing on n150\n"
        "  tqdm                          1.0         missing on n150\n"
        "  these packages must agree: install requirements.lock where they differ, or change it to what the cluster has"
    )
    every = {f"n{index}": Finding(here, [f"reason {index}"]) for index in range(20)}
    assert node_checks.describe(every, here, {}).splitlines()[-2:] == ["  n9: reason 9", "  and 10 more"]


def test_a_cluster_that_agrees_with_the_driver_but_not_with_the_lock_file_is_told_of() -> None:
    table = node_checks.describe({"n1": Finding(PACKAGES, [])}, PACKAGES, {"ray": "2.0"}).splitlines()
    assert table[2].split() == ["ray", "2.0", "1.0", "1.0", "on", "n1"]


def test_every_package_that_the_project_needs_is_looked_at() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {re.match(r"[\w-]+", dependency)[0] for dependency in project["dependencies"]}
    assert needed == {*node_checks.ALIKE, *node_checks.PRESENT}
    assert needed <= node_checks.read_lock(node_checks.LOCK).keys() and not node_checks.read_lock(ROOT / "no.lock")
    assert node_checks.MISSING not in node_checks.installed_versions().values()

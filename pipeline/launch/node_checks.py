"""Checks every node of a Ray cluster before anything expensive starts: its packages, and the storage that it needs.

the driver leaves a note beside the runs -> a small task on each node looks around -> one error lists all problems
"""

import dataclasses
import hashlib
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.reporting.text_table import TextTable

# All else is imported where it is used: a node that lacks a package must still be able to say so.
if TYPE_CHECKING:
    from pipeline.data.manifest import Manifest

LOCK = Path(__file__).parents[2] / "requirements.lock"
# these decide numbers, or the form of what nodes send to each other and store
ALIKE = (
    "ray", "torch", "torchvision", "deepspeed", "numpy", "pandas", "pillow", "pyarrow", "pydantic", "safetensors",
    "webdataset", "lpips", "optuna", "s3fs", "botocore", "xxhash",
)  # fmt: skip
# in any version
PRESENT = (
    "jinja2", "matplotlib", "opencv-python-headless", "psycopg", "pyyaml", "scikit-image", "scipy", "tensorboard",
    "tqdm",
)  # fmt: skip
MISSING = "missing"
TIMEOUT_S = 120.0  # a first task starts a process, and its imports may come from a slow shared disk
MOST_NAMES, MOST_LINES = 3, 10

Versions = dict[str, str]


@dataclass(frozen=True)
class Needs:
    """What a node must be able to do.

    Attributes:
        data: SHA-256 of each data set's manifest, by the data set's URL.
        runs: folder or prefix to write to, if it must.
        note: the driver's, a file in ``runs``.
        cache: folder to write to, if one was chosen; otherwise each node finds a place, or does without.
    """

    data: Mapping[str, str]
    runs: str | None
    note: str
    cache: Path | None


@dataclass(frozen=True)
class Finding:
    """What is installed on a node, and its problems."""

    versions: Versions
    problems: Sequence[str]


def check_nodes(
    manifests: Sequence["Manifest"], runs: str | None = None, cache: Path | None = None, *, use_gpu: bool = False
) -> None:
    """Check that all nodes have the same packages, see the same data and runs, and may write where they must.

    Where the driver's node is the only one, its packages alone are looked at; nothing is where it has started Ray.

    Args:
        manifests: of the data sets that every node must be able to read.
        runs: folder or s3:// prefix that all nodes must share and be able to write to.
        cache: folder that each node which trains must be able to write to, if one was chosen.
        use_gpu: nodes with GPUs train, instead of those with CPUs.

    Raises:
        ValueError: there are problems; says on which nodes, why, and what to do.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    alone = [node["NodeID"] for node in nodes] == [ray.get_runtime_context().get_node_id()]
    if alone and "RAY_ADDRESS" not in os.environ:
        return
    found = {} if alone else _ask_all(nodes, manifests, runs, cache, use_gpu)
    problems = describe(found, installed_versions(), read_lock(LOCK))
    if problems:
        raise ValueError(problems)


def installed_versions() -> Versions:
    """Versions of the packages that matter, in this process's environment."""
    return {name: _installed(name) for name in (*ALIKE, *PRESENT)}


def read_lock(file: Path) -> Versions:
    """What the lock file pins; nothing where the code lies without it, as when it is installed."""
    text = file.read_text() if file.exists() else ""
    return dict(re.findall(r"^([\w.-]+)==([^\s;]+)", text, re.MULTILINE))


def inspect_node(needs: Needs) -> Finding:
    """What a node has, and its problems; runs on the node."""
    try:
        # random parts of file names would make one reason look like many
        problems = [re.sub(r"[0-9a-f]{32}", "*", problem) for problem in _problems(needs)]
    except ImportError as error:
        problems = [f"a package is missing or broken: {error}"]
    return Finding(installed_versions(), problems)


def describe(found: Mapping[str, Finding], driver: Versions, lock: Versions) -> str:
    """The problems, in a few lines however many nodes there are; empty when nothing is.

    Args:
        found: by the nodes' names.
        driver: what is installed where the command runs.
        lock: what should be installed; what it lacks should be as with the driver.
    """
    problems: dict[str, list[str]] = {}
    for name, finding in found.items():
        for problem in finding.problems:
            problems.setdefault(problem, []).append(name)
    lines = [f"{_name_some(names)}: {problem}" for problem, names in problems.items()]
    if len(lines) > MOST_LINES:
        lines[MOST_LINES:] = [f"and {len(lines) - MOST_LINES} more"]
    rows = list(_version_rows({name: each.versions for name, each in found.items() if each.versions}, driver, lock))
    if rows:
        columns = ["package", "requirements.lock" if lock else "", "driver", "nodes"]
        instead = ", or change it to what the cluster has" if lock else ""
        note = f"these packages must agree: install requirements.lock where they differ{instead}"
        lines += str(TextTable("", columns, rows, [note], texts=len(columns))).splitlines()
    return "\n  ".join(["cluster preflight failed:", *lines]) if lines else ""


def _ask_all(
    nodes: Sequence[dict[str, Any]],
    manifests: Sequence["Manifest"],
    runs: str | None,
    cache: Path | None,
    use_gpu: bool,
) -> dict[str, Finding]:
    """What all nodes find, by their names; meanwhile a note of the driver's lies beside the runs."""
    from pipeline import storage

    needs = Needs({each.url: each.checksum for each in manifests}, runs, f".note-{uuid.uuid4().hex}", cache)
    if runs:
        storage.write_bytes(storage.join(runs, needs.note), b"")
    try:
        return _ask(nodes, needs, "GPU" if use_gpu else "CPU")
    finally:
        if runs:
            storage.delete(storage.join(runs, needs.note))


def _ask(nodes: Sequence[dict[str, Any]], needs: Needs, resource: str) -> dict[str, Finding]:
    """What all nodes find, at the same time, by their names; those with ``resource`` train."""
    task, tasks = ray.remote(num_cpus=0)(inspect_node), {}
    for node in nodes:
        name = f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
        if name in tasks:  # one machine may hold several
            name = f"{name} {node['NodeID'][:8]}"
        own = needs if node["Resources"].get(resource) else dataclasses.replace(needs, cache=None)
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        tasks[name] = task.options(scheduling_strategy=there).remote(own)
    answered, _ = ray.wait(list(tasks.values()), num_returns=len(tasks), timeout=TIMEOUT_S)
    unresponsive = Finding({}, [f"no answer in {TIMEOUT_S:g} s; look at Ray's logs there, and for a disk that hangs"])
    return {name: _answer(each) if each in answered else unresponsive for name, each in tasks.items()}


def _answer(task: ray.ObjectRef) -> Finding:
    try:
        finding: Finding = ray.get(task)
        return finding
    except RayError as error:
        reason = str(error).strip().splitlines()[-1]
        is_code = "No module named 'pipeline" in reason
        hint = "; submit the command as a job from a clone, or install the project there" if is_code else ""
        return Finding({}, [f"a task fails there: {reason}{hint}"])


def _problems(needs: Needs) -> Iterator[str]:
    from pipeline import storage
    from pipeline.data.cache import own_folder
    from pipeline.data.local_disk import find_place
    from pipeline.data.manifest import MANIFEST_NAME

    for url, checksum in needs.data.items():
        try:
            data = storage.read_bytes(storage.join(url, MANIFEST_NAME))
            if hashlib.sha256(data).hexdigest() != checksum:
                yield f"{url}: is another data set there than where the command runs{_alike(url)}"
        except FileNotFoundError as error:
            yield f"{url}: is not there ({error}){_alike(url)}"
        except OSError as error:
            yield f"{url}: cannot be read ({error}){_own(url)}"
    if needs.runs:
        try:
            storage.read_bytes(storage.join(needs.runs, needs.note))  # first, since writing makes folders
            storage.check_writable(needs.runs)
        except FileNotFoundError:
            yield f"{needs.runs}: is another place there than where the command runs{_alike(needs.runs)}"
        except OSError as error:
            yield f"{needs.runs}: cannot be read ({error}){_own(needs.runs)}"
        except ValueError as error:
            yield f"{error}{_own(needs.runs)}"
    if needs.cache:
        try:
            folder, _ = find_place(needs.cache)
            storage.check_writable(str(folder))
            own_folder(folder)
        except (ValueError, OSError) as error:
            yield f"{error}; or choose another data.cache, or do without by data.cache-gib 0"


def _alike(url: str) -> str:
    is_s3 = url.startswith("s3://")
    return "; all nodes must " + ("use the same S3 server" if is_s3 else "mount the same file system, or take s3://")


def _own(url: str) -> str:
    return "; what counts is the environment in which Ray was started there" if url.startswith("s3://") else ""


def _version_rows(
    nodes: Mapping[str, Versions], driver: Versions, lock: Versions
) -> Iterator[tuple[str, str, str, str]]:
    """Package, lock, driver and nodes, for each package that is not everywhere what it should be."""
    for package in (*ALIKE, *PRESENT):
        wanted = lock.get(package, driver[package])
        differing: dict[str, list[str]] = {}
        for name, versions in nodes.items():
            if not _serves(package, versions[package], wanted):
                differing.setdefault(versions[package], []).append(name)
        if differing or not _serves(package, driver[package], wanted):
            where = "; ".join(f"{found} on {_name_some(names)}" for found, names in sorted(differing.items()))
            yield package, lock.get(package, ""), driver[package], where


def _serves(package: str, found: str, wanted: str) -> bool:
    if package in PRESENT:
        return found != MISSING
    return found.split("+")[0] == wanted.split("+")[0]  # builds such as +cpu and +cu129 may differ


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return MISSING


def _name_some(names: Sequence[str]) -> str:
    rest = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {rest} more" if rest > 0 else "")

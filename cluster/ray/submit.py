"""Submits a command of this project as a job to a Ray cluster, follows its log, and ends with its exit status.

Versions, paths and the size of the upload are checked before anything is sent. Ctrl-C leaves the job running.

python cluster/ray/submit.py --address http://HEAD:8265 -- \\
    python pipeline/train.py --config lol_v1 --data.url s3://bucket/lol_v1 --run.root s3://bucket/runs
python cluster/ray/submit.py --no-wait -- \\
    python pipeline/evaluate.py --checkpoint s3://bucket/runs/lol_v1 --split test
"""

import argparse
import asyncio
import logging
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import aiohttp
from ray._private.ray_constants import get_runtime_env_default_excludes
from ray._private.runtime_env.packaging import _dir_travel, _get_excludes
from ray.exceptions import AuthenticationError
from ray.job_submission import JobStatus, JobSubmissionClient

ROOT = Path(__file__).resolve().parents[2]
LOCK = "requirements.lock"
PLACES = {
    "--data.url", "--data.extra-urls", "--run.root",  # of training
    "--source", "--out", "--checkpoint", "--images", "--compare", "--json",  # of packing and scoring
}  # fmt: skip
LISTS = {"--data.extra-urls", "--compare"}  # of these, which may be written as [A, B]
MOST_MB = 20  # the code takes about one
MOST_SHOWN = 5
PAUSE_S = 2.0  # before a log whose connection broke is asked for again

Versions = Mapping[str, str]


def main() -> int:
    """Check, submit and follow; returns the command's exit status, 2 when it is refused here."""
    arguments = parser().parse_args()
    try:
        check_places(arguments.command)
        check_size(ROOT)
        if arguments.address:  # Ray itself would prefer what RAY_ADDRESS says
            os.environ["RAY_API_SERVER_ADDRESS"] = arguments.address
        client = JobSubmissionClient()
        check_versions(locked(), installed(), on_cluster(client))
        job = client.submit_job(
            entrypoint=shlex.join(arguments.command),
            runtime_env={"working_dir": str(ROOT), "env_vars": {"IAML_REVISION": git_hash()}},
        )
    except (ValueError, OSError, RuntimeError, AuthenticationError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    known = f"--address {client.get_address()} {job}"
    print(f"job {job}\n  log:  ray job logs --follow {known}\n  stop: ray job stop {known}", flush=True)
    if arguments.no_wait:
        return 0
    try:
        follow(client, job)
        return exit_status(client, job)
    except KeyboardInterrupt:
        print(f"\nthe job goes on; to stop it: ray job stop {known}", file=sys.stderr)
        return 130
    except (OSError, RuntimeError) as error:
        print(f"what has become of the job is not known: {error}", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    """The options."""
    summary, checks, examples = (__doc__ or "\n\n\n\n").split("\n\n")
    made = argparse.ArgumentParser(
        description=f"{summary}\n\n{checks}",
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [options] -- python pipeline/train.py ...",
        allow_abbrev=False,
    )
    made.add_argument("--address", help="Ray's dashboard, as http://HEAD:8265; by default that of RAY_ADDRESS")
    made.add_argument("--no-wait", action="store_true", help="end when the job is submitted")
    made.add_argument("command", nargs="+", metavar="-- COMMAND", help="what runs on the cluster's head")
    return made


def check_places(command: Sequence[str]) -> None:
    """``ValueError`` when data or results are given by relative paths, which would lie in the job's own folder."""
    for option, place in _places(command):
        if not place.startswith(("/", "~", "s3://", "file://")):
            raise ValueError(f"{option} {place}: a job has a folder of its own; give an absolute path or an s3:// URL")


def check_size(root: Path) -> None:
    """``ValueError`` when more would be uploaded than code."""
    sizes: Counter[str] = Counter()
    for path in files_to_upload(root):
        sizes[path.relative_to(root).parts[0]] += path.stat().st_size
    if sizes.total() > MOST_MB * 1e6:
        largest = "".join(f"\n  {size / 1e6:7.1f} MB  {name}" for name, size in sizes.most_common(MOST_SHOWN))
        raise ValueError(
            f"{root}: {sizes.total() / 1e6:.0f} MB would be uploaded, of which at most {MOST_MB} can be code; move "
            f"elsewhere, or name in .gitignore or .rayignore, what the job does not need:{largest}"
        )


def check_versions(locked: Versions, here: Versions, there: Versions) -> None:
    """``ValueError`` when Ray or Python is another one here than on the cluster; other differences are only said.

    Args:
        locked: what the lock file pins.
        here: what is installed here.
        there: what is known of the cluster; the command itself compares all packages of all its nodes.
    """
    rows = [(name, locked.get(name, ""), here.get(name, "missing"), version) for name, version in there.items()]
    if any(len({_release(name, version) for version in versions if version}) > 1 for name, *versions in rows):
        table = "".join(f"\n  {a:8}{b:19}{c:11}{d}" for a, b, c, d in [("", LOCK, "here", "cluster"), *rows])
        raise ValueError(f"versions differ, nothing was uploaded:{table}\ninstall the same here, or on the cluster")
    differing = [f"{name} {here[name]} instead of {pin}" for name, pin in locked.items() if here.get(name, pin) != pin]
    if differing:
        rest = f" and {len(differing) - MOST_SHOWN} more" if len(differing) > MOST_SHOWN else ""
        print(f"here, other versions than in {LOCK}: {', '.join(differing[:MOST_SHOWN])}{rest}", file=sys.stderr)


def locked() -> Versions:
    """Versions that the lock file pins."""
    return dict(re.findall(r"^([\w.-]+)==([^\s;]+)", Path(ROOT, LOCK).read_text(), re.MULTILINE))


def installed() -> Versions:
    """Versions of this environment's packages, and of Python."""
    packages = {re.sub(r"[-_.]+", "-", each.name).lower(): each.version.split("+")[0] for each in distributions()}
    return packages | {"python": platform.python_version()}


def on_cluster(client: JobSubmissionClient) -> Versions:
    """Versions of Ray and, if it is told, of Python on the cluster."""
    versions = {"ray": ask_dashboard(client, "/api/version").json()["ray_version"]}
    told = ask_dashboard(client, "/api/v0/cluster_metadata")
    return versions | ({"python": told.json()["data"]["pythonVersion"]} if told.ok else {})


def files_to_upload(root: Path) -> list[Path]:
    """What Ray uploads of a folder as a job's working directory: all but what .gitignore and .rayignore name.

    Ray (2.60.0) has no public function that tells; this is its own walk.
    """
    found: list[Path] = []
    _dir_travel(root, [_get_excludes(root, get_runtime_env_default_excludes())], found.append, include_gitignore=True)
    return [path for path in found if path.is_file()]


def ask_dashboard(client: JobSubmissionClient, path: str) -> Any:
    """The answer (of ``requests``) to a GET by the client's own means, which bring address, token and headers along.

    Ray (2.60.0) has public methods for jobs alone.
    """
    return client._do_request("GET", path)


def git_hash() -> str:
    """The clone's commit, which the job can't tell by itself, since .git is not uploaded; empty if unknown."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def follow(client: JobSubmissionClient, job: str) -> None:
    """Print the job's log to its end, over as many connections as it takes.

    Raises:
        OSError: the cluster no longer answers.
        RuntimeError: it no longer knows the job.
    """
    shown, is_whole = asyncio.run(_print_log(client, job, 0))
    while not (client.get_job_status(job).is_terminal() and is_whole):
        time.sleep(PAUSE_S)
        shown, is_whole = asyncio.run(_print_log(client, job, shown))


def exit_status(client: JobSubmissionClient, job: str) -> int:
    """What a shell would give for the command of a job that has ended."""
    details = client.get_job_info(job)
    if details.status == JobStatus.SUCCEEDED:
        return 0
    code: int | None = details.driver_exit_code
    reason = details.message if code is None else f"status {code}"
    print(f"the job has {details.status.lower()}: {reason}", file=sys.stderr)
    if code is None:
        return 1
    return code if code >= 0 else 128 - code


async def _print_log(client: JobSubmissionClient, job: str, shown: int) -> tuple[int, bool]:
    """Print the log from its character ``shown`` on; how many are shown now, and whether it was read to its end."""
    read = 0
    try:
        async for text in client.tail_job_logs(job):
            print(text[max(0, shown - read) :], end="", flush=True)
            read += len(text)
            shown = max(shown, read)
        return shown, True
    except (RuntimeError, aiohttp.ClientError):  # the connection broke
        return shown, False


def _places(command: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The values of the options that name places, those of lists such as ``[A, B]`` one by one."""
    option = ""
    for word in command:
        if word.startswith("--"):
            option, _, word = word.partition("=")
        name = option.replace("_", "-")
        if name in PLACES and word:
            places = word[1:-1].split(",") if name in LISTS and word.startswith("[") else [word]
            yield from ((option, place.strip()) for place in places if place.strip())


def _release(name: str, version: str) -> str:
    """What has to agree: of Python, all but the last number."""
    return version.rpartition(".")[0] if name == "python" else version


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # Ray tells of each ignore file, again and again
    sys.exit(main())

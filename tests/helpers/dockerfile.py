"""A Dockerfile read, and built without a container engine: each stage by chroot in a root of its own."""

import os
import re
import shlex
import shutil
import string
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def instructions(text: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile, as keyword and value, without comments and line breaks."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    logical = re.sub(r"\\\n\s*", "", lines).splitlines()
    return [(keyword, value) for keyword, value in (line.split(maxsplit=1) for line in logical if line.strip())]


def sent(context: Path, ignore: str) -> Iterator[str]:
    """The files of the context that an ignore file lets a builder see, as paths relative to it."""
    rules = [line for line in ignore.splitlines() if line and not line.startswith("#")]
    exceptions = [rule.removeprefix("!") for rule in rules if rule.startswith("!")]
    patterns = [(rule.startswith("!"), _pattern(rule.removeprefix("!"))) for rule in rules]

    def ignored(path: str) -> bool:
        verdicts = [not exception for exception, pattern in patterns if pattern.match(path)]
        return bool(verdicts) and verdicts[-1]

    def entered(folder: str) -> bool:
        return not ignored(folder) or any(exception.startswith(f"{folder}/") for exception in exceptions)

    for here, folders, files in os.walk(context):
        inside = "" if here == str(context) else f"{Path(here).relative_to(context)}/"
        folders[:] = [name for name in folders if entered(inside + name)]
        yield from (inside + name for name in files if not ignored(inside + name))


def _pattern(rule: str) -> re.Pattern[str]:
    parts = {"**/": "(.*/)?", "*": "[^/]*"}
    inner = "".join(parts.get(part, re.escape(part)) for part in re.split(r"(\*\*/|\*)", rule))
    return re.compile(f"{inner}(/|$)")  # what lies in a folder that matches does so too


@dataclass(frozen=True)
class Image:
    """A root, and how commands run in it."""

    root: Path
    environment: Mapping[str, str] = field(default_factory=lambda: {"PATH": PATH, "HOME": "/root"})
    workdir: str = "/"
    user: str = "0:0"

    def step(self, command: str, environment: Mapping[str, str], mounts: Mapping[str, Path]) -> None:
        """Run a build step, which may write everywhere and sees this machine's network.

        Args:
            command: for the root's shell.
            environment: what it sees besides the image's own.
            mounts: files and folders of this machine, by their place under the root's /run.
        """
        setup = [*_bind("/etc/resolv.conf", Path("/etc/resolv.conf")), 'mount -t tmpfs tmpfs "$0/run"']
        setup += [line for place, source in mounts.items() for line in _bind(place, source)]
        self._run(command, {**self.environment, **environment}, setup)

    def run(self, command: str, *, writable: Sequence[str], mounts: Mapping[str, Path], timeout_s: float = 300) -> str:
        """The output of a command, as in a container with a read-only root and no network.

        Args:
            command: for the root's shell.
            writable: folders in the root that are empty and writable.
            mounts: files and folders of this machine, read-only, by their place in one of those folders.
            timeout_s: after which the command has failed.
        """
        uid, gid = self.user.split(":")
        setup = ["ip link set lo up", 'mount -o remount,bind,ro "$0"']
        setup += [f'mount -t tmpfs -o uid={uid},gid={gid},mode=1777 tmpfs "$0{folder}"' for folder in writable]
        setup += [line for place, source in mounts.items() for line in _bind(place, source)]
        return self._run(command, self.environment, setup, "--net", timeout_s=timeout_s)

    def _run(
        self, command: str, environment: Mapping[str, str], setup: list[str], *unshare: str, timeout_s: float = 1800
    ) -> str:
        variables = [f"{name}={value}" for name, value in environment.items()]
        inner = shlex.join(["env", "-i", *variables, "sh", "-c", f"cd {self.workdir} && {command}"])
        lines = ["set -e", 'mount --bind "$0" "$0"', 'mount -t proc proc "$0/proc"', 'mount --rbind /dev "$0/dev"']
        lines += [*setup, f'exec chroot --userspec={self.user} "$0" {inner}']
        done = subprocess.run(
            [
                "unshare",
                "--mount",
                "--pid",
                "--fork",
                "--kill-child",
                *unshare,
                "sh",
                "-c",
                "\n".join(lines),
                self.root,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
        )
        assert done.returncode == 0, f"{command}: status {done.returncode}\n{done.stdout}"
        return done.stdout


def _bind(place: str, source: Path) -> list[str]:
    make = f'mkdir -p "$0{place}"' if source.is_dir() else f'mkdir -p "$0{Path(place).parent}"; touch "$0{place}"'
    return [make, f'mount --bind -o ro {shlex.quote(str(source))} "$0{place}"']


def build(
    dockerfile: Path,
    context: Path,
    base: Path,
    folder: Path,
    *,
    arguments: Mapping[str, str],
    environment: Mapping[str, str],
    mounts: Mapping[str, Path],
) -> Image:
    """The image that a Dockerfile describes.

    Args:
        dockerfile: beside it lies its ignore file.
        context: the folder whose files it copies.
        base: a root that stands for each image that is not one of its own stages.
        folder: where the roots of the stages come to lie.
        arguments: values of ARG.
        environment: what its RUN steps see besides.
        mounts: as in ``Image.step``.
    """
    for path in sent(context, dockerfile.with_name(f"{dockerfile.name}.dockerignore").read_text()):
        (folder / "context" / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(context / path, folder / "context" / path)
    stages: dict[str, Image] = {}
    image, known = Image(folder / "context"), dict(arguments)
    for keyword, value in instructions(dockerfile.read_text()):
        plain = string.Template(value).safe_substitute({**image.environment, **known})
        match keyword:
            case "FROM":
                source, _, name = plain.partition(" AS ")
                image = replace(stages.get(source, Image(base)), root=folder / f"stage-{len(stages)}")
                subprocess.run(["cp", "-a", stages.get(source, Image(base)).root, image.root], check=True)
                stages[name] = image
            case "ARG":
                name, _, default = plain.partition("=")
                known.setdefault(name, default)
            case "ENV":
                image = replace(image, environment={**image.environment, **_variables(plain)})
            case "WORKDIR":
                image = replace(image, workdir=plain)
                Path(image.root, plain.removeprefix("/")).mkdir(parents=True, exist_ok=True)
            case "USER":
                image = replace(image, user=plain)
            case "COPY":
                _copy(plain, image, {name: stage.root for name, stage in stages.items()} | {"": folder / "context"})
            case "RUN":
                image.step(re.sub(r"--mount=\S+ ", "", value), {**known, **environment}, mounts)
            case "LABEL" | "CMD":
                pass
            case _:
                raise NotImplementedError(keyword)
    return image


def _variables(pairs: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in shlex.split(pairs))


def _copy(value: str, image: Image, roots: Mapping[str, Path]) -> None:
    origin, words = re.fullmatch(r"(?:--from=(\S+) )?(.*)", value).groups(default="")  # type: ignore[union-attr]
    *sources, target = words.split()
    place = Path(image.root, os.path.normpath(Path("/", image.workdir, target)).removeprefix("/"))
    for source in (roots[origin] / path.removeprefix("/") for path in sources):
        if source.is_dir():
            shutil.copytree(source, place, symlinks=True, dirs_exist_ok=True)
        else:
            shutil.copy2(source, place)

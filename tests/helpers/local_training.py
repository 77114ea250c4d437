"""Training as a worker of Ray Train runs it, in a process that ``run_workers`` has: no cluster, the same loop."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from workers import run_workers

from pipeline.config import Config
from pipeline.start import find_start

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
        zero_stage: that DeepSpeed says it is at; 0 where training ended before.
    """

    config: Config
    printed: str
    batches: list[list[tuple[Images, Images]]]
    layouts: set[torch.memory_format]
    threads: dict[str, int]
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


def train(config: Config) -> Training:
    """Train a run."""
    (found,) = run_workers(1, _train, config.model_dump(mode="json"), {"start_from": find_start(config)})
    return Training(config, **found)


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Whether tensors are the same, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _train(settings: dict[str, Any], provenance: dict[str, Any]) -> dict[str, Any]:
    import contextlib
    import io
    import threading
    from collections import Counter
    from types import SimpleNamespace
    from unittest.mock import patch

    import ray
    from ray.train.v2._internal.execution.train_fn_utils import LocalTrainFnUtils, set_train_fn_utils

    from pipeline.training import loop
    from pipeline.training.placement import Place

    batches, layouts, threads = [], set(), Counter()

    class Worker(LocalTrainFnUtils):
        """Ray's stand-in without a cluster, which also stores what is reported."""

        def report(
            self, metrics: Any, checkpoint: Any = None, checkpoint_dir_name: str = "",
            checkpoint_upload_fn: Any = None, **_: Any,
        ) -> None:  # fmt: skip
            if checkpoint:
                checkpoint_upload_fn(checkpoint, checkpoint_dir_name)

    class Watched(loop.Engine):
        def __init__(self, task: Any, *arguments: Any) -> None:
            def note(*call: Any) -> None:
                map_ = call[2]
                layouts.update(
                    form
                    for form in (torch.contiguous_format, torch.channels_last)
                    if map_.is_contiguous(memory_format=form) and min(map_.shape[1:]) > 1
                )

            task.student.encoder.levels[0].register_forward_hook(note)
            super().__init__(task, *arguments)
            watched.append(self)

        def step(self, given: Any, learning_rate: float) -> Any:
            if not batches:
                threads.update(thread.name.split("_")[0] for thread in threading.enumerate())
            batches.append([tuple(images.numpy().copy() for images in pair) for pair in given])
            return super().step(given, learning_rate)

    watched: list[Any] = []
    worker = Worker("local")
    worker.get_context().get_storage = lambda: SimpleNamespace(experiment_fs_path="", storage_filesystem=None)
    set_train_fn_utils(worker)
    with (
        contextlib.redirect_stdout(io.StringIO()) as printed,
        patch.object(loop, "Engine", Watched),
        contextlib.suppress(ValueError),  # the loop has stored the reason
        patch.object(loop.placement, "gather", lambda: [Place("here", None)]),  # it would start a cluster
    ):
        loop.train({"config": settings, "provenance": provenance, "lease": "none"})
    assert not ray.is_initialized()
    return {
        "printed": printed.getvalue(),
        "batches": batches,
        "layouts": layouts,
        "threads": dict(threads),
        "zero_stage": watched[0]._engine.zero_optimization_stage() if watched else 0,
    }

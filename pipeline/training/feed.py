"""Crops to the device that trains, beside its arithmetic."""

from collections.abc import Iterator
from itertools import chain

import torch

from pipeline.data.loader import Batch

Steps = Iterator[tuple[int, list[Batch]]]


def feed(steps: Steps, device: torch.device) -> Steps:
    """The steps with their batches on ``device``.

    A GPU gets them on a stream of its own from pinned memory: while it computes a step, the next one's crops are
    copied, and nothing waits for the copy but the step that needs it.
    """
    return steps if device.type == "cpu" else _copy_aside(steps, device)


def _copy_aside(steps: Steps, device: torch.device) -> Steps:
    copier: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    for step, batches in steps:
        with torch.cuda.stream(copier):
            copies = [Batch(*(images.to(device, non_blocking=True) for images in batch)) for batch in batches]
        computing = torch.cuda.current_stream(device)
        computing.wait_stream(copier)
        for images in chain.from_iterable(copies):
            images.record_stream(computing)  # its memory is the copier's, which may give it away once it is free
        yield step, copies

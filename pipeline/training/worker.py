"""What Ray Train hands to its workers."""

from typing import Any


def train(settings: dict[str, Any]) -> None:
    """Train one worker's share of a run, as ``pipeline.training.loop.train`` says.

    The loop is imported here, in the worker: it brings DeepSpeed and TensorBoard, 0.5 s of CPU time, and the driver,
    which has to name the function, needs neither.
    """
    from pipeline.training import loop

    loop.train(settings)

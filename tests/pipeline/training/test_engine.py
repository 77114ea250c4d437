"""The engine: same result on every number of workers, a state that any of them can load, guarded steps."""

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from workers import run_workers

from iaml import NetworkSettings, TeacherStudent

STEPS, BATCH = 10, 8


def train(zero_stage, accumulation, start, stop, state=None, poison=None, precision="float32", clip=0.5):
    """Steps of a small net on fixed samples; returns weights, optimizer state, and what each step did."""
    import torch.distributed as dist

    from pipeline.training.engine import Engine, OptimizerSettings

    torch.manual_seed(0)
    task = TeacherStudent(NetworkSettings(width=1 / 16))
    if state is not None:
        task.load_state_dict(state["weights"])
        task.updates = state["updates"]
    rank, workers = dist.get_rank(), dist.get_world_size()
    settings = OptimizerSettings(learning_rate=1e-3, clip=clip, zero_stage=zero_stage, precision=precision)
    micro = BATCH // workers // accumulation
    engine = Engine(task, settings, micro, accumulation)
    if state is not None:
        engine.load_optimizer_state(state["optimizer"], state["updates"])
    samples = np.random.default_rng(1).integers(0, 256, (2, STEPS, accumulation, workers, micro, 3, 32, 32), np.uint8)
    results = []
    for step in range(start, stop):
        low, clean = (torch.from_numpy(side[step, :, rank].copy()) for side in samples.reshape(2, STEPS, accumulation, workers, micro, 3, 32, 32))
        if poison == step and rank == workers - 1:
            with torch.no_grad():
                task.student.decoder.head.refine[2].bias.fill_(math.nan)
        result = engine.step(list(zip(low // 8, clean, strict=True)), settings.rate_at(step, STEPS))
        results.append((float(result.losses["loss"]), result.grad_norm, result.applied))
    return {
        "weights": {name: value.clone() for name, value in task.state_dict().items()},
        "optimizer": engine.optimizer_state(),
        "updates": task.updates,
        "steps": results,
    }


def largest_difference(a, b):
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)


@pytest.mark.parametrize("zero_stage", [0, 1, 2])
def test_two_workers_by_four_equal_one_worker_by_eight(zero_stage):
    one = run_workers(1, train, zero_stage, 1, 0, STEPS)[0]
    two = run_workers(2, train, zero_stage, 1, 0, STEPS)
    assert largest_difference(two[0]["weights"], two[1]["weights"]) == 0
    assert largest_difference(one["weights"], two[0]["weights"]) < 1e-4
    assert largest_difference(one["optimizer"], two[0]["optimizer"]) < 1e-4
    assert np.allclose([norm for _, norm, _ in one["steps"]], [norm for _, norm, _ in two[0]["steps"]], rtol=1e-3)

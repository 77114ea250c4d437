"""Batch normalisation over all workers, and of the teacher's clean images."""

import hashlib

import pytest
import torch
from torch import nn
from workers import run_workers

from iaml import AutoEncoder, NetworkSettings, TeacherSettings, TeacherStudent, use_global_batch_norm

SMALL = NetworkSettings(width=1 / 16)
NORMS = ("running", "batch", "separate")


def test_the_network_alone_has_plain_layers():
    kinds = {type(module) for module in AutoEncoder(SMALL).modules() if "Norm" in type(module).__name__}
    assert kinds == {nn.BatchNorm2d}


def test_the_exchange_keeps_every_tensor_and_its_name():
    task = TeacherStudent(SMALL, teacher=TeacherSettings(norm="separate"))
    before = task.state_dict(keep_vars=True)
    use_global_batch_norm(task)
    after = task.state_dict(keep_vars=True)
    assert list(before) == list(after) and all(before[name] is after[name] for name in before)
    assert not [module for module in task.modules() if type(module) is nn.BatchNorm2d]


def test_names_in_checkpoints_stay_as_they_are():
    names = list(TeacherStudent(SMALL, teacher=TeacherSettings(norm="separate")).state_dict())
    assert names[:2] == ["student.encoder.levels.0.0.weight", "student.encoder.levels.0.1.weight"]
    assert "teacher_decoder.levels.3.up.1.running_var" in names and names[-1] == "clean_statistics.8.var"
    assert (len(names), hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]) == (184, "5c0687f1a65c4c09")


def normalise(share):
    """Forward, backward and running statistics of one layer on this worker's share of a fixed batch."""
    import torch
    import torch.distributed as dist

    from iaml import use_global_batch_norm

    layer = torch.nn.BatchNorm2d(3)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
    use_global_batch_norm(module := torch.nn.Sequential(layer))
    x = torch.randn(8, 3, 5, 7, generator=torch.Generator().manual_seed(0)) * 3 + 1
    part = x[dist.get_rank() * share : (dist.get_rank() + 1) * share].clone().requires_grad_()
    output = module(part)
    (output.square() * torch.arange(7.0)).sum().backward()
    return output.detach(), part.grad, layer.weight.grad, layer.running_mean, layer.running_var, x


def test_two_workers_normalise_as_one_does_with_the_whole_batch():
    whole = run_workers(1, normalise, 8)[0]
    halves = run_workers(2, normalise, 4)
    for index in (0, 1):
        assert torch.allclose(torch.cat([half[index] for half in halves]), whole[index], atol=1e-5)
    assert torch.allclose(halves[0][2] + halves[1][2], whole[2], rtol=1e-4)
    x = whole[5]
    mean, var = 0.1 * x.mean((0, 2, 3)), 0.9 + 0.1 * x.var((0, 2, 3))
    for worker in (whole, *halves):
        assert torch.allclose(worker[3], mean, atol=1e-6) and torch.allclose(worker[4], var, rtol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_clean_images_leave_the_students_statistics_alone(norm):
    task = TeacherStudent(SMALL, teacher=TeacherSettings(norm=norm))
    before = {name: value.clone() for name, value in task.student.named_buffers()}
    task.teacher_maps(torch.rand(2, 3, 32, 32))
    assert all(torch.equal(value, before[name]) for name, value in task.student.named_buffers())


@pytest.mark.parametrize("norm", NORMS)
def test_a_compiler_follows_the_losses_without_a_break(norm):
    torch.manual_seed(0)
    task = TeacherStudent(SMALL, teacher=TeacherSettings(norm=norm))
    low, clean = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)
    compiled = torch.compile(task, fullgraph=True, dynamic=False, backend="eager")
    losses = compiled(low, clean)
    assert losses["loss"].requires_grad and losses["mirror"].isfinite()

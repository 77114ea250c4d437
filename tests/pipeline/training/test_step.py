"""The step's arithmetic around the gradients, against torch's own Adam."""

import math
import subprocess
import sys

import pytest
import torch
from commands import ROOT

from pipeline.training.step import GuardedAdam, poison_unless_finite, restore_unless

LAYOUTS = (torch.contiguous_format, torch.channels_last)


def train(optimizer_class, layout=LAYOUTS[0], of_gradient=LAYOUTS[0], factor=1.0, **options):
    """A weight after three steps by fixed gradients, and the optimizer."""
    generator = torch.Generator().manual_seed(0)
    start, gradient = torch.randn(2, 8, 4, 3, 3, generator=generator)
    weight = torch.nn.Parameter(start.contiguous(memory_format=layout))
    optimizer = optimizer_class([weight], lr=1e-2, **options)
    for step in range(3):
        weight.grad = (factor * gradient * (step + 1)).contiguous(memory_format=of_gradient)
        optimizer.step()
    return weight.detach(), optimizer


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("of_gradient", LAYOUTS)
def test_weights_and_gradients_of_any_layout_are_paired(layout, of_gradient):
    expected, _ = train(torch.optim.Adam)
    found, optimizer = train(GuardedAdam, layout, of_gradient, clip=0.0)
    assert torch.allclose(found, expected, atol=1e-7) and bool(optimizer.applied)


def test_gradients_are_clipped_by_their_norm():
    _, optimizer = train(GuardedAdam, clip=0.5)
    (state,) = optimizer.state.values()
    direction = state["exp_avg"] / state["exp_avg"].norm()
    assert float(state["exp_avg"].norm()) == pytest.approx(0.5 * (1 - 0.9**3), rel=1e-5)
    assert float(optimizer.grad_norm) > 0.5 and direction.isfinite().all()
    _, optimizer = train(GuardedAdam, factor=1e-3, clip=0.5)  # a small gradient stays as it is
    (state,) = optimizer.state.values()
    assert float(state["exp_avg"].norm()) < 0.05


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing(bad):
    before, optimizer = train(GuardedAdam, clip=0.5)
    (weight,), (state,) = optimizer.param_groups[0]["params"], optimizer.state.values()
    kept = {name: value.clone() for name, value in state.items()}
    weight.grad[0, 0, 0, 0] = bad
    optimizer.step()
    assert not optimizer.applied and torch.equal(weight.detach(), before)
    assert all(torch.equal(value, state[name]) for name, value in kept.items())


def test_a_loss_that_is_not_finite_makes_every_gradient_so():
    for value, is_good in ((2.0, True), (math.inf, False), (math.nan, False)):
        weight = torch.ones(3, requires_grad=True)
        poison_unless_finite((weight[:1] * value).sum() + 0 * weight.sum()).backward()
        assert bool(weight.grad.isfinite().all()) == is_good and bool(weight.grad.isnan().all()) != is_good


def test_values_are_restored_unless_the_step_was_applied():
    for applied in (True, False):
        values, before = [torch.tensor([math.nan, 1.0]), torch.tensor(3)], [torch.zeros(2), torch.tensor(2)]
        restore_unless(torch.tensor(applied), values, before)
        assert int(values[1]) == (3 if applied else 2) and bool(values[0].isnan().any()) == applied


def test_a_step_imports_no_compiler():
    """It would take each worker 3 s of CPU time when it starts."""
    code = """
import sys, torch
from pipeline.training.step import GuardedAdam
weight = torch.nn.Parameter(torch.ones(3))
optimizer = GuardedAdam([weight], lr=1e-2, clip=1.0)
weight.grad = torch.ones(3)
optimizer.step()
optimizer.zero_grad()
assert bool(optimizer.applied)
print([name for name in ("torch._dynamo", "sympy") if name in sys.modules])
"""
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert output == "[]\n"

"""The arithmetic of a step around the gradients, on the device: nothing here waits for what the device computes."""

import inspect
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class EagerOptimizer(torch.optim.Optimizer):
    """torch's optimizer without the wrappers by which torch.compile leaves its methods alone.

    They import the compiler, sympy included (torch 2.13), which takes 3 s of CPU time, though nothing is compiled.
    """

    __init__ = inspect.unwrap(torch.optim.Optimizer.__init__)
    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)


class GuardedAdam(torch.optim.Adam, EagerOptimizer):
    """Adam that clips by the global norm and skips a step whose gradients are not finite, in one pass over the weights.

    Args:
        parameters: what it trains.
        clip: largest norm of the gradient; 0 is no limit.
        options: Adam's.

    Attributes:
        grad_norm: of the last step's gradient before clipping, a scalar on the device.
        applied: whether the last step moved the weights, likewise.
    """

    grad_norm: Tensor
    applied: Tensor

    def __init__(self, parameters: Sequence[Tensor], *, clip: float, **options: Any) -> None:
        super().__init__(parameters, fused=True, **options)
        self._clip = clip

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Clip, check and step."""
        trained = [value for group in self.param_groups for value in group["params"] if value.grad is not None]
        for value in trained:
            _match_layout(value)
        gradients = [value.grad for value in trained if value.grad is not None]
        self.grad_norm = torch.nn.utils.get_total_norm(gradients)
        self.applied = self.grad_norm.isfinite()
        # what torch's GradScaler tells a fused optimizer: what to divide gradients by, and whether to skip the step
        self.grad_scale = (self.grad_norm / (self._clip or math.inf)).clamp(min=1)
        self.found_inf = (~self.applied).float()
        inspect.unwrap(torch.optim.Adam.step)(self)


def _match_layout(value: Tensor) -> None:
    """Lay the gradient of ``value`` out as ``value``: torch's fused Adam (2.13) pairs them by their place in memory."""
    if value.grad is not None and value.grad.stride() != value.stride():
        value.grad = torch.empty_like(value).copy_(value.grad)


def poison_unless_finite(loss: Tensor) -> Tensor:
    """The loss; one of NaN or infinity makes every gradient NaN, so that all workers skip the step."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


@torch.no_grad()
def restore_unless(applied: Tensor, values: Iterable[Tensor], before: Iterable[Tensor]) -> None:
    """Put ``values`` back to what they were ``before`` a step that was not ``applied``."""
    if applied.is_cpu and applied:
        return  # known already
    for value, old in zip(values, before, strict=True):
        value.copy_(torch.where(applied, value, old))


@torch.no_grad()
def average_over_workers(values: Iterable[Tensor]) -> None:
    """Make all floating-point ``values`` the workers' mean, in one exchange; all workers must call this together."""
    averaged = [value for value in values if value.is_floating_point()]
    flat = torch.cat([value.flatten() for value in averaged]) / dist.get_world_size()
    dist.all_reduce(flat)
    for value, mean in zip(averaged, torch.split(flat, [value.numel() for value in averaged]), strict=True):
        value.copy_(mean.view_as(value))

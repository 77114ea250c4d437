"""Batch normalisation over all workers, and what normalises the teacher's clean images.

The network's layers are torch's own ``nn.BatchNorm2d``; ``use_global_batch_norm`` turns them into layers whose batch
is that of all workers. Their running statistics are learnt from low-light images. When the teacher runs the same
layers on clean images those statistics do not fit, so three forms are offered (``TeacherNorm``), each a function of a
layer and its input, which ``Encoder`` and ``Decoder`` take as an argument.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from iaml import kernels

TeacherNorm = Literal["running", "batch", "separate"]
PIXELS = (0, 2, 3)  # the dimensions that a channel's statistics span
MOMENTUM = 0.1  # of RunningStatistics; nn.BatchNorm2d has the same

# what a level does in place of its layer's forward and the activation: the layer, its input (B, C, H, W) and the
# activation's slope below 0, to the same shape
Normalise = Callable[[nn.BatchNorm2d, Tensor, float], Tensor]


def use_global_batch_norm(module: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Make each ``nn.BatchNorm2d`` in ``module`` normalise by the batch of all workers instead of its own.

    The number of workers then changes nothing but rounding. Call it on each worker before training starts; with one
    worker, and in evaluation mode, the layers do what they did. They stay the same objects with the same parameters
    and buffers, so that optimizers, hooks and state dicts need not know. All workers must see batches of one shape.

    Args:
        module: changed in place, on any device.
        group: the workers whose batches count as one; by default all.
    """
    for layer in module.modules():
        if type(layer) is nn.BatchNorm2d:
            layer.__class__ = GlobalBatchNorm2d  # as torch's fully_shard does
            layer.process_group = group  # type: ignore[assignment]


class GlobalBatchNorm2d(nn.SyncBatchNorm, nn.BatchNorm2d):
    """Batch normalisation whose batch is the global one: on GPUs torch's ``SyncBatchNorm``, here for CPUs as well."""

    process_group: dist.ProcessGroup | None
    momentum: float
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def forward(self, x: Tensor, slope: float = 1.0) -> Tensor:
        """Normalise (B, C, H, W) by channel, and activate with ``slope`` below 0."""
        if not self.training:
            return normalise_by_running(self, x, slope)
        fused = kernels.usable(x)
        group = self.process_group
        if x.is_cuda or not (fused or _workers(group) > 1):
            return F.leaky_relu(super().forward(x) if x.is_cuda else nn.BatchNorm2d.forward(self, x), slope)
        mean, var = global_statistics(x, group)
        self.num_batches_tracked.add_(1)
        _update(self.running_mean, self.running_var, mean, var, _count(x, group), self.momentum)
        if fused:
            exchange = partial(_sum_over_workers, group=group)
            return kernels.batch_norm(x, mean, var, self.weight, self.bias, self.eps, slope, _count(x, group), exchange)
        normalise = cast(Callable[..., Tensor], _NormaliseByGlobalBatch.apply)
        return F.leaky_relu(normalise(x, self.weight, self.bias, mean, var, self.eps, group), slope)


def normalise_by_layer(layer: nn.BatchNorm2d, x: Tensor, slope: float) -> Tensor:
    """Normalise (B, C, H, W) as the layer itself does, and activate."""
    if isinstance(layer, GlobalBatchNorm2d):
        return layer(x, slope)  # type: ignore[no-any-return]
    return F.leaky_relu(layer(x), slope) if layer.training else normalise_by_running(layer, x, slope)


def normalise_by_running(layer: nn.BatchNorm2d, x: Tensor, slope: float) -> Tensor:
    """Normalise (B, C, H, W) by the layer's running statistics, which stay as they are, and activate."""
    assert layer.running_mean is not None and layer.running_var is not None
    return _normalise(layer, x, layer.running_mean, layer.running_var, slope)


def normalise_by_batch(layer: nn.BatchNorm2d, x: Tensor, slope: float) -> Tensor:
    """Normalise (B, C, H, W) by the global batch, and activate; the layer's running statistics stay as they are."""
    return _normalise(layer, x, *global_statistics(x, _group_of(layer)), slope)


class RunningStatistics(nn.Module):
    """Running mean and variance of the clean images in one layer, which normalise them (``teacher_norm: separate``)."""

    mean: Tensor
    var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))

    def forward(self, layer: nn.BatchNorm2d, x: Tensor, slope: float) -> Tensor:
        """As ``Normalise``; in training mode the global batch counts first, and for these statistics alone."""
        if self.training:
            group = _group_of(layer)
            _update(self.mean, self.var, *global_statistics(x, group), _count(x, group), MOMENTUM)
        return _normalise(layer, x, self.mean, self.var, slope)


@torch.no_grad()
def global_statistics(x: Tensor, group: dist.ProcessGroup | None = None) -> tuple[Tensor, Tensor]:
    """Mean and population variance by channel of (B, C, H, W), over the batches of a group's workers, float32."""
    if kernels.usable(x):
        mean, var = kernels.moments(x)
    else:
        var, mean = torch.var_mean(x.float(), dim=PIXELS, correction=0)
    if _workers(group) == 1:
        return mean, var
    parts = [torch.empty(2, *mean.shape, device=x.device) for _ in range(_workers(group))]
    dist.all_gather(parts, torch.stack([mean, var]), group)
    means, variances = torch.stack(parts, dim=1)
    mean = means.mean(dim=0)
    # of parts of equal size: the variance within them plus the variance between them
    return mean, variances.mean(dim=0) + (means - mean).square().mean(dim=0)


def _normalise(layer: nn.BatchNorm2d, x: Tensor, mean: Tensor, var: Tensor, slope: float) -> Tensor:
    if kernels.usable(x) and not torch.is_grad_enabled():
        return kernels.normalise(x, mean, var, layer.weight, layer.bias, layer.eps, slope)
    return F.leaky_relu(F.batch_norm(x, mean, var, layer.weight, layer.bias, eps=layer.eps), slope)


def _update(running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, count: int, momentum: float) -> None:
    running_mean.lerp_(mean, momentum)
    running_var.lerp_(var * (count / max(count - 1, 1)), momentum)


class _NormaliseByGlobalBatch(torch.autograd.Function):
    """Normalisation by the statistics of all workers, with the gradient that flows through them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        mean: Tensor,
        var: Tensor,
        eps: float,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt())
        ctx.group = group
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = gradients
        x, weight, mean, inverse_std = ctx.saved_tensors
        shape = (1, -1, 1, 1)
        normalised = (x - mean.view(shape)) * inverse_std.view(shape)
        local = torch.stack([grad.sum(PIXELS), (grad * normalised).sum(PIXELS)])
        summed = _sum_over_workers(local, ctx.group)
        through_mean, through_var = (summed / _count(x, ctx.group)).view(2, 1, -1, 1, 1)
        grad_x = (weight * inverse_std).view(shape) * (grad - through_mean - normalised * through_var)
        return grad_x, local[1], local[0], None, None, None, None


def _group_of(layer: nn.BatchNorm2d) -> dist.ProcessGroup | None:
    return layer.process_group if isinstance(layer, GlobalBatchNorm2d) else None


def _sum_over_workers(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    if _workers(group) == 1:
        return values
    summed = values.clone()
    dist.all_reduce(summed, group=group)
    return summed


def _count(x: Tensor, group: dist.ProcessGroup | None) -> int:
    """Values of each channel in the batch of all the group's workers."""
    return x.numel() // x.shape[1] * _workers(group)


def _workers(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1

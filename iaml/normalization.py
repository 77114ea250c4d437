"""Batch normalisation over all workers, and what it does for the teacher's clean images.

The running statistics of the student's layers are learnt from low-light images. When the teacher runs
the same layers on clean images those statistics do not fit, so three forms are offered (``TeacherNorm``).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

TeacherNorm = Literal["running", "batch", "separate"]
PIXELS = (0, 2, 3)  # the dimensions that a channel's statistics span


class BatchNorm2d(nn.SyncBatchNorm):
    """Batch normalisation whose batch is the global one, so that the number of workers changes nothing.

    Torch's own ``SyncBatchNorm`` serves GPUs; this adds CPUs and the clean branch of the teacher.
    All workers must see batches of the same shape.
    """

    clean: "tuple[TeacherNorm, RunningStatistics | None] | None" = None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, H, W) by channel."""
        if self.clean is not None:
            return self._forward_clean(x, *self.clean)
        if x.is_cuda:
            return super().forward(x)
        if not self.training or _world_size() == 1:
            return nn.BatchNorm2d.forward(cast(nn.BatchNorm2d, self), x)
        mean, var = global_statistics(x)
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        self._update(cast(Tensor, self.running_mean), cast(Tensor, self.running_var), x, mean, var)
        normalise = cast(Callable[..., Tensor], _GlobalBatchNorm.apply)
        return normalise(x, self.weight, self.bias, mean, var, self.eps)

    def _forward_clean(self, x: Tensor, norm: TeacherNorm, own: "RunningStatistics | None") -> Tensor:
        if norm == "running":
            mean, var = cast(Tensor, self.running_mean), cast(Tensor, self.running_var)
        elif norm == "batch":
            mean, var = global_statistics(x)
        else:
            assert own is not None
            if self.training:
                self._update(own.mean, own.var, x, *global_statistics(x))
            mean, var = own.mean, own.var
        return F.batch_norm(x, mean, var, self.weight, self.bias, eps=self.eps)

    def _update(self, running_mean: Tensor, running_var: Tensor, x: Tensor, mean: Tensor, var: Tensor) -> None:
        assert self.momentum is not None
        count = x.numel() // x.shape[1] * _world_size()
        running_mean.lerp_(mean, self.momentum)
        running_var.lerp_(var * count / (count - 1), self.momentum)


class RunningStatistics(nn.Module):
    """Running mean and variance of the clean images in one layer (``teacher_norm: separate``)."""

    mean: Tensor
    var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))


@contextmanager
def clean_branch(
    layers: Sequence[BatchNorm2d], norm: TeacherNorm, own: Sequence[RunningStatistics] | None
) -> Iterator[None]:
    """Within, ``layers`` treat their input as clean images; their own running statistics are not written."""
    for index, layer in enumerate(layers):
        layer.clean = (norm, own[index] if own is not None else None)
    try:
        yield
    finally:
        for layer in layers:
            layer.clean = None


@torch.no_grad()
def global_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance by channel of (B, C, H, W), over the batches of all workers, float32."""
    var, mean = torch.var_mean(x.float(), dim=PIXELS, correction=0)
    if _world_size() == 1:
        return mean, var
    parts = [torch.empty(2, *mean.shape, device=x.device) for _ in range(_world_size())]
    dist.all_gather(parts, torch.stack([mean, var]))
    means, variances = torch.stack(parts, dim=1)
    mean = means.mean(dim=0)
    # of parts of equal size: the variance within them plus the variance between them
    return mean, variances.mean(dim=0) + (means - mean).square().mean(dim=0)


class _GlobalBatchNorm(torch.autograd.Function):
    """Normalisation by the statistics of all workers, with the gradient that flows through them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt())
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        (grad,) = gradients
        x, weight, mean, inverse_std = ctx.saved_tensors
        shape = (1, -1, 1, 1)
        normalised = (x - mean.view(shape)) * inverse_std.view(shape)
        local = torch.stack([grad.sum(PIXELS), (grad * normalised).sum(PIXELS)])
        summed = local.clone()
        dist.all_reduce(summed)
        count = x.numel() // x.shape[1] * _world_size()
        through_mean, through_var = (summed / count).view(2, 1, -1, 1, 1)
        grad_x = (weight * inverse_std).view(shape) * (grad - through_mean - normalised * through_var)
        return grad_x, local[1], local[0], None, None, None


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1

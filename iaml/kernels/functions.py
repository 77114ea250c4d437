"""The kernels as differentiable functions; each is tested against the operators of torch that it stands for."""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from iaml.kernels import library

TYPES = (torch.float32, torch.bfloat16)
Sum = Callable[[Tensor], Tensor]  # of the tensors of all workers


def usable(x: Tensor) -> bool:
    """Whether kernels take the place of torch's operators for ``x``: on CPUs, in float32 and bfloat16.

    A compiler that traces the network sees torch's operators, which it can fuse itself.
    """
    return x.is_cpu and x.dtype in TYPES and not torch.compiler.is_compiling() and not library.problem()


def attend(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, window: Tensor) -> Tensor:
    """CBAM: channels, then pixels, scaled by gates from their means and maxima; gates are computed in float32.

    Args:
        x: (B, C, H, W).
        w1: first layer of the channel gates' MLP, (hidden, C), float32 as all that follow.
        b1: (hidden,).
        w2: (C, hidden).
        b2: (C,).
        window: of the pixel gates, (1, 2, 7, 7).

    Returns:
        As ``x``, channels last.
    """
    apply: Callable[..., Tensor] = _Attend.apply
    return apply(_channels_last(x), *(value.contiguous() for value in (w1, b1, w2, b2, window)))


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance by channel of (B, C, H, W): (C,), float32, without gradient."""
    x = _channels_last(x.detach())
    mean, var = x.new_empty((2, x.shape[1]), dtype=torch.float32)
    _call("moments", x, x, mean, var)
    return mean, var


def normalise(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float) -> Tensor:
    """Normalise (B, C, H, W) by the given statistics, (C,), and activate; without gradient.

    Args:
        x: the maps.
        mean: float32 as all that follow.
        var: population variance.
        weight: factor of the normalised values.
        bias: what is added to them.
        eps: added to the variance.
        slope: of the activation below 0: 1 for none, 0 for ReLU.
    """
    x = _channels_last(x)
    y = torch.empty_like(x)
    _call("normalise", x, x, mean, var, weight, bias, eps, slope, y)
    return y


def batch_norm(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    slope: float,
    count: int,
    add_up: Sum,
) -> Tensor:
    """As ``normalise``, by statistics of ``count`` values that ``x`` is part of, with the gradient through them."""
    apply: Callable[..., Tensor] = _BatchNorm.apply
    return apply(_channels_last(x), mean, var, weight, bias, eps, slope, count, add_up)


def similarity(a: Tensor, b: Tensor, sigma: float, c1: float, c2: float) -> Tensor:
    """Mean SSIM of each image with an 11x11 Gaussian window; its gradient reaches ``a`` alone.

    Args:
        a: (B, C, H, W), float32.
        b: likewise.
        sigma: of the window, pixels.
        c1: constant of the luminance term.
        c2: constant of the structure term.

    Returns:
        (B,), float32.
    """
    layout = torch.contiguous_format if a.is_contiguous() else torch.channels_last
    images, clean = (image.detach().contiguous(memory_format=layout) for image in (a, b))
    means, gradient = a.new_empty(len(a)), torch.empty_like(images)
    is_last = int(layout == torch.channels_last)
    _call("similarity", a, is_last, images, clean, ctypes.c_double(sigma), c1, c2, means, gradient)
    apply: Callable[..., Tensor] = _WithGradient.apply
    return apply(a, means, gradient)


def mirror(u: Tensor, t: Tensor, emphasis: Tensor, epsilon: float) -> Tensor:
    """``mean(W |z(u) - z(t)|)`` of each sample; its gradient reaches ``u`` alone.

    Args:
        u: the student's map, (B, C, H, W), float32 or bfloat16.
        t: the teacher's, likewise.
        emphasis: ``W``, (B, 1, H, W), float32.
        epsilon: added to the standard deviation.

    Returns:
        (B,), float32.
    """
    student, teacher = _channels_last(u.detach()), _channels_last(t.detach().to(u.dtype))
    means, gradient = emphasis.new_empty(len(u)), torch.empty_like(student)
    _call("mirror", student, student, teacher, emphasis.contiguous(), epsilon, means, gradient)
    apply: Callable[..., Tensor] = _WithGradient.apply
    return apply(u, means, gradient)


def to_image(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A ReLU, then a 3x3 convolution to three channels, padded by zeros, computed and returned in float32.

    Args:
        x: the maps, (B, C, H, W).
        weight: (3, C, 3, 3), float32.
        bias: (3,), float32.

    Returns:
        (B, 3, H, W), float32, channels last.
    """
    apply: Callable[..., Tensor] = _ToImage.apply
    return apply(_channels_last(x), weight, bias)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, window: Tensor) -> Tensor:
        images, channels, height, width = x.shape
        saved = w1.new_empty(images * (6 * channels + 2 * len(b1) + 4 * height * width))  # the kernel's ``Saved``
        y = torch.empty_like(x)
        _call("attend", x, x, len(b1), w1, b1, w2, b2, window, saved, y)
        ctx.save_for_backward(x, w1, b1, w2, b2, window, saved)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, *parameters, saved = ctx.saved_tensors
        w1, b1, w2, _, window = parameters
        grad_x, of_parameters = torch.empty_like(x), [torch.zeros_like(value) for value in parameters]
        grad = _channels_last(gradients[0])
        _call("attend_backward", x, grad, x, len(b1), w1, w2, window, saved, grad_x, *of_parameters)
        return grad_x, *of_parameters


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *layer: Any) -> Tensor:
        *given, ctx.eps, ctx.slope, ctx.count, ctx.add_up = layer
        ctx.save_for_backward(x, *given)
        y = torch.empty_like(x)
        _call("normalise", x, x, *given, ctx.eps, ctx.slope, y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, *given = ctx.saved_tensors
        layer = (*given, ctx.eps, ctx.slope)
        grad = _channels_last(gradients[0])
        local = given[0].new_empty((2, x.shape[1]))
        _call("normalise_sums", x, grad, x, *layer, local)
        total = ctx.add_up(local)
        grad_x = torch.empty_like(x)
        _call("normalise_backward", x, grad, x, *layer, total, ctx.count, grad_x)
        grad_bias, grad_weight = local
        return grad_x, None, None, grad_weight, grad_bias, None, None, None, None


class _ToImage(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        weight = weight.contiguous()
        ctx.save_for_backward(x, weight)
        images, _, height, width = x.shape
        y = weight.new_empty((images, height, width, 3))
        _call("to_image", x, x, weight, bias, y)
        return y.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = torch.empty_like(x), torch.empty_like(weight), weight.new_empty(3)
        grad = gradients[0].float().permute(0, 2, 3, 1).contiguous()
        _call("to_image_backward", x, grad, x, weight, grad_x, grad_weight, grad_bias)
        return grad_x, grad_weight, grad_bias


class _WithGradient(torch.autograd.Function):
    """Values by sample, (B,), whose gradient by ``x`` is known."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].to(gradient.dtype)[:, None, None, None], None, None


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


class _Shape(ctypes.Structure):
    """The ``Shape`` of blocks.h."""

    _fields_ = [(name, ctypes.c_int64) for name in ("bfloat16", "images", "channels", "height", "width")]


def _call(name: str, maps: Tensor, *arguments: Tensor | float | ctypes.c_double) -> None:
    """Call a kernel for maps of that shape and type; tensors are passed as pointers to their values."""
    for value in arguments:
        assert not isinstance(value, Tensor) or value.shape == maps.shape or value.is_contiguous(), name
    shape = _Shape(maps.dtype == torch.bfloat16, *maps.shape)
    getattr(library.load(), name)(ctypes.byref(shape), *map(_to_c, arguments))


def _to_c(argument: Tensor | float | ctypes.c_double) -> Any:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, float):
        return ctypes.c_float(argument)
    return ctypes.c_int64(argument) if isinstance(argument, int) else argument

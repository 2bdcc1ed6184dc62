"""Fake quantization as autograd functions: one step size for a tensor, or one for each channel.

Where a kernel serves the tensors (`kernels/`), it computes both directions, each in one pass over
memory. Elsewhere torch's operations do, here. Both give the same numbers, bit for bit, but for the
order of the sums of step sizes' gradients. Which one runs is chosen again in the backward pass:
somebody may watch one of the two.

Equations are those of LSQ (Esser et al., ICLR 2020); arguments those of `functional.fake_quantize`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from anyprec.kernels import (
    STEP_FLOOR,
    Grid,
    Sizes,
    kernel_for,
    narrowed,
    widened,
)
from anyprec.nn.channels import Axis, along, sizes_of_channels, sum_of_channels

Backward = Callable[..., tuple[Tensor | None, ...]]


def once_differentiated(backward: Backward) -> Backward:
    """As torch's `once_differentiable`, without its cost where nobody differentiates gradients."""
    guarded = once_differentiable(backward)

    def chosen(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return guarded(ctx, *gradients)
        return backward(ctx, *gradients)

    return chosen


def is_undifferentiated() -> bool:
    """Whether nothing that is computed now can have a gradient, in either direction."""
    return not torch.is_grad_enabled() and forward_ad._current_level < 0  # noqa: SLF001 (no public name)


def quantize_tensor(values: Tensor, step: Tensor, grid: Grid) -> tuple[Tensor, bool]:
    """Quantize with one step size, without gradient: the result, and whether a kernel made it."""
    kernel = kernel_for(values, step)
    if kernel is not None and 0 <= grid.row < step.numel():
        return kernel.quantize(values, step, grid), True
    scale = effective_step(step.reshape(-1)[grid.row])
    # In place on the one new tensor: three more of the size of an activation cost more time.
    result = ratio_of(values, scale).round_().clamp_(grid.qmin, grid.qmax).mul_(scale)
    return narrowed(result, values.dtype), False


def quantize_channels(values: Tensor, step: Tensor, axis: Axis, grid: Grid) -> Tensor:
    """Quantize with a step size for each channel, without gradient."""
    kernel = kernel_for(values, step)
    if kernel is not None:
        sizes = sizes_in_memory(values, step, grid.row, axis)
        if sizes is not None:
            return kernel.quantize(values, step, grid, sizes)
    scale = along(effective_step(_row_of(step, grid.row)), axis, values)
    result = (values / scale).round_().clamp_(grid.qmin, grid.qmax).mul_(scale)
    return narrowed(result, values.dtype)


class PerTensor(torch.autograd.Function):
    """One step size: entry `grid.row` of all that a quantizer has.

    Backward of a kernel needs the input alone. torch's operations keep the result, which others
    save anyway; one that may be changed in place is computed again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        step: Tensor,
        grid: Grid,
        keep_result: bool,  # noqa: FBT001 (autograd passes no names)
    ) -> Tensor:
        """See `functional.fake_quantize`."""
        ctx.grid = grid
        result, is_by_kernel = quantize_tensor(values, step, grid)
        keeps = keep_result and not is_by_kernel
        ctx.save_for_backward(values, step, result if keeps else None)
        return result

    @staticmethod
    @once_differentiated
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the values and of all step sizes."""
        values, step, result = ctx.saved_tensors
        gradients = tensor_backward(
            gradient, values, step, result, ctx.grid, needs_step=ctx.needs_input_grad[1]
        )
        return (*gradients, None, None)


class PerChannel(torch.autograd.Function):
    """A step size for each channel, for weights: row `grid.row` of all that a quantizer has.

    Keeps the latent weight; backward quantizes again.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, step: Tensor, axis: Axis, grid: Grid) -> Tensor:
        """See `functional.fake_quantize`."""
        ctx.save_for_backward(values, step)
        ctx.axis, ctx.grid = axis, grid
        return quantize_channels(values, step, axis, grid)

    @staticmethod
    @once_differentiated
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the values and of all step sizes."""
        values, step = ctx.saved_tensors
        gradients = channel_backward(
            gradient, values, step, ctx.axis, ctx.grid, needs_step=ctx.needs_input_grad[1]
        )
        return (*gradients, None, None)


def tensor_backward(
    gradient: Tensor,
    values: Tensor,
    step: Tensor,
    result: Tensor | None,
    grid: Grid,
    *,
    needs_step: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the values and of all step sizes, for one step size."""
    kernel = kernel_for(values, step, gradient)
    if kernel is not None:
        return kernel.quantize_backward(gradient, values, step, grid)
    return _tensor_gradients(gradient, values, step, result, grid, needs_step=needs_step)


def channel_backward(
    gradient: Tensor,
    values: Tensor,
    step: Tensor,
    axis: Axis,
    grid: Grid,
    *,
    needs_step: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the values and of all step sizes, for a step size for each channel."""
    kernel = kernel_for(values, step, gradient)
    sizes = None if kernel is None else sizes_in_memory(values, step, grid.row, axis)
    if kernel is None or sizes is None:
        return _channel_gradients(gradient, values, step, axis, grid, needs_step=needs_step)
    return kernel.quantize_backward(gradient, values, step, grid, sizes)


def effective_step(step: Tensor) -> Tensor:
    """Step sizes as they are used, without gradient.

    They are positive whatever an optimizer made of them, and have 32 bits at least: in float16 the
    smallest ones, and the floor, would be zero.
    """
    return widened(step.detach()).abs().clamp_min_(STEP_FLOOR)


def ratio_of(values: Tensor, scale: Tensor) -> Tensor:
    """`values` in step sizes: a new tensor, in 32 bits at least.

    Arithmetic of 16 bits would round the step size, and a small one to zero.
    """
    if values.element_size() < 4:
        return values.float().div_(scale)
    return values / scale


def sizes_in_memory(values: Tensor, step: Tensor, row: int, axis: Axis) -> Sizes | None:
    """How the channels lie in memory; None if a kernel cannot go through them there."""
    is_dense = values.is_contiguous() or (
        # The first axis is the outermost one in both layouts.
        axis == 0 and values.ndim == 4 and values.is_contiguous(memory_format=torch.channels_last)
    )
    if not is_dense:
        return None
    sizes = sizes_of_channels(values.shape, axis)
    if not 0 <= row < step.numel() // sizes.steps:
        return None
    return sizes


def _row_of(step: Tensor, row: int) -> Tensor:
    """The step sizes in use, shape `(channels,)`."""
    return step[row] if step.ndim > 1 else step


def _tensor_gradients(
    gradient: Tensor,
    values: Tensor,
    step: Tensor,
    result: Tensor | None,
    grid: Grid,
    *,
    needs_step: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients for one step size, by torch's operations."""
    row, qmin, qmax, factor = grid
    dtype, used = values.dtype, step.detach().reshape(-1)[row]
    scale = effective_step(used)
    if values.element_size() < 4:
        # The result that was kept is rounded to 16 bits: too coarse for the differences below.
        values, gradient, result = values.float(), gradient.float(), None
    if result is None:
        result = ratio_of(values, scale).round_().clamp_(qmin, qmax).mul_(scale)
        result = result.to(values.dtype)
    if values.device.type == "cpu" and not torch.compiler.is_compiling():
        # Reading the step size as a number costs nothing on a CPU and saves a pass over the
        # tensor.
        number = float(scale)
        measured, low, high = values, qmin * number, qmax * number
    else:
        measured, low, high = values / scale, qmin, qmax
    # Strict bounds: on the border the gradient is zero (Esser et al. 2020, equation 3).
    inside = torch.ops.aten.hardtanh_backward(gradient, measured, low, high)
    if not needs_step:
        return inside.to(dtype), None
    # Inside the range the code contributes round(v/s) - v/s, outside it qmin or qmax.
    # With y = s * code that is (y - v [inside]) / s everywhere, so two dot products give the
    # whole sum.
    total = (_dot(gradient, result) - _dot(inside, values)) / torch.copysign(scale, used)
    of_row = (total * factor).to(step.dtype)
    # Not in place: gradients may be batched.
    of_all = torch.zeros_like(step).reshape(-1).select_scatter(of_row, 0, row)
    return inside.to(dtype), of_all.reshape(step.shape)


def _channel_gradients(
    gradient: Tensor,
    values: Tensor,
    step: Tensor,
    axis: Axis,
    grid: Grid,
    *,
    needs_step: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients for a step size for each channel, by torch's operations."""
    row, qmin, qmax, factor = grid
    used = _row_of(step.detach(), row)
    ratio = values / along(effective_step(used), axis, values)
    # float32 step sizes make the ratio of a bfloat16 weight float32, and the next line needs one
    # dtype.
    gradient = gradient.to(ratio.dtype)
    inside = torch.ops.aten.hardtanh_backward(gradient, ratio, qmin, qmax)
    if not needs_step:
        return inside.to(values.dtype), None
    codes = ratio.round().clamp_(qmin, qmax)
    contributions = codes.mul_(gradient).addcmul_(inside, ratio, value=-1)
    signed_scale = torch.copysign(torch.full_like(used, factor), used)
    of_row = sum_of_channels(contributions, axis).to(step.dtype) * signed_scale
    if step.ndim > 1:
        of_row = torch.zeros_like(step).select_scatter(of_row, 0, row)
    return inside.to(values.dtype), of_row


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Sum of products. Dense tensors of the same layout (channels_last, too) are not copied."""
    is_channels_last = left.ndim == 4 and left.is_contiguous(memory_format=torch.channels_last)
    if is_channels_last and left.stride() == right.stride() and not left.is_contiguous():
        left, right = left.permute(0, 2, 3, 1), right.permute(0, 2, 3, 1)
    return torch.dot(left.reshape(-1), right.reshape(-1))

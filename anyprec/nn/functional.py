"""Fake quantization with the gradients of LSQ: stateless tensor maths.

Forward and backward of learned step size quantization (Esser et al., ICLR 2020, equations 1 to 5),
written as autograd functions (`straight_through.py`), because the chain of elementary operations
that autograd would differentiate costs an order of magnitude more memory traffic. No parameters
live here (see `quantizers.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anyprec.kernels import STEP_FLOOR, Grid, narrowed, widened
from anyprec.nn.channels import Axis, along
from anyprec.nn.straight_through import (
    PerChannel,
    PerTensor,
    effective_step,
    is_undifferentiated,
    quantize_channels,
    quantize_tensor,
    ratio_of,
)

__all__ = [
    "STEP_FLOOR",
    "dequantize",
    "effective_step",
    "fake_quantize",
    "fake_quantize_with",
    "integer_codes",
    "widened",
]


def fake_quantize(
    values: Tensor,
    step: Tensor,
    *,
    qmin: int,
    qmax: int,
    row: int | None = None,
    axis: Axis | None = None,
    gradient_scale: float = 1.0,
    keep_result: bool = True,
) -> Tensor:
    """Quantize and dequantize: `step * clamp(round(values / step), qmin, qmax)`.

    Halves are rounded to even.

    The gradient for `values` is passed straight through where `qmin < values / step < qmax` and is
    zero elsewhere; the gradient for `step` is that of LSQ (Esser et al. 2020, equation 3), times
    `gradient_scale`.

    Args:
        values: The tensor to quantize, of any shape and floating dtype; not changed.
        step: Step size(s): one element if `axis` is None, else one for each channel. The sign is
            ignored. With `row`, these of every candidate.
        qmin: Lowest integer code.
        qmax: Highest integer code.
        row: Which row of `step` to use: its gradient is made as a whole, with zeros in the other
            rows. None if `step` has no rows.
        axis: Channels of `values` for per-channel step sizes: an axis of it, or a `GroupedAxis`.
            None for one step size.
        gradient_scale: Factor on the gradient of `step`. LSQ (section 2.2) recommends
            `1 / sqrt(numel * qmax)`.
        keep_result: With one step size, the result may be kept for the backward pass. Without, that
            may take longer, but others may change the result in place.

    Returns:
        Fake-quantized values, with the shape and dtype of `values`.

    Shape:
        values: any; step: `()`, `(1,)` or `(channels,)`; with `row`: `(rows,)`, `(rows, 1)` or
        `(rows, channels)`.

    Example:
        >>> fake_quantize(torch.tensor([-3.0, 0.4, 0.6, 9.0]), torch.tensor(1.0), qmin=-2, qmax=1)
        tensor([-2., 0., 1., 1.])
    """
    grid = Grid(row or 0, qmin, qmax, gradient_scale)
    if is_undifferentiated():
        # An autograd function takes as long on the host as all else here.
        if axis is None:
            return quantize_tensor(values, step, grid)[0]
        return quantize_channels(values, step, axis, grid)
    if axis is None:
        result = PerTensor.apply(values, step, grid, keep_result)
    else:
        result = PerChannel.apply(values, step, axis, grid)
    return result  # type: ignore[no-any-return]


def fake_quantize_with(
    values: Tensor,
    step: Tensor,
    *,
    qmin: Tensor,
    qmax: Tensor,
    axis: Axis | None,
    gradient_scale: Tensor,
) -> Tensor:
    """`fake_quantize` with limits that are tensors: another bit-width is the same program.

    For compiled networks (`torch.compile`): the values and gradients are those of `fake_quantize`,
    computed by simple operations that a compiler fuses. In eager mode `fake_quantize` is faster.

    Shape:
        As `fake_quantize`; qmin, qmax, gradient_scale: `(1,)` or `()`.
    """
    ones = [1] * values.ndim
    limits = qmin.reshape(ones), qmax.reshape(ones)
    shaped = step.reshape(ones) if axis is None else along(step, axis, values)
    step, scale = shaped, gradient_scale.reshape(())
    return _WithLimits.apply(values, step, *limits, scale)  # type: ignore[no-any-return]


def integer_codes(
    values: Tensor, step: Tensor, *, qmin: int, qmax: int, axis: Axis | None = None
) -> Tensor:
    """The integer codes behind `fake_quantize`: `clamp(round(values / step), qmin, qmax)` as int32.

    Shape:
        As `fake_quantize`.
    """
    ratio = ratio_of(values, _scale(step, axis, values))
    return ratio.round_().clamp_(qmin, qmax).to(torch.int32)


def dequantize(codes: Tensor, step: Tensor, *, axis: Axis | None, dtype: torch.dtype) -> Tensor:
    """What `fake_quantize` makes of a tensor of `dtype` that has these integer codes, bit for bit.

    Args:
        codes: Integer codes, of any dtype; overwritten if it is the dtype of the computation.
        step: Step size(s), as in `fake_quantize`.
        axis: As in `fake_quantize`.
        dtype: Of the tensor that was quantized, and of the result.
    """
    scale = _scale(step, axis, codes)
    computed = torch.result_type(torch.empty((1,), dtype=dtype, device=codes.device), scale)
    if computed.itemsize < 4:
        computed = torch.float32
    return narrowed(codes.to(computed).mul_(scale), dtype)


class _WithLimits(torch.autograd.Function):
    """Limits are tensors. Keeps the values; backward quantizes again."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, step: Tensor, qmin: Tensor, qmax: Tensor, gradient_scale: Tensor
    ) -> Tensor:
        ctx.save_for_backward(values, step, qmin, qmax, gradient_scale)
        scale = effective_step(step)
        # Not in place: a compiler fuses these into one kernel.
        result = torch.clamp(torch.round(values / scale), qmin, qmax) * scale
        return narrowed(result, values.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, step, qmin, qmax, gradient_scale = ctx.saved_tensors
        ratio = values / effective_step(step)
        # Strict bounds: on the border the gradient is zero (Esser et al. 2020, equation 3).
        inside = (ratio > qmin) & (ratio < qmax)
        codes = torch.clamp(torch.round(ratio), qmin, qmax)
        contributions = gradient * (codes - torch.where(inside, ratio, 0))
        # One sum for each step size: over the dimensions along which it was broadcast.
        dims = [dim for dim in range(values.ndim) if step.shape[dim] == 1]
        step_gradient = (contributions.sum(dim=dims, keepdim=True) * gradient_scale).to(
            step.dtype
        ) * _sign(step)
        return torch.where(inside, gradient, 0).to(values.dtype), step_gradient, None, None, None


def _scale(step: Tensor, axis: Axis | None, values: Tensor) -> Tensor:
    """Effective step sizes, shaped to multiply `values`."""
    if axis is None:
        # Without axes, so that a float32 step size does not promote a bfloat16 tensor.
        return effective_step(step.reshape(()))
    return along(effective_step(step), axis, values)


def _sign(step: Tensor) -> Tensor:
    return torch.where(step < 0, -1.0, 1.0).to(step.dtype)

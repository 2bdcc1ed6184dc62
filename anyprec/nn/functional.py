"""Fake quantization with the gradients of LSQ: stateless tensor maths.

Forward and backward of learned step size quantization (Esser et al., ICLR 2020, equations 1 to 5),
written as one autograd function, because the chain of elementary operations that autograd would
differentiate costs an order of magnitude more memory traffic. No parameters live here (see
`quantizers.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from anyprec.nn.channels import Axis, along, sum_of_channels

STEP_FLOOR = 2.0**-120
"""Step sizes are used as `max(|step|, STEP_FLOOR)`.

So an optimizer step across zero cannot corrupt a layer. Products of it and a code are still normal
numbers of float32, and no weight is too small to be quantized: a norm behind it may enlarge it.
"""


def fake_quantize(
    values: Tensor,
    step: Tensor,
    *,
    qmin: int,
    qmax: int,
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
            ignored.
        qmin: Lowest integer code.
        qmax: Highest integer code.
        axis: Channels of `values` for per-channel step sizes: an axis of it, or a `GroupedAxis`.
            None for one step size.
        gradient_scale: Factor on the gradient of `step`. LSQ (section 2.2) recommends
            `1 / sqrt(numel * qmax)`.
        keep_result: With one step size, keep the result for the backward pass. Without, that takes
            longer, but others may change the result in place.

    Returns:
        Fake-quantized values, with the shape and dtype of `values`.

    Shape:
        values: any; step: `()`, `(1,)` or `(channels,)`.

    Example:
        >>> fake_quantize(torch.tensor([-3.0, 0.4, 0.6, 9.0]), torch.tensor(1.0), qmin=-2, qmax=1)
        tensor([-2., 0., 1., 1.])
    """
    if axis is None:
        result = _PerTensor.apply(values, step, qmin, qmax, gradient_scale, keep_result)
    else:
        result = _PerChannel.apply(values, step, axis, qmin, qmax, gradient_scale)
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
    ratio = _ratio(values, _scale(step, axis, values))
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
    if computed == torch.float16:
        computed = torch.float32
    return _narrowed(codes.to(computed).mul_(scale), dtype)


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
        return _narrowed(result, values.dtype)

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


class _PerTensor(torch.autograd.Function):
    """One step size. Works in place forward.

    Backward needs the input and the result, which other operations save anyway. A result that may
    be changed in place is computed again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        step: Tensor,
        qmin: int,
        qmax: int,
        gradient_scale: float,
        keep_result: bool,  # noqa: FBT001 (autograd passes no names)
    ) -> Tensor:
        scale = effective_step(step.reshape(()))
        # In place on the one new tensor: three more of the size of an activation cost more time.
        result = _ratio(values, scale).round_().clamp_(qmin, qmax).mul_(scale)
        result = _narrowed(result, values.dtype)
        ctx.save_for_backward(values, step, scale, result if keep_result else None)
        ctx.constants = qmin, qmax, gradient_scale
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, step, scale, result = ctx.saved_tensors
        qmin, qmax, gradient_scale = ctx.constants
        dtype = values.dtype
        if dtype == torch.float16:
            # The result that was kept is rounded to float16: too coarse for the differences below.
            values, gradient, result = values.float(), gradient.float(), None
        if result is None:
            result = _ratio(values, scale).round_().clamp_(qmin, qmax).mul_(scale)
            result = result.to(values.dtype)
        if values.device.type == "cpu" and not torch.compiler.is_compiling():
            # Reading the step size as a number costs nothing on a CPU and saves a pass over the
            # tensor.
            number = float(scale)
            measured, low, high = values, qmin * number, qmax * number
        else:
            measured, low, high = values / scale, qmin, qmax
        inside = torch.ops.aten.hardtanh_backward(gradient, measured, low, high)
        if not ctx.needs_input_grad[1]:
            return inside.to(dtype), None, None, None, None, None
        # Inside the range the code contributes round(v/s) - v/s, outside it qmin or qmax.
        # With y = s * code that is (y - v [inside]) / s everywhere, so two dot products give the
        # whole sum.
        step_gradient = (_dot(gradient, result) - _dot(inside, values)) / torch.copysign(
            scale, step.reshape(())
        )
        step_gradient = (step_gradient * gradient_scale).to(step.dtype).reshape(step.shape)
        return inside.to(dtype), step_gradient, None, None, None, None


class _PerChannel(torch.autograd.Function):
    """A step size per channel, for weights. Keeps the latent weight; backward quantizes again."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        step: Tensor,
        axis: Axis,
        qmin: int,
        qmax: int,
        gradient_scale: float,
    ) -> Tensor:
        scale = along(effective_step(step), axis, values)
        ctx.save_for_backward(values, step, scale)
        ctx.constants = axis, qmin, qmax, gradient_scale
        result = (values / scale).round_().clamp_(qmin, qmax).mul_(scale)
        return _narrowed(result, values.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        values, step, scale = ctx.saved_tensors
        axis, qmin, qmax, gradient_scale = ctx.constants
        ratio = values / scale
        # float32 step sizes make the ratio of a bfloat16 weight float32, and the next line needs
        # one dtype.
        gradient = gradient.to(ratio.dtype)
        inside = torch.ops.aten.hardtanh_backward(gradient, ratio, qmin, qmax)
        if not ctx.needs_input_grad[1]:
            return inside.to(values.dtype), None, None, None, None, None
        codes = ratio.round().clamp_(qmin, qmax)
        contributions = codes.mul_(gradient).addcmul_(inside, ratio, value=-1)
        signed_scale = torch.copysign(torch.full_like(step, gradient_scale), step)
        step_gradient = sum_of_channels(contributions, axis).to(step.dtype) * signed_scale
        return inside.to(values.dtype), step_gradient, None, None, None, None


def effective_step(step: Tensor) -> Tensor:
    """Step sizes as they are used, without gradient.

    They are positive whatever an optimizer made of them, and have 32 bits at least: in float16 the
    smallest ones, and the floor, would be zero.
    """
    return widened(step.detach()).abs().clamp_min_(STEP_FLOOR)


def widened(values: Tensor) -> Tensor:
    """`values` in at least 32 bits."""
    if values.element_size() < 4:
        return values.float()
    return values


def _ratio(values: Tensor, scale: Tensor) -> Tensor:
    """`values` in step sizes: a new tensor, of their dtype or wider."""
    if values.dtype == torch.float16:
        # Arithmetic of one dtype would round the step size to it, and a small one to zero.
        return values.float().div_(scale)
    return values / scale


def _narrowed(result: Tensor, dtype: torch.dtype) -> Tensor:
    """The result of a computation, in the dtype that was asked for."""
    if dtype == torch.float16 and result.dtype != dtype:
        # The code next to the largest number may stand for one beyond it.
        limit = torch.finfo(dtype).max
        result = result.clamp(-limit, limit)
    return result.to(dtype)


def _scale(step: Tensor, axis: Axis | None, values: Tensor) -> Tensor:
    """Effective step sizes, shaped to multiply `values`."""
    if axis is None:
        # Without axes, so that a float32 step size does not promote a bfloat16 tensor.
        return effective_step(step.reshape(()))
    return along(effective_step(step), axis, values)


def _sign(step: Tensor) -> Tensor:
    return torch.where(step < 0, -1.0, 1.0).to(step.dtype)


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Sum of products. Dense tensors of the same layout (channels_last, too) are not copied."""
    is_channels_last = left.ndim == 4 and left.is_contiguous(memory_format=torch.channels_last)
    if is_channels_last and left.stride() == right.stride() and not left.is_contiguous():
        left, right = left.permute(0, 2, 3, 1), right.permute(0, 2, 3, 1)
    return torch.dot(left.reshape(-1), right.reshape(-1))

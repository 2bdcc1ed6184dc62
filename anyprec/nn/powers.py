"""Powers of two: to scale numbers without rounding, and as step sizes of targets that shift."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anyprec.nn.functional import STEP_FLOOR, effective_step

_EXPONENT = 0x7F800000
"""The bits of a float32 that hold its exponent."""


def power_of_two(values: Tensor) -> Tensor:
    """The largest powers of two that are not above `values`, which are float32 and not negative.

    To divide by them and to multiply by them again rounds nothing. They and their reciprocals are
    normal numbers, so those of extreme values are only near them.
    """
    return _without_mantissa(values).clamp_(2.0**-100, 2.0**100)


def power_of_two_step(step: Tensor) -> Tensor:
    """The power of two nearest to each step size, on the scale of logarithms.

    `2^round(log2(effective step))`, exact on every machine. The gradient of the rounding is passed
    straight through, as in `fake_quantize`: what remains is the power over the step size.

    Args:
        step: Step sizes, of any shape. The sign is ignored; NaN stays NaN.

    Returns:
        Positive powers of two, in the shape of `step` and in float32 at least, from `STEP_FLOOR`
        to 2^127.

    Example:
        >>> power_of_two_step(torch.tensor([0.7, 0.71, -0.3, 1.0]))
        tensor([0.5000, 1.0000, 0.2500, 1.0000])
    """
    return _PowerOfTwo.apply(step)  # type: ignore[no-any-return]


class _PowerOfTwo(torch.autograd.Function):
    """Keeps the step sizes; the gradient is that of all but the rounding."""

    @staticmethod
    def forward(ctx: Any, step: Tensor) -> Tensor:
        scale = effective_step(step)
        # The mantissa of `sqrt(2) * scale` is cut off, so that logarithms are rounded.
        power = _without_mantissa(scale.float() * 2**0.5).clamp_(STEP_FLOOR, 2.0**127)
        power = torch.where(torch.isnan(scale), scale, power.to(scale.dtype))
        ctx.save_for_backward(step, scale, power)
        return power

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        step, scale, power = ctx.saved_tensors
        sign: Tensor = torch.where(step < 0, -1.0, 1.0)
        product: Tensor = sign * gradient * power / scale
        return product.to(step.dtype)


def _without_mantissa(values: Tensor) -> Tensor:
    """float32 values with the exponent alone."""
    return (values.view(torch.int32) & _EXPONENT).view(torch.float32)

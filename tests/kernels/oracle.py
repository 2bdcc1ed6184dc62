"""Fake quantization by the equations, element by element, in float64. No torch autograd."""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 2.0**-120


def step_gradient(
    gradient: Tensor, values: Tensor, step: Tensor, qmin: int, qmax: int
) -> tuple[Tensor, Tensor]:
    """The gradient of one step size, and the sum of the magnitudes of what it is a sum of.

    The ratio is that of float32, so that rounding and range are the same as in what is tested.
    """
    size = step.abs().clamp_min(FLOOR)
    ratio = values.float() / size
    codes = ratio.round().clamp(qmin, qmax).double()
    exact = values.double() / size.double()
    inside = (ratio > qmin) & (ratio < qmax)
    contributions = gradient.double() * (codes - torch.where(inside, exact, 0))
    total = contributions.sum() * (-1 if step < 0 else 1)
    return total, contributions.abs().sum()

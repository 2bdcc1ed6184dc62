"""Mean and spread of a weight's output channels, and giving a quantized weight those of the latent.

Method of Banner et al. (NeurIPS 2019, section 3.3) and EMQNet (arXiv:2510.20673).
"""

from __future__ import annotations

import torch
from torch import Tensor

from anyprec.nn.channels import Axis, GroupedAxis, along, rows_of_channels
from anyprec.nn.functional import STEP_FLOOR
from anyprec.nn.powers import power_of_two


def match_moments(quantized: Tensor, weight: Tensor, *, axis: Axis) -> Tensor:
    """Give each channel of a quantized weight the mean and spread of the latent one.

    `(q - mean(q)) * |w - mean(w)| / |q - mean(q)| + mean(w)` for every output channel. So the
    output of a layer has nearly the same mean and variance at every bit-width, and one BatchNorm
    can serve them all. Mean and stretch are constants for the gradient.

    Args:
        quantized: The fake-quantized weight.
        weight: The latent weight, of the same shape.
        axis: Where the output channels are.

    Returns:
        The corrected weight, differentiable in `quantized`.
    """
    return with_moments(quantized, *moments(weight, axis=axis), axis=axis)


@torch.no_grad()
def moments(weight: Tensor, *, axis: Axis) -> tuple[Tensor, Tensor]:
    """Mean and spread of every output channel, in float32.

    The spread is the length of the deviation from the mean.

    Shape:
        Both results: `(channels,)`.
    """
    values = weight.detach().float()
    if values.ndim == 1:
        return values, torch.zeros_like(values)
    if isinstance(axis, GroupedAxis):
        values, axis = rows_of_channels(values, axis), 0
    dims = [dim for dim in range(values.ndim) if dim != axis]
    mean = values.mean(dims, keepdim=True)
    deviation = values - mean
    # Squares of small numbers are zero, so a channel is brought to about 1 first, and back.
    scale = power_of_two(deviation.abs().amax(dims, keepdim=True))
    length = deviation.div_(scale).square_().sum(dims).sqrt()
    return mean.flatten(), length.mul_(scale.flatten())


def with_moments(
    quantized: Tensor, mean: Tensor, spread: Tensor, *, axis: Axis, inplace: bool = False
) -> Tensor:
    """`match_moments` to these moments of the latent weight; `inplace` overwrites `quantized`."""
    if quantized.ndim == 1:
        return quantized
    with torch.no_grad():
        present_mean, present_spread = moments(quantized, axis=axis)
        # A channel that rounds to one code everywhere has no spread to stretch, but for the
        # rounding of its mean.
        rounding = 4 * torch.finfo(torch.float32).eps * (quantized.numel() / len(mean)) ** 0.5
        least = (present_mean.abs() * rounding).clamp_min_(STEP_FLOOR)
        factor = spread / present_spread.clamp_min(STEP_FLOOR)
        stretch = torch.where(present_spread > least, factor, 1.0)
        shift = along(mean - present_mean * stretch, axis, quantized).to(quantized.dtype)
        stretch = along(stretch, axis, quantized).to(quantized.dtype)
    if inplace:
        return quantized.mul_(stretch).add_(shift)
    return quantized * stretch + shift

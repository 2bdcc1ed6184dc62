"""The search for the step sizes and zero points of least squared quantization error.

Only numbers go in and out: the values that are to be quantized and the ranges of their codes. Which
values those are is the matter of `step_sizes`. For fixed codes q the best step size of values v is
<v, q> / <q, q>, so a grid of starting points is refined by taking codes and step size in turn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from anyprec.errors import CalibrationError
from anyprec.nn.functional import STEP_FLOOR
from anyprec.nn.powers import power_of_two, power_of_two_step
from anyprec.nn.quantizers import InputQuantizer, WeightQuantizer, usable_steps

_GRID = (0.1, 0.15, 0.2, 0.27, 0.35, 0.45, 0.55, 0.67, 0.8, 1.0)
"""Clipping points to start from, as fractions of the largest magnitude."""

_REFINEMENTS = 4

_POWERS = 20
"""Powers of two that are tried: the lowest clips all but a millionth of the range."""

_CHUNK = 2**18
"""Weights whose step sizes are sought together."""


def weight_steps(weight: Tensor, quantizer: WeightQuantizer) -> Tensor:
    """Step sizes of least squared error for every candidate.

    Shape:
        The result is `(len(candidates), channels or 1)`.

    Raises:
        CalibrationError: `weight` is not finite.
    """
    rows = quantizer.per_channel(weight.detach().float())
    if not torch.isfinite(rows).all():
        msg = "a weight holds NaN or infinite values: calibrate a network with finite weights"
        raise CalibrationError(msg)
    # In chunks that stay in the CPU's cache, since the search passes over each of them many times.
    chunks = rows.split(max(1, _CHUNK // rows.shape[1]))
    steps = []
    for index in range(len(quantizer.candidates)):
        qmin, qmax = quantizer.limits(index)
        step = torch.cat([_least_squares(chunk, qmin, qmax) for chunk in chunks])
        steps.append(usable_steps(step, weight))
    return torch.stack(steps)


def input_grid(sample: Tensor, quantizer: InputQuantizer) -> tuple[Tensor, Tensor]:
    """Step sizes and zero points of least squared error for every candidate of its own.

    Only the grids that the quantizer's rule allows are searched. Where it allows any zero point, an
    input that may be negative gets the better of a symmetric grid and one placed on the sample's
    range.

    Args:
        sample: Values of the input, flat.
        quantizer: Knows the candidates, its rule, and whether the input is known to be never
            negative.

    Shape:
        Each result is `(len(own_candidates),)`.
    """
    row = sample.float().reshape(1, -1)
    if not quantizer.own_candidates:
        return row.new_empty(0), torch.empty(0, dtype=torch.int32)
    # As in `_least_squares`: the errors of grids are compared, too.
    scale = power_of_two(row.abs().amax())
    row = row / scale
    find = _best_power if quantizer.rule.scale == "power-of-two" else _least_squares
    steps, zeros = [], []
    for bits in quantizer.own_candidates:
        choices = _allowed_zero_points(quantizer, row, bits)
        grids = [_grid_at(zero, row, bits, find) for zero in choices]
        best = min(grids, key=lambda grid: grid.squared_error)
        # An input that is always zero has no best step size: take a range of 1.
        usable = best.step > STEP_FLOOR
        step = best.step * scale if usable else best.step.new_tensor(1.0 / (2**bits - 1))
        steps.append(power_of_two_step(step) if find is _best_power else step)
        zeros.append(best.zero)
    return torch.stack(steps), torch.tensor(zeros, dtype=torch.int32)


class _Grid(NamedTuple):
    zero: int
    step: Tensor
    squared_error: float


_StepSearch = Callable[[Tensor, int, int], Tensor]
"""From rows of values, the lowest and the highest code to a step size for each row."""


def _grid_at(zero: int, row: Tensor, bits: int, find: _StepSearch) -> _Grid:
    """The best grid with this zero point for the single row of `row`."""
    qmin, qmax = -zero, 2**bits - 1 - zero
    step = find(row, qmin, qmax)
    return _Grid(zero, step[0], float(_squared_error(row, step, qmin, qmax)))


def _allowed_zero_points(quantizer: InputQuantizer, row: Tensor, bits: int) -> list[int]:
    """The zero points to choose from at a bit-width."""
    rule = quantizer.rule
    if quantizer.nonnegative or rule.grid != "affine":
        return [rule.start(bits, nonnegative=quantizer.nonnegative)]
    return _zero_points(row, bits)


def _zero_points(row: Tensor, bits: int) -> list[int]:
    """The symmetric zero point first (it wins ties), then those that fit the range and its bulk."""
    top = 2**bits - 1
    choices = [2 ** (bits - 1)]
    for tail in (0.0, 0.001, 0.01):
        low = min(float(torch.quantile(row, tail)), 0.0)
        high = max(float(torch.quantile(row, 1 - tail)), 0.0)
        if high > low:
            rounded_down = int(-low / (high - low) * top)
            choices += [min(top, max(0, zero)) for zero in (rounded_down, rounded_down + 1)]
    return list(dict.fromkeys(choices))


def _least_squares(rows: Tensor, qmin: int, qmax: int) -> Tensor:
    """For each row, the step size with the least squared error that the search finds."""
    # Squares of small numbers are zero, and of large ones infinite: rows are brought to about 1
    # first, and their step sizes back.
    scale = power_of_two(rows.abs().amax(dim=1))
    return _search(rows / scale[:, None], qmin, qmax) * scale


def _best_power(rows: Tensor, qmin: int, qmax: int) -> Tensor:
    """For each row, the power of two with the least squared error, the largest of equals.

    All are tried from the first that clips nothing down to where nearly all values are clipped.
    The largest magnitude of a row must be about 1, or the row zero.
    """
    highest = power_of_two_step(2**0.5 * _unclipped(rows, qmin, qmax))
    best, best_error = highest, _squared_error(rows, highest, qmin, qmax)
    for exponent in range(1, _POWERS):
        step = (highest * 2.0**-exponent).clamp_min(STEP_FLOOR)
        error = _squared_error(rows, step, qmin, qmax)
        best = torch.where(error < best_error, step, best)
        best_error = torch.minimum(error, best_error)
    return best


def _unclipped(rows: Tensor, qmin: int, qmax: int) -> Tensor:
    """The step sizes with which the largest magnitudes are just not clipped."""
    return torch.maximum(rows.amax(dim=1) / max(qmax, 1), -rows.amin(dim=1) / max(-qmin, 1))


def _search(rows: Tensor, qmin: int, qmax: int) -> Tensor:
    """`_least_squares` of rows whose largest magnitude is about 1, or zero."""
    unclipped = _unclipped(rows, qmin, qmax)
    best = unclipped.clamp_min(STEP_FLOOR)
    best_error = _squared_error(rows, best, qmin, qmax)
    for fraction in _GRID:
        step = (unclipped * fraction).clamp_min(STEP_FLOOR)
        error = _squared_error(rows, step, qmin, qmax)
        best = torch.where(error < best_error, step, best)
        best_error = torch.minimum(error, best_error)
    for _ in range(_REFINEMENTS):
        # Neither new codes nor the optimum for them can raise the error.
        codes = _codes(rows, best, qmin, qmax)
        energy = (codes * codes).sum(dim=1)
        step = torch.where(energy > 0, (rows * codes).sum(dim=1) / energy.clamp_min(1), best)
        step = step.clamp_min(STEP_FLOOR)
        error = _squared_error(rows, step, qmin, qmax)
        best = torch.where(error < best_error, step, best)
        best_error = torch.minimum(error, best_error)
    return best


def _codes(rows: Tensor, step: Tensor, qmin: int, qmax: int) -> Tensor:
    return (rows / step[:, None]).round_().clamp_(qmin, qmax)


def _squared_error(rows: Tensor, step: Tensor, qmin: int, qmax: int) -> Tensor:
    difference = _codes(rows, step, qmin, qmax).mul_(step[:, None]).sub_(rows)
    return difference.square_().sum(dim=1)

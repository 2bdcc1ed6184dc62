"""The search for the step sizes and zero points of least squared quantization error.

Only numbers go in and out: the values that are to be quantized and the ranges of their codes. Which
values those are is the matter of `step_sizes`. For fixed codes q the best step size of values v is
<v, q> / <q, q>, so a grid of starting points is refined by taking codes and step size in turn.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from anyprec.nn.functional import STEP_FLOOR
from anyprec.nn.powers import power_of_two, power_of_two_step
from anyprec.nn.quantizers import InputQuantizer, WeightQuantizer, usable_steps
from anyprec.runtime.transfers import numbers_of

_GRID = (0.1, 0.15, 0.2, 0.27, 0.35, 0.45, 0.55, 0.67, 0.8, 1.0)
"""Clipping points to start from, as fractions of the largest magnitude."""

_REFINEMENTS = 4

_TAILS = (0.0, 0.001, 0.01)
"""Shares of the values that a zero point leaves beyond either end of the range."""

_POWERS = 20
"""Powers of two that are tried: the lowest clips all but a millionth of the range."""

_CHUNK = 2**18
"""Weights whose step sizes are sought together."""


def weight_steps(weight: Tensor, quantizer: WeightQuantizer) -> Tensor:
    """Step sizes of least squared error for every candidate.

    Args:
        weight: Finite values.
        quantizer: Knows the candidates and the channels.

    Shape:
        The result is `(len(candidates), channels or 1)`.
    """
    rows = quantizer.per_channel(weight.detach().float())
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
        Each result is `(len(own_candidates),)`; zero points are on the CPU.
    """
    return input_grids({"": sample}, {"": quantizer})[""]


def input_grids(
    samples: Mapping[str, Tensor], quantizers: Mapping[str, InputQuantizer]
) -> dict[str, tuple[Tensor, Tensor]]:
    """`input_grid` of many inputs, by path; a device is waited for twice in all."""
    rows: dict[str, _Row] = {}
    free: dict[str, Tensor] = {}
    for path, quantizer in quantizers.items():
        rows[path] = _Row(samples[path])
        if _chooses_zero_point(quantizer):
            free[path] = rows[path].values
    ranges = _ranges(free)
    steps: dict[str, Tensor] = {}
    zero_points: list[Tensor] = []
    for path, quantizer in quantizers.items():
        steps[path], zeros = _best_grids(rows[path], quantizer, ranges.get(path, []))
        zero_points += zeros
    numbers = iter(numbers_of(zero_points))
    grids: dict[str, tuple[Tensor, Tensor]] = {}
    for path, step in steps.items():
        zeros_on_host = list(itertools.islice(numbers, len(step)))
        grids[path] = step, torch.tensor(zeros_on_host, dtype=torch.int32)
    return grids


class _Row:
    """A sample as one row whose largest magnitude is about 1, or zero.

    Attributes:
        values: Shape `(1, values)`.
        scale: What they were divided by, a power of two. As in `_least_squares`: the errors of
            grids are compared, too.
    """

    def __init__(self, sample: Tensor) -> None:
        row = sample.float().reshape(1, -1)
        self.scale = power_of_two(row.abs().amax())
        self.values = row / self.scale


def _best_grids(
    row: _Row, quantizer: InputQuantizer, ranges: list[tuple[float, float]]
) -> tuple[Tensor, list[Tensor]]:
    """The best step sizes, and the zero point of every candidate.

    Args:
        row: The sample.
        quantizer: Knows the candidates and its rule.
        ranges: Those that zero points may be placed on.
    """
    if not quantizer.own_candidates:
        return row.values.new_empty(0), []
    find = _best_power if quantizer.rule.scale == "power-of-two" else _least_squares
    steps, zeros = [], []
    for bits in quantizer.own_candidates:
        allowed = _allowed_zero_points(quantizer, ranges, bits)
        grids = [_grid_at(zero, row.values, bits, find) for zero in allowed]
        steps_at, errors = map(torch.stack, zip(*grids, strict=True))
        best = errors.argmin().reshape(1)  # the first zero point wins ties
        step = steps_at.gather(0, best)[0]
        # An input that is always zero has no best step size: take a range of 1.
        step = torch.where(step > STEP_FLOOR, step * row.scale, 1.0 / (2**bits - 1))
        steps.append(power_of_two_step(step) if find is _best_power else step)
        zeros.append(torch.tensor(allowed, device=best.device).gather(0, best)[0])
    return torch.stack(steps), zeros


_StepSearch = Callable[[Tensor, int, int], Tensor]
"""From rows of values, the lowest and the highest code to a step size for each row."""


def _grid_at(zero: int, row: Tensor, bits: int, find: _StepSearch) -> tuple[Tensor, Tensor]:
    """The best step size with this zero point for a single row, and its squared error."""
    qmin, qmax = -zero, 2**bits - 1 - zero
    step = find(row, qmin, qmax)
    return step[0], _squared_error(row, step, qmin, qmax)[0]


def _chooses_zero_point(quantizer: InputQuantizer) -> bool:
    """Whether the zero point depends on the sample."""
    is_free = not quantizer.nonnegative and quantizer.rule.grid == "affine"
    return is_free and bool(quantizer.own_candidates)


def _allowed_zero_points(
    quantizer: InputQuantizer, ranges: list[tuple[float, float]], bits: int
) -> list[int]:
    """The zero points to choose from at a bit-width."""
    if not _chooses_zero_point(quantizer):
        return [quantizer.rule.start(bits, nonnegative=quantizer.nonnegative)]
    return _zero_points(ranges, bits)


def _ranges(rows: Mapping[str, Tensor]) -> dict[str, list[tuple[float, float]]]:
    """For each row its range and that of its bulk, extended to zero."""
    ends: list[Tensor] = []
    for row in rows.values():
        for tail in _TAILS:
            ends += [torch.quantile(row, tail), torch.quantile(row, 1 - tail)]
    numbers = iter(numbers_of(ends))
    ranges: dict[str, list[tuple[float, float]]] = {}
    for path in rows:
        ranges[path] = []
        for _ in _TAILS:
            ranges[path].append((min(next(numbers), 0.0), max(next(numbers), 0.0)))
    return ranges


def _zero_points(ranges: list[tuple[float, float]], bits: int) -> list[int]:
    """The symmetric zero point first (it wins ties), then those that fit the ranges."""
    top = 2**bits - 1
    choices = [2 ** (bits - 1)]
    for low, high in ranges:
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

"""Cells: a small integer for each weight that determines its code at every candidate bit-width.

The rounding thresholds of all candidates, `(code + 1/2) * step size`, cut the weight axis of a
channel into cells: one more than there are thresholds, 120 for the candidates {2, 3, 4, 5, 6} and
375 with 8. Codes never fall as the weight grows, and each threshold raises one code by one. So the
number of a weight's cell is the sum of its codes, each counted from its lowest. It is taken from
the codes alone: no threshold computed in floating point takes part. Everything here is on the CPU.

Back from cells to codes, the order of a channel's thresholds determines which candidate each
threshold below the weight belongs to. It is the order of products of a float32 and a number of 9
bits. float64 holds these exactly, so the order is the same on every machine. A weight within a
rounding error of two thresholds at once can have codes that do not follow from the order.
`exceptions_of` finds these by comparing every code, and their codes are stored besides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from anyprec.nn.functional import effective_step

_CHUNK = 2**22
"""Table entries computed at a time."""

_POINT_LIMIT = 32_000
"""Largest point: within int16, with room for the outermost cells."""

_MARGIN = 2.0**-20
"""Least distance of a point from a border of its cell, as a share of the border.

It is far above the rounding errors, below 2^-22, of the float32 arithmetic that makes codes of
points.
"""


@dataclass(frozen=True)
class Exceptions:
    """Weights whose codes the cells do not determine.

    Attributes:
        places: In the flattened rows, ascending, int64, shape `(n,)`.
        codes: Their codes, int8, shape `(candidates, n)`.
    """

    places: Tensor
    codes: Tensor


def cell_count(candidates: Sequence[int]) -> int:
    """Number of cells that the thresholds of these bit-widths make."""
    return 1 + sum((1 << bits) - 1 for bits in candidates)


def cells_of(codes: Sequence[Tensor], candidates: Sequence[int]) -> Tensor:
    """The cell of every weight, int16.

    Args:
        codes: The integer codes at each candidate, all of one shape.
        candidates: The bit-widths.
    """
    cells = torch.zeros(codes[0].shape, dtype=torch.int16, device=codes[0].device)
    for codes_at, bits in zip(codes, candidates, strict=True):
        cells += (codes_at + 2 ** (bits - 1)).to(torch.int16)
    return cells


def exceptions_of(
    cells: Tensor, codes: Sequence[Tensor], steps: Tensor, candidates: Sequence[int]
) -> Exceptions:
    """The weights whose codes do not follow from their cells: every code is compared.

    Args:
        cells: Cells, a row for each channel.
        codes: The integer codes at each candidate, in the shape of `cells`.
        steps: Step sizes, shape `(candidates, channels)`.
        candidates: The bit-widths.
    """
    wrong = torch.zeros(cells.shape, dtype=torch.bool, device=cells.device)
    for rows, order in _orders(steps, candidates):
        index = cells[rows].long()
        for number, codes_at in enumerate(codes):
            wrong[rows] |= order.codes(number).gather(1, index) != codes_at[rows]
    places = wrong.flatten().nonzero().flatten()
    listed = [codes_at.flatten()[places].to(torch.int8) for codes_at in codes]
    return Exceptions(places, torch.stack(listed))


@dataclass(frozen=True)
class Points:
    """What `anyprec.nn.packed.PackedOperand` keeps of the cells, as rows of channels."""

    points: Tensor
    ratios: Tensor
    listed: Exceptions


def points_of(
    cells: Tensor, steps: Tensor, candidates: Sequence[int], exceptions: Exceptions
) -> Points:
    """A point of each cell, in units so small that nearly every cell has one.

    Args:
        cells: Cells, a row for each channel.
        steps: Step sizes, shape `(candidates, channels)`.
        candidates: The bit-widths.
        exceptions: The weights whose codes the cells do not determine.
    """
    if len(candidates) == 1:  # the only code is its own point
        points = (cells - 2 ** (candidates[0] - 1)).to(torch.int8)
        return Points(points, torch.ones_like(steps, dtype=torch.float32), exceptions)
    points = torch.empty_like(cells)
    ratios = torch.empty(steps.shape, dtype=torch.float32, device=steps.device)
    pointless: list[tuple[Tensor, Tensor]] = []
    for rows, order in _orders(steps, candidates):
        table, unit, usable = _choose(order.thresholds)
        index = cells[rows].long()
        points[rows] = table.gather(1, index)
        ratios[:, rows] = (unit / order.steps).float()
        # Of cells too narrow for a point of their own, the codes are listed instead.
        row, column = (~usable.gather(1, index)).nonzero(as_tuple=True)
        if len(row):
            cell = index[row, column]
            codes = [order.codes(number)[row, cell] for number in range(len(candidates))]
            places = (row + rows.start) * cells.shape[1] + column
            pointless.append((places, torch.stack(codes).to(torch.int8)))
    return Points(points, ratios, _joined(pointless, exceptions))


@dataclass(frozen=True)
class _Order:
    """The thresholds of some channels in ascending order.

    Attributes:
        steps: Effective step sizes, float64, shape `(candidates, channels)`.
        candidates: The bit-widths.
        unsorted: The thresholds of one candidate after the other, float64, shape `(channels,
            thresholds)`.
    """

    steps: Tensor
    candidates: tuple[int, ...]
    unsorted: Tensor

    @cached_property
    def thresholds(self) -> Tensor:
        """The thresholds in ascending order."""
        # An order of magnitude faster than torch's.
        return torch.from_numpy(np.sort(self.unsorted.numpy(), axis=1))

    @cached_property
    def owners(self) -> Tensor:
        """Which candidate each threshold belongs to; equal ones are in the order of candidates."""
        counts = torch.tensor([2**bits - 1 for bits in self.candidates])
        owner = torch.arange(len(self.candidates)).repeat_interleave(counts)
        return owner[self.unsorted.argsort(dim=1, stable=True)]

    def codes(self, number: int) -> Tensor:
        """The code of each cell at one candidate, int16, shape `(channels, cells)`."""
        channels, thresholds = self.owners.shape
        passed = torch.zeros((channels, thresholds + 1), dtype=torch.int16)
        # Cell c has c thresholds below it, so cell 0 has passed none.
        torch.cumsum(self.owners == number, dim=1, dtype=torch.int16, out=passed[:, 1:])
        return passed.sub_(1 << (self.candidates[number] - 1))


def _orders(steps: Tensor, candidates: Sequence[int]) -> Iterator[tuple[slice, _Order]]:
    """The order of thresholds of all channels, some at a time."""
    halves = [torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) + 0.5 for bits in candidates]
    chunk = max(1, _CHUNK // cell_count(candidates))
    for start in range(0, steps.shape[1], chunk):
        rows = slice(start, min(start + chunk, steps.shape[1]))
        effective = effective_step(steps[:, rows].float()).double()
        thresholds = [step[:, None] * half for step, half in zip(effective, halves, strict=True)]
        yield rows, _Order(effective, tuple(candidates), torch.cat(thresholds, dim=1))


def _choose(thresholds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Points of all cells, the unit of each channel, and whether points are well inside cells."""
    outermost = thresholds.abs().amax(dim=1, keepdim=True)
    unit = outermost / _POINT_LIMIT
    # The outermost cells have no end: they get one, far enough for a point to fit in.
    room = 100 * unit
    borders = torch.cat((thresholds[:, :1] - room, thresholds, thresholds[:, -1:] + room), dim=1)
    low, high = borders[:, :-1], borders[:, 1:]
    points = ((low + high) / (2 * unit)).round_()
    values = points * unit
    # Rounding to a multiple of the unit may have moved a point out of a narrow cell.
    usable = (values - low > low.abs() * _MARGIN) & (high - values > high.abs() * _MARGIN)
    return points.to(torch.int16), unit.flatten(), usable


def _joined(pointless: list[tuple[Tensor, Tensor]], exceptions: Exceptions) -> Exceptions:
    """Weights without a point, and the exceptions, whose codes win."""
    places = torch.cat([*(places for places, _ in pointless), exceptions.places])
    codes = torch.cat([*(codes for _, codes in pointless), exceptions.codes], dim=1)
    # One entry for each place, the last of those given: writing to a place twice has no defined
    # order.
    order = torch.arange(len(places))
    unique, group = places.unique(return_inverse=True)
    last = torch.zeros_like(unique).scatter_reduce(0, group, order, "amax")
    return Exceptions(unique, codes[:, last])

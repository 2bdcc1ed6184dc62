"""Cells: one small integer for each weight from which its code at every candidate bit-width can be told.

The rounding thresholds of all candidates, `(code + 1/2) * step size`, cut the weight axis of a channel into cells: one more
than there are thresholds, 120 for the candidates {2, 3, 4, 5, 6} and 375 with 8. Codes never fall as the weight grows, and
each threshold raises one code by one, so the number of a weight's cell is the sum of its codes, each counted from its
lowest. It is taken from the codes alone; no threshold computed in floating point takes part. Everything here is on the CPU.

Back from cells to codes, the order of a channel's thresholds tells which candidate each of the thresholds passed belongs
to. The order is that of products of a float32 and a number of 9 bits, which float64 holds exactly, so it is the same on
every machine. A weight within a rounding error of two thresholds at once can have codes that the order does not tell;
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
"""Distance of a point from the borders of its cell, as a share of the border: far above the rounding errors of the float32
arithmetic that makes codes of points, which are below 2^-22."""


@dataclass(frozen=True)
class Exceptions:
    """Weights whose codes the cells do not tell.

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
    for one, bits in zip(codes, candidates, strict=True):
        cells += (one + 2 ** (bits - 1)).to(torch.int16)
    return cells


def exceptions_of(
    cells: Tensor, codes: Sequence[Tensor], steps: Tensor, candidates: Sequence[int]
) -> Exceptions:
    """The weights whose codes differ from those that their cells and the step sizes tell: every code is compared.

    Args:
        cells: Cells, a row for each channel.
        codes: The integer codes at each candidate, in the shape of `cells`.
        steps: Step sizes, shape `(candidates, channels)`.
        candidates: The bit-widths.
    """
    wrong = torch.zeros(cells.shape, dtype=torch.bool, device=cells.device)
    for rows, order in _orders(steps, candidates):
        index = cells[rows].long()
        for number, one in enumerate(codes):
            wrong[rows] |= order.codes(number).gather(1, index) != one[rows]
    places = wrong.flatten().nonzero().flatten()
    return Exceptions(places, torch.stack([one.flatten()[places].to(torch.int8) for one in codes]))


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
        exceptions: The weights whose codes the cells do not tell.
    """
    if len(candidates) == 1:  # the only code is its own point
        points = (cells - 2 ** (candidates[0] - 1)).to(torch.int8)
        return Points(points, torch.ones_like(steps, dtype=torch.float32), exceptions)
    points = torch.empty_like(cells)
    ratios = torch.empty(steps.shape, dtype=torch.float32, device=steps.device)
    found: list[tuple[Tensor, Tensor]] = []
    for rows, order in _orders(steps, candidates):
        table, unit, usable = _choose(order.thresholds)
        index = cells[rows].long()
        points[rows] = table.gather(1, index)
        ratios[:, rows] = (unit / order.steps).float()
        lost = (~usable.gather(1, index)).nonzero()
        if len(lost):
            places = (lost[:, 0] + rows.start) * cells.shape[1] + lost[:, 1]
            cell = index[lost[:, 0], lost[:, 1]]
            told = [
                order.codes(number)[lost[:, 0], cell].to(torch.int8)
                for number in range(len(candidates))
            ]
            found.append((places, torch.stack(told)))
    return Points(points, ratios, _joined(found, exceptions))


@dataclass(frozen=True)
class _Order:
    """The thresholds of some channels in ascending order.

    Attributes:
        steps: Effective step sizes, float64, shape `(candidates, channels)`.
        candidates: The bit-widths.
        unsorted: The thresholds of one candidate after the other, float64, shape `(channels, thresholds)`.
    """

    steps: Tensor
    candidates: tuple[int, ...]
    unsorted: Tensor

    @cached_property
    def thresholds(self) -> Tensor:
        """The thresholds in ascending order."""
        return torch.from_numpy(
            np.sort(self.unsorted.numpy(), axis=1)
        )  # an order of magnitude faster than torch's

    @cached_property
    def owners(self) -> Tensor:
        """Which candidate each threshold belongs to; equal ones are in the order of candidates."""
        counts = torch.tensor([2**bits - 1 for bits in self.candidates])
        owner = torch.arange(len(self.candidates)).repeat_interleave(counts)
        return owner[self.unsorted.argsort(dim=1, stable=True)]

    def codes(self, number: int) -> Tensor:
        """The code of each cell at one candidate, int16, shape `(channels, cells)`."""
        passed = torch.zeros(
            (len(self.owners), self.owners.shape[1] + 1),
            dtype=torch.int16,
            device=self.owners.device,
        )
        torch.cumsum(self.owners == number, dim=1, dtype=torch.int16, out=passed[:, 1:])
        return passed.sub_(1 << (self.candidates[number] - 1))


def _orders(steps: Tensor, candidates: Sequence[int]) -> Iterator[tuple[slice, _Order]]:
    """The order of thresholds of all channels, some at a time."""
    halves = [torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) + 0.5 for bits in candidates]
    chunk = max(1, _CHUNK // cell_count(candidates))
    for start in range(0, steps.shape[1], chunk):
        rows = slice(start, min(start + chunk, steps.shape[1]))
        own = effective_step(steps[:, rows].float()).double()
        thresholds = torch.cat(
            [step[:, None] * half for step, half in zip(own, halves, strict=True)], dim=1
        )
        yield rows, _Order(own, tuple(candidates), thresholds)


def _choose(thresholds: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A point for every cell, the unit of each channel, and whether the point lies well inside its cell."""
    outermost = thresholds.abs().amax(dim=1, keepdim=True)
    unit = outermost / _POINT_LIMIT
    room = 100 * unit
    borders = torch.cat((thresholds[:, :1] - room, thresholds, thresholds[:, -1:] + room), dim=1)
    points = ((borders[:, :-1] + borders[:, 1:]) / (2 * unit)).round_()
    values = points * unit
    low, high = borders[:, :-1], borders[:, 1:]
    usable = (values - low > low.abs() * _MARGIN) & (high - values > high.abs() * _MARGIN)
    return points.to(torch.int16), unit.flatten(), usable


def _joined(found: list[tuple[Tensor, Tensor]], exceptions: Exceptions) -> Exceptions:
    """Weights without a point, and those whose codes are known from elsewhere, which win."""
    places = torch.cat([*(places for places, _ in found), exceptions.places])
    codes = torch.cat([*(codes for _, codes in found), exceptions.codes], dim=1)
    # One entry for each place, the last of those given: writing to one place twice has no defined order.
    order = torch.arange(len(places), device=places.device)
    unique, group = places.unique(return_inverse=True)
    last = torch.zeros_like(unique).scatter_reduce(0, group, order, "amax")
    return Exceptions(unique, codes[:, last])

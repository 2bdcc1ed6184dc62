"""Rounding, and sums of whole numbers: against exact arithmetic of Python."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from anyprec.exporting.graphs import Grid
from anyprec.exporting.integer_arithmetic import (
    EXACT_FLOAT32,
    codes_of,
    exact_parts,
    fused,
    largest_sum,
    product_table,
    sum_table,
)


def _nearest_float32(value: Fraction) -> float:
    """The float32 number nearest to a fraction; ties to even. By trying neighbours."""
    start = np.float32(float(value))
    near = [
        np.nextafter(start, np.float32(-np.inf)),
        start,
        np.nextafter(start, np.float32(np.inf)),
    ]
    distances = [abs(Fraction(float(number)) - value) for number in near]
    best = [number for number, gap in zip(near, distances, strict=True) if gap == min(distances)]
    even = [number for number in best if number.view(np.int32) % 2 == 0]
    return float(best[0] if len(best) == 1 else even[0])


def test_fused_multiply_add_rounds_once() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(256, (2000,), generator=generator).float()
    factor, addend = torch.randn(2, 2000, generator=generator)
    computed = fused(codes, factor, addend)
    for first, second, third, result in zip(codes, factor, addend, computed, strict=True):
        exact = Fraction(first.item()) * Fraction(second.item()) + Fraction(third.item())
        assert result.item() == _nearest_float32(exact)


@pytest.mark.parametrize("tiny", [2.0**-80, -(2.0**-80)])
def test_fused_multiply_add_where_rounding_twice_is_wrong(tiny: float) -> None:
    # The product lies on a tie of float32. The addend decides it, and float64 loses it.
    factor, addend = torch.tensor(1.0 + 2.0**-12), torch.tensor(tiny)
    exact = Fraction(factor.item()) ** 2 + Fraction(tiny)
    assert fused(factor, factor, addend).item() == _nearest_float32(exact)


@pytest.mark.parametrize("make", [sum_table, product_table])
def test_tables_are_within_half_a_bin_of_the_real_result(
    make: object,
) -> None:
    first, second = Grid(0.03, 7, 0, 255, 8), Grid(0.011, 130, 0, 255, 8)
    target = Grid(0.09, 60, 50, 90, 8)
    table = make(first, second, target).reshape(256, 256)  # type: ignore[operator]
    codes = torch.arange(256, dtype=torch.float64)
    one, two = (codes - 7) * 0.03, (codes - 130) * 0.011
    real = one[:, None] + two if make is sum_table else one[:, None] * two
    exact = (real / 0.09 + 60).clamp(50, 90)
    assert (table - exact).abs().max() <= 0.5 + 1e-4
    assert (int(table.min()), int(table.max())) == (50, 90)


def test_halves_are_rounded_to_even_and_limits_hold() -> None:
    grid = Grid(1.0, 10, 8, 13, 4)
    values = torch.tensor([-9.0, -0.5, 0.5, 1.5, 2.5, 40.0])
    assert codes_of(values, grid).tolist() == [8, 10, 10, 12, 12, 13]


@pytest.fixture
def weight() -> Tensor:
    return torch.randint(-128, 128, (6, 40, 3, 3), dtype=torch.int8)


@pytest.mark.parametrize("zero_point", [100, 200])
def test_the_largest_sum_bounds_every_input(weight: Tensor, zero_point: int) -> None:
    grid = Grid(0.1, zero_point, 0, 255, 8)
    flat = weight.long().flatten(1)
    one_way = torch.where(flat > 0, 255 - zero_point, -zero_point) * flat
    other_way = torch.where(flat > 0, -zero_point, 255 - zero_point) * flat
    most = torch.stack((one_way, other_way)).sum(dim=2).abs().max()
    farther = max(zero_point, 255 - zero_point)
    assert most <= largest_sum(weight, 0, grid) == farther * flat.abs().sum(dim=1).max()


def test_parts_stay_below_the_limit_and_are_no_smaller_than_needed(weight: Tensor) -> None:
    limit = 10_000
    parts = exact_parts(weight, limit)
    assert parts is not None
    assert sum(parts) == 40
    sums = [part.long().abs().sum(dim=(1, 2, 3)).max() for part in weight.split(parts, dim=1)]
    assert max(sums) < limit
    start = 0
    for size in parts[:-1]:
        longer = weight[:, start : start + size + 1].long().abs().sum(dim=(1, 2, 3)).max()
        assert longer >= limit
        start += size


def test_no_parts_where_one_input_channel_is_too_much(weight: Tensor) -> None:
    assert exact_parts(weight, 100) is None
    assert exact_parts(weight, EXACT_FLOAT32) == [40]

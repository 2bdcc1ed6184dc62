"""Arithmetic of integer networks: rounding as runtimes do it, and sums that are exact.

Here are functions of tensors and grids; the modules that call them are in `integer_layers.py`. The
order of roundings is that of onnxruntime's kernels for x86-64 with AVX2 (mlas: `quantize.cpp`,
`qladd_avx2.cpp`, `qlmul.cpp`, `qlgavgpool.cpp`), so that codes are equal and not merely close.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anyprec.exporting.graphs import Grid
from anyprec.nn.channels import Axis, rows_of_channels

EXACT_FLOAT32 = 2**24
"""Sums of whole numbers below it are exact in float32, whatever their order."""

LARGEST_INT32 = 2**31 - 1

CODES = 256
"""Number of codes that uint8 has."""


def float32(value: float) -> Tensor:
    """A number of float32, so that products are rounded to float32 as in a runtime."""
    return torch.tensor(value, dtype=torch.float32)


def codes_of(values: Tensor, grid: Grid) -> Tensor:
    """Round numbers in units of a grid's bin to its codes, uint8; halves go to even."""
    zero = grid.zero_point
    rounded = values.round().clamp_(grid.low - zero, grid.high - zero)
    return rounded.add_(zero).to(torch.uint8)


def whole_numbers(codes: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """Codes less their zero point."""
    values = codes.to(dtype)
    return values.sub_(grid.zero_point) if grid.zero_point else values


def reach(grid: Grid) -> int:
    """The largest magnitude of a code less the zero point."""
    return max(abs(grid.high - grid.zero_point), abs(grid.low - grid.zero_point))


def largest_sum(weight: Tensor, axis: Axis, grid: Grid) -> int:
    """The largest magnitude that a sum of products can have, whatever the input.

    Args:
        weight: Codes.
        axis: Of the weight, along which its output channels are.
        grid: Of the input.
    """
    by_channel = rows_of_channels(weight.long().abs(), axis).sum(dim=1)
    return int(by_channel.max()) * reach(grid)


def exact_parts(weight: Tensor, limit: int) -> list[int] | None:
    """How to split the input channels of a weight so that the magnitudes of a part stay small.

    Args:
        weight: Codes, of shape `(outputs, inputs, ...)`.
        limit: What the sum of a part's magnitudes stays below, in each output channel.

    Returns:
        Number of input channels of each part; None if a single one reaches the limit.
    """
    by_input = weight.long().abs().reshape(*weight.shape[:2], -1).sum(dim=2)
    if int(by_input.max()) >= limit:
        return None
    parts: list[int] = []
    total = torch.zeros_like(by_input[:, 0])
    size = 0
    for channel in by_input.unbind(dim=1):
        if int((total + channel).max()) >= limit:
            parts.append(size)
            total, size = torch.zeros_like(total), 0
        total, size = total + channel, size + 1
    return [*parts, size]


def sum_table(first: Grid, second: Grid, target: Grid) -> Tensor:
    """Codes of the sum of two values, by their codes: shape `(256 * 256,)`, uint8.

    onnxruntime computes `fma(a, sa/sc, fma(b, sb/sc, offset))` with
    `offset = zc - fma(za, sa/sc, zb * sb/sc)` in float32.
    """
    by_first = float32(first.scale) / float32(target.scale)
    by_second = float32(second.scale) / float32(target.scale)
    shift = float32(second.zero_point) * by_second
    offset = float32(target.zero_point) - fused(float32(first.zero_point), by_first, shift)
    codes = torch.arange(CODES, dtype=torch.float32)
    inner = fused(codes, by_second, offset)
    return _stored(fused(codes[:, None], by_first, inner[None, :]), target)


def product_table(first: Grid, second: Grid, target: Grid) -> Tensor:
    """Codes of the product of two values, by their codes: shape `(256 * 256,)`, uint8."""
    factor = float32(first.scale) * float32(second.scale) / float32(target.scale)
    codes = torch.arange(CODES, dtype=torch.float32)
    products = (codes - first.zero_point)[:, None] * (codes - second.zero_point)[None, :]
    return _stored(products * factor + float32(target.zero_point), target)


def _stored(values: Tensor, target: Grid) -> Tensor:
    rounded = values.round().clamp(target.low, target.high)
    return rounded.to(torch.uint8).flatten()


def fused(first: Tensor, second: Tensor, third: Tensor) -> Tensor:
    """`first * second + third` rounded once to float32, as a fused multiply-add does.

    A float64 product of two float32 numbers is exact. Their sum is rounded to odd before it becomes
    float32, so that rounding twice is as good as rounding once (Boldo and Melquiond, 2008).
    """
    product = first.double() * second.double()
    product, addend = torch.broadcast_tensors(product, third.double())
    total = product + addend
    # What the sum lost: Knuth's TwoSum.
    virtual = total - product
    lost = (product - (total - virtual)) + (addend - virtual)
    is_even = (total.contiguous().view(torch.int64) & 1) == 0
    towards = torch.where(lost > 0, torch.inf, -torch.inf).to(total.dtype)
    odd = torch.where((lost != 0) & is_even, torch.nextafter(total, towards), total)
    return odd.to(torch.float32)

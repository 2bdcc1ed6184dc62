"""Matrix products: functions of factors of which any may be a weight.

Each has a counting rule for its MACs, and a rule for which axis of a factor holds the output
channels if that factor is a weight. `network/observation.py` reads the table to find weights,
`owners.py` to quantize them. Operators that name input and weight are in `operators.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from anyprec.nn.operators import aten_forms, tensors_in

_Arguments = tuple[Any, ...]


def _macs_by_last_axis(factors: list[Tensor], result: Tensor) -> int:
    """The first factor's last axis is summed over."""
    return result.numel() * factors[0].shape[-1]


def _macs_of_batch_sum(factors: list[Tensor], _result: Tensor) -> int:
    """The batch is summed over, too, so each element of the first factor meets a whole row."""
    return factors[0].numel() * factors[1].shape[-1]


def _macs_of_contraction(factors: list[Tensor], result: Tensor) -> int:
    """Factors of M x K and K x N elements make M x N: K follows from the three products."""
    first, second = factors
    if not result.numel():
        return 0
    summed = math.isqrt(first.numel() * second.numel() // result.numel())
    return result.numel() * summed


def _macs_of_groups(factors: list[Tensor], result: Tensor) -> int:
    """Groups share tokens, and if neither factor has an axis for groups, what is summed over."""
    if factors[0].ndim == factors[1].ndim == 2:
        return factors[0].numel() * factors[1].shape[-1]
    return _macs_by_last_axis(factors, result)


def _rows_or_columns(_args: _Arguments, index: int, factor: Tensor) -> int | None:
    """The axis of a matrix product that is not summed over."""
    return index if factor.ndim == 2 else None


def _first_axis(_args: _Arguments, _index: int, factor: Tensor) -> int | None:
    return 0 if factor.ndim == 2 else None


def _axis_of_groups(_args: _Arguments, index: int, factor: Tensor) -> int | None:
    """Experts of shape (groups, in, out): a step size per output channel for all of them."""
    return 2 if index == 1 and factor.ndim == 3 else None


def _axis_of_contraction(args: _Arguments, index: int, factor: Tensor) -> int | None:
    """The one axis that `torch.tensordot` does not sum over."""
    dims: Any = args[2:] or (2,)
    # Two lists of axes, one list of both, or a number of axes at the ends that meet.
    if len(dims) == 1:
        (dims,) = dims
    if isinstance(dims, Tensor):
        dims = dims.tolist()
    summed: Iterable[int]
    if isinstance(dims, int):
        summed = range(dims) if index == 1 else range(factor.ndim - dims, factor.ndim)
    else:
        summed = [axis % factor.ndim for axis in _as_list(dims[index])]
    remaining = sorted(set(range(factor.ndim)) - set(summed))
    return remaining[0] if len(remaining) == 1 else None


def _as_list(value: Any) -> list[int]:
    return [value] if isinstance(value, int) else list(value)


def _no_axis(_args: _Arguments, _index: int, _factor: Tensor) -> None:
    return None


@dataclass(frozen=True)
class Product:
    """What anyprec needs to know of a matrix product.

    Attributes:
        summands: Leading arguments that the product is added to.
        factors: Arguments after them that are multiplied; None is all.
        macs: Multiply-accumulates of one call for the whole batch, from factors and result.
        axis: Axis of a factor that holds the output channels, from the arguments, the factor's
            number and the factor; None if there is none or it is not known.
    """

    summands: int = 0
    factors: int | None = 2
    macs: Callable[[list[Tensor], Tensor], int] = _macs_by_last_axis
    axis: Callable[[_Arguments, int, Tensor], int | None] = _rows_or_columns


EINSUM = Product(factors=None, axis=_no_axis)
"""`torch.einsum`, whose first argument says what is multiplied."""


def _products() -> dict[Callable[..., Any], Product]:
    plain, added = Product(), Product(summands=1)
    batch_sum = Product(summands=1, macs=_macs_of_batch_sum)
    inner = Product(macs=_macs_by_last_axis, axis=_first_axis)
    contraction = Product(macs=_macs_of_contraction, axis=_axis_of_contraction)
    grouped = Product(macs=_macs_of_groups, axis=_axis_of_groups)
    by_name = {
        "matmul": plain, "mm": plain, "bmm": plain, "mv": plain, "dot": plain, "vdot": plain,
        "addmm": added, "baddbmm": added, "addmv": added, "addbmm": batch_sum,
        "inner": inner, "tensordot": contraction, "_grouped_mm": grouped, "einsum": EINSUM,
    }  # fmt: skip
    table: dict[Callable[..., Any], Product] = {
        Tensor.__matmul__: plain,
        Tensor.__rmatmul__: plain,
        torch.linalg.matmul: plain,
    }
    if hasattr(F, "grouped_mm"):  # of torch 2.10 and later
        table[F.grouped_mm] = grouped
    for name, product in by_name.items():
        # In place, too: `total.addmm_(input, weight)`.
        for holder, attribute in ((torch, name), (Tensor, name), (Tensor, f"{name}_")):
            if hasattr(holder, attribute):
                table[getattr(holder, attribute)] = product
        for form in aten_forms(name):
            table[form] = product
    return table


PRODUCTS = _products()
"""Every matrix product of torch whose factors may be weights."""

_FACTOR_NAMES = (
    "self",
    "input",
    "a",
    "mat",
    "mat1",
    "mat_a",
    "batch1",
    "other",
    "tensor",
    "b",
    "mat2",
    "mat_b",
    "batch2",
    "vec",
    "operands",
    "tensors",
)


def product_operands(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Tensor]:
    """The tensors that a call of one of `PRODUCTS` multiplies."""
    product = PRODUCTS[func]
    # What follows two factors (axes, offsets of groups) may be a tensor, too.
    values = list(args[product.summands :][: product.factors])
    for name in _FACTOR_NAMES:
        # `self` and `input` of addmm are what the product is added to.
        is_summand = product.summands > 0 and name in ("self", "input")
        if name in kwargs and not is_summand:
            values.append(kwargs[name])
    return list(tensors_in(values))


def product_macs(
    func: Callable[..., Any], args: tuple[Any, ...], factors: list[Tensor], result: Tensor
) -> int:
    """Multiply-accumulates of one call of `PRODUCTS`, for the whole batch."""
    product = PRODUCTS[func]
    if product is EINSUM:
        return _einsum_macs(args, factors)
    return product.macs(factors, result)


def product_axis(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    parameter: Tensor,
    factor: Tensor,
    index: int,
) -> int | None:
    """Axis of a weight that holds the output channels, if it is a factor of one of `PRODUCTS`.

    Args:
        func: The product.
        args: Its arguments.
        kwargs: Its arguments by name.
        parameter: The weight.
        factor: A view of it; None is returned unless that has the same axes in some order.
        index: 0 for the left factor, 1 for the right one.
    """
    if parameter.ndim != factor.ndim or factor.numel() != parameter.numel():
        return None
    if "dims" in kwargs:
        args = (*args[:2], kwargs["dims"])
    axis = PRODUCTS[func].axis(args, index, factor)
    if axis is None:
        return None
    if parameter.ndim == 2:
        transposed = factor.stride() != parameter.stride()
        return 1 - axis if transposed else axis
    of_parameter = zip(parameter.shape, parameter.stride(), strict=True)
    wanted = factor.shape[axis], factor.stride(axis)
    matching = [number for number, present in enumerate(of_parameter) if present == wanted]
    return matching[0] if len(matching) == 1 else None


def _einsum_macs(args: tuple[Any, ...], factors: list[Tensor]) -> int:
    """One multiply-accumulate for each combination of all indices."""
    sizes: dict[str, int] = {}
    for indices, factor in zip(_einsum_terms(args), factors, strict=False):
        head, tail = _around_ellipsis(indices)
        if "..." in indices:
            # Axes behind an ellipsis are indices too, which broadcasting aligns at their end.
            hidden = factor.ndim - len(head) - len(tail)
            head += [f".{number}" for number in range(hidden, 0, -1)]
        for index, length in zip(head + tail, factor.shape, strict=True):
            sizes[index] = max(length, sizes.get(index, 1))
    return math.prod(sizes.values())


def _around_ellipsis(indices: Sequence[str]) -> tuple[list[str], list[str]]:
    """The indices before and after an ellipsis."""
    if "..." not in indices:
        return list(indices), []
    position = indices.index("...")
    return list(indices[:position]), list(indices[position + 1 :])


def _einsum_terms(args: tuple[Any, ...]) -> Iterator[list[str]]:
    """The indices of each factor."""
    if args and isinstance(args[0], str):
        for term in args[0].replace(" ", "").split("->")[0].split(","):
            head, dots, tail = term.partition("...")
            yield [*head, *([dots] if dots else []), *tail]
        return
    # Or numbers in lists: einsum(left, [0, 1], right, [1, 2], [0, 2]).
    for indices in args[1::2]:
        yield ["..." if index is Ellipsis else str(index) for index in indices]

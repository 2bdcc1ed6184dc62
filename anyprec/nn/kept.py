"""Quantized weights that are kept in eval mode, and how it is seen that they are out of date.

torch counts what changes a tensor in place, but not all of it: what is written through `.data`, a
NumPy array, DLPack or from another process leaves no trace. So the values are compared, too, where
this is cheap. On a CPU each row of a weight has one number that depends on all its values, a
product with a fixed vector: one pass over the weight, which takes about five times as long to
quantize. Elsewhere the comparison would stall the device, and nothing is kept.
Whoever knows that weights are not written in such a way can have torch's record trusted
(`anyprec.model.trust`).

What quantizes a weight is in `weights.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Record = tuple[int, ...]
"""Address and version of each of some tensors."""


@dataclass(frozen=True, eq=False)
class Values:
    """What shows the values of a float weight operand and its step sizes.

    Attributes:
        rows: A number for each row of the operand.
        step: The step sizes.
        seen: The operand as a matrix, in its own memory.
        seen_step: The step sizes, in their own memory.
    """

    rows: Tensor
    step: Tensor
    seen: Tensor
    seen_step: Tensor

    @classmethod
    def of(cls, operand: Tensor, step: Tensor) -> Values:
        """Those of a comparable operand and the step sizes in use."""
        seen, seen_step = _as_matrix(operand), step.detach()
        return cls(_numbers_of(seen), seen_step.clone(), seen, seen_step)

    def are_of(self, operand: Tensor) -> bool:
        """Whether the operand and the step sizes, which are where they were, have these values."""
        seen = self.seen
        # What is seen keeps its memory, so that no other tensor is ever at its address.
        if operand.data_ptr() != seen.data_ptr():
            seen = _as_matrix(operand)
        # NaN equals nothing, so what is not finite is computed anew.
        return torch.equal(self.step, self.seen_step) and torch.equal(self.rows, _numbers_of(seen))


@dataclass(frozen=True, eq=False)
class Kept:
    """A quantized weight.

    Attributes:
        quantized: The weight.
        record: Of the tensors that it was computed from.
        values: Of them; None if they are not compared.
    """

    quantized: Tensor
    record: Record
    values: Values | None


def record_of(tensors: Iterable[Tensor]) -> Record | None:
    """Torch's record of changes; None in inference mode, where there is none."""
    record: list[int] = []
    for tensor in tensors:
        if tensor.is_inference():
            return None
        record += (tensor.data_ptr(), tensor._version)  # noqa: SLF001 (no public name)
    return tuple(record)


def is_comparable(operand: Tensor) -> bool:
    """Whether its values can be compared at little cost, and finely enough."""
    is_plain = type(operand) in (Tensor, nn.Parameter)
    is_fine = operand.dtype in (torch.float32, torch.float64)
    return is_plain and is_fine and operand.device.type == "cpu" and operand.numel() > 0


def _as_matrix(operand: Tensor) -> Tensor:
    """A view of an operand as a matrix, with its rows in memory."""
    rows = operand.detach()
    if not rows.is_contiguous():
        strides = rows.stride()
        rows = rows.permute(sorted(range(rows.ndim), key=strides.__getitem__, reverse=True))
    return rows.flatten(1) if rows.ndim > 1 else rows[None]


def _numbers_of(matrix: Tensor) -> Tensor:
    """A number for each row that moves with each of the row's values."""
    return torch.mv(matrix, _direction(matrix.shape[1], matrix.dtype))


@functools.cache
def _direction(length: int, dtype: torch.dtype) -> Tensor:
    """Numbers from 1/2 to 3/2, no two alike: exchanged and opposite values do not cancel."""
    with torch.inference_mode(mode=False):
        position = torch.arange(length, dtype=torch.float64, device="cpu")
        # Fractions of the squares' multiples of an irrational number lie irregularly.
        return position.square_().mul_(0.5**0.5).frac_().add_(0.5).to(dtype)

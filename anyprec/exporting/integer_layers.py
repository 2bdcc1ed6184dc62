"""Modules of an integer network: what goes in and out is uint8 codes, sums are whole numbers.

Whole numbers are summed in float32 where every sum stays below 2^24, so that none is rounded; else
in parts, or in float64. Which it is follows from the weights, once, when a module is made.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from anyprec.errors import ExportError
from anyprec.exporting.graphs import Grid
from anyprec.exporting.integer_arithmetic import (
    CODES,
    EXACT_FLOAT32,
    LARGEST_INT32,
    codes_of,
    exact_parts,
    float32,
    largest_sum,
    product_table,
    reach,
    sum_table,
    whole_numbers,
)
from anyprec.nn.channels import Axis


class Quantize(nn.Module):
    """From numbers to codes."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, values: Tensor) -> Tensor:
        """Codes of float32 values, uint8, of the same shape."""
        step = float32(self.grid.scale).to(values.device)
        return codes_of(values.to(torch.float32) / step, self.grid)

    def extra_repr(self) -> str:
        """See `torch.nn.Module`."""
        return described(self.grid)


class Dequantize(nn.Module):
    """From codes to numbers."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, codes: Tensor) -> Tensor:
        """The float32 values of codes, of the same shape."""
        step = float32(self.grid.scale).to(codes.device)
        return whole_numbers(codes, self.grid, torch.float32).mul_(step)

    def extra_repr(self) -> str:
        """See `torch.nn.Module`."""
        return described(self.grid)


class IntegerProduct(nn.Module):
    """A convolution or Linear layer on codes: `codes_out = round((w * x + bias) * multiplier)`.

    Args:
        operator: The operator of torch, without its namespace: `"conv2d.default"`.
        options: What it takes behind input, weight and bias.
        codes: The weight, int8.
        scale: Scale of each output channel, float32, shape `(channels,)`.
        bias: int32, shape `(channels,)`, on the scale of the accumulator; or None.
        source: Grid of the input.
        target: Grid of the output; None to return float32 numbers.
        weight_bits: Bit-width of the weight.
        axis: Of the weight, along which its output channels are.
        layer: Path of the layer.

    Raises:
        ExportError: An accumulator can exceed int32.
    """

    codes: Tensor
    multiplier: Tensor
    bias: Tensor | None

    def __init__(
        self,
        operator: str,
        options: tuple[Any, ...],
        *,
        codes: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        source: Grid,
        target: Grid | None,
        weight_bits: int,
        axis: Axis,
        layer: str,
    ) -> None:
        super().__init__()
        self.operator = operator
        self.options = options
        self.source = source
        self.target = target
        self.weight_bits = weight_bits
        multiplier = float32(source.scale) * scale
        if target is not None:
            multiplier = multiplier / float32(target.scale)
        shape = (-1,) if self.is_linear else (-1, *[1] * (codes.ndim - 2))
        self.register_buffer("codes", codes.clone())
        self.register_buffer("multiplier", multiplier.reshape(shape).clone())
        self.register_buffer("bias", None if bias is None else bias.clone())
        self.largest = self._largest(axis)
        if self.largest > LARGEST_INT32:
            msg = f"the accumulator of layer {layer!r} can reach {self.largest}, which is more "
            msg += "than int32 holds: give it fewer bits"
            raise ExportError(msg)
        self.parts = self._parts(axis)

    @property
    def is_linear(self) -> bool:
        """Whether the output channels are along the last axis."""
        return self.operator == "linear.default"

    def forward(self, codes: Tensor) -> Tensor:
        """Codes of the output if it has a grid, else float32 numbers."""
        scaled = self.accumulated(codes).to(torch.float32).mul_(self.multiplier)
        return scaled if self.target is None else codes_of(scaled, self.target)

    def accumulated(self, codes: Tensor) -> Tensor:
        """The sums of products and the bias, whole numbers; float32 or int32."""
        if self.largest < EXACT_FLOAT32 and codes.device.type == "cpu":
            values = whole_numbers(codes, self.source, torch.float32)
            bias = None if self.bias is None else self.bias.to(torch.float32)
            return self._multiplied(values, self.codes.to(torch.float32), bias)
        total = self._summed(codes)
        return total if self.bias is None else total.add_(self.bias.reshape(self.multiplier.shape))

    def _summed(self, codes: Tensor) -> Tensor:
        """The sums of products, int32."""
        if self.parts is None or codes.device.type != "cpu":
            # Convolutions of other devices may transform float32 values (Winograd).
            values = whole_numbers(codes, self.source, torch.float64)
            return self._multiplied(values, self.codes.to(values.dtype), None).to(torch.int32)
        values = whole_numbers(codes, self.source, torch.float32)
        along = -1 if self.is_linear else 1
        inputs = values.split(self.parts, dim=along)
        weights = self.codes.to(values.dtype).split(self.parts, dim=1)
        total = self._multiplied(inputs[0], weights[0], None).to(torch.int32)
        for part, weight in zip(inputs[1:], weights[1:], strict=True):
            total += self._multiplied(part, weight, None).to(torch.int32)
        return total

    def _multiplied(self, values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        packet, overload = self.operator.split(".")
        function = getattr(getattr(torch.ops.aten, packet), overload)
        result: Tensor = function(values, weight, bias, *self.options)
        return result

    def _largest(self, axis: Axis) -> int:
        """The largest magnitude of an accumulator."""
        products = largest_sum(self.codes, axis, self.source)
        return products + (0 if self.bias is None else int(self.bias.long().abs().max()))

    def _parts(self, axis: Axis) -> list[int] | None:
        """Input channels of each part that float32 sums up exactly; None for float64."""
        has_groups = len(self.options) > _GROUPS and self.options[_GROUPS] != 1
        if axis != 0 or has_groups:
            return None
        return exact_parts(self.codes, EXACT_FLOAT32 // max(reach(self.source), 1))

    def extra_repr(self) -> str:
        """See `torch.nn.Module`."""
        weight = "x".join(str(size) for size in self.codes.shape)
        text = f"W{self.weight_bits}A{self.source.bits}, {self.operator.split('.')[0]} {weight}, "
        text += f"input {described(self.source)}, largest sum {self.largest}, "
        if self.target is None:
            return text + "output float32"
        return text + f"output {described(self.target)}"


_GROUPS = 3
"""Where groups are among the options of a convolution, behind stride, padding and dilation."""


class IntegerPair(nn.Module):
    """The sum or the product of two tensors of codes, looked up by both.

    Args:
        kind: `"add"` or `"multiply"`.
        first: Grid of the first operand.
        second: Grid of the second operand.
        target: Grid of the result.
    """

    table: Tensor

    def __init__(self, kind: str, *, first: Grid, second: Grid, target: Grid) -> None:
        super().__init__()
        self.kind = kind
        self.first = first
        self.second = second
        self.target = target
        make = {"add": sum_table, "multiply": product_table}[kind]
        self.register_buffer("table", make(first, second, target), persistent=False)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Codes of the result; the operands' shapes may broadcast."""
        return self.table.take(first.to(torch.int64).mul_(CODES) + second)

    def extra_repr(self) -> str:
        """See `torch.nn.Module`."""
        operands = f"{described(self.first)} and {described(self.second)}"
        return f"{self.kind}, operands {operands}, output {described(self.target)}"


def described(grid: Grid) -> str:
    """A grid in words, for `print`."""
    codes = f"{grid.low}..{grid.high}"
    return f"(codes {codes}, scale {grid.scale:.4g}, zero point {grid.zero_point})"

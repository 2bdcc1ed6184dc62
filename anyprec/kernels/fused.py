"""What all kernels share: the tensors that they read and write, and how these lie in memory.

A kernel gets memory without gaps. Most tensors are so (contiguous, channels_last, any order of
dimensions); others are copied first: one token of each image, or an expanded gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from anyprec.kernels.numbers import narrowed, widened


class Sizes(NamedTuple):
    """How the channels of a tensor lie in memory: as `(groups, repeats, channels, inner)`.

    Attributes:
        groups: Groups, each with channels of its own.
        repeats: How often the channels of a group follow each other.
        channels: Channels of a group.
        inner: Values of one channel that follow each other.
    """

    groups: int
    repeats: int
    channels: int
    inner: int

    @property
    def steps(self) -> int:
        """How many step sizes are in use: one for each channel of each group."""
        return self.groups * self.channels


class Grid(NamedTuple):
    """How values are quantized, besides the step sizes.

    Attributes:
        row: Of the step sizes to use.
        qmin: Lowest integer code.
        qmax: Highest integer code.
        factor: On the gradient of the step size.
    """

    row: int
    qmin: int
    qmax: int
    factor: float


class Operand(NamedTuple):
    """An operand of a layer, and how it is quantized: what `FusedKernel.quantize` takes.

    Attributes:
        values: What is quantized.
        step: Step sizes.
        grid: Which of them, and the codes.
        sizes: How channels lie in memory; None with one step size.
    """

    values: Tensor
    step: Tensor
    grid: Grid
    sizes: Sizes | None = None


class FusedKernel(ABC):
    """Fake quantization on one device. Knows no autograd: results have no gradient.

    All methods take the step sizes of every candidate, shape `(rows, channels)` or `(rows,)`.
    Backward returns a gradient of all of them, which is zero in other rows.

    Attributes:
        name: As `describe` has it.
        dtypes: Of the values that it reads and writes; narrower ones are widened for it.
    """

    name: ClassVar[str]
    dtypes: ClassVar[frozenset[torch.dtype]]

    def quantize(
        self, values: Tensor, step: Tensor, grid: Grid, sizes: Sizes | None = None
    ) -> Tensor:
        """`step * clamp(round(values / step), qmin, qmax)`.

        Args:
            values: What is quantized.
            step: Step sizes.
            grid: Which of them, and the codes.
            sizes: How channels with a step size each lie in the memory of the values, which has no
                gaps then; None with one step size.
        """
        if values.dtype not in self.dtypes:
            return narrowed(self.quantize(widened(values), step, grid, sizes), values.dtype)
        result = torch.empty_like(values)
        if sizes is None:
            self._tensor(_in_layout_of(result, values), result, step, grid)
        else:
            self._channels(values, result, step, grid, sizes)
        return result

    def quantize_backward(
        self, gradient: Tensor, values: Tensor, step: Tensor, grid: Grid, sizes: Sizes | None = None
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the values and of all step sizes, these times `grid.factor`.

        Args:
            gradient: Of the result, in its dtype.
            values: As in the forward pass.
            step: As in the forward pass.
            grid: As in the forward pass.
            sizes: As in the forward pass.
        """
        if values.dtype not in self.dtypes:
            wide = widened(gradient), widened(values)
            of_values, of_step = self.quantize_backward(*wide, step, grid, sizes)
            return of_values.to(values.dtype), of_step
        of_values, of_step = torch.empty_like(values), torch.empty_like(step)
        gradient = _in_layout_of(of_values, gradient)
        if sizes is None:
            values = _in_layout_of(of_values, values)
            self._tensor_backward(gradient, values, of_values, step, of_step, grid)
        else:
            self._channels_backward(gradient, values, of_values, step, of_step, grid, sizes)
        return of_values, of_step

    def quantize_pair(self, input_: Operand, weight: Operand) -> tuple[Tensor, Tensor]:
        """`quantize` of a layer's input, with one step size, and of its weight, with many."""
        if not self._reads(input_, weight):
            return self.quantize(*input_), self.quantize(*weight)
        results = torch.empty_like(input_.values), torch.empty_like(weight.values)
        values = _in_layout_of(results[0], input_.values)
        self._pair(values, *results, input_, weight)
        return results

    def quantize_pair_backward(
        self, of_input: Tensor, of_weight: Tensor, input_: Operand, weight: Operand
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`quantize_backward` of both: of the input, its step sizes, the weight and its step sizes.

        Args:
            of_input: Gradient of the quantized input.
            of_weight: Gradient of the quantized weight.
            input_: As in the forward pass.
            weight: As in the forward pass.
        """
        if not self._reads(input_, weight):
            of_values, of_step = self.quantize_backward(of_input, *input_)
            return of_values, of_step, *self.quantize_backward(of_weight, *weight)
        of_values, of_step = torch.empty_like(input_.values), torch.empty_like(input_.step)
        of_weights, of_weight_step = torch.empty_like(weight.values), torch.empty_like(weight.step)
        values = _in_layout_of(of_values, input_.values)
        gradients = _in_layout_of(of_values, of_input), _in_layout_of(of_weights, of_weight)
        results = of_values, of_step, of_weights, of_weight_step
        self._pair_backward(gradients, values, results, input_, weight)
        return results

    def _reads(self, input_: Operand, weight: Operand) -> bool:
        """Whether it knows the dtypes of both."""
        return input_.values.dtype in self.dtypes and weight.values.dtype in self.dtypes

    # What runs on the device. All tensors of the size of the values lie in memory alike, without
    # gaps; step sizes and their gradient are contiguous. Positional: each keyword costs time.

    @abstractmethod
    def _tensor(self, values: Tensor, result: Tensor, step: Tensor, grid: Grid) -> None:
        """Write `result`."""

    @abstractmethod
    def _tensor_backward(
        self,
        gradient: Tensor,
        values: Tensor,
        of_values: Tensor,
        step: Tensor,
        of_step: Tensor,
        grid: Grid,
    ) -> None:
        """Write `of_values` and all of `of_step`."""

    @abstractmethod
    def _channels(
        self, values: Tensor, result: Tensor, step: Tensor, grid: Grid, sizes: Sizes
    ) -> None:
        """Write `result`."""

    @abstractmethod
    def _channels_backward(
        self,
        gradient: Tensor,
        values: Tensor,
        of_values: Tensor,
        step: Tensor,
        of_step: Tensor,
        grid: Grid,
        sizes: Sizes,
    ) -> None:
        """Write `of_values` and all of `of_step`."""

    def _pair(
        self,
        values: Tensor,
        result: Tensor,
        weight_result: Tensor,
        input_: Operand,
        weight: Operand,
    ) -> None:
        """Write both results. `values` are those of the input in the layout of its result."""
        self._tensor(values, result, input_.step, input_.grid)
        self._channels(weight.values, weight_result, weight.step, weight.grid, _sizes_of(weight))

    def _pair_backward(
        self,
        gradients: tuple[Tensor, Tensor],
        values: Tensor,
        results: tuple[Tensor, Tensor, Tensor, Tensor],
        input_: Operand,
        weight: Operand,
    ) -> None:
        """Write all results. `values` and `gradients` have their layout."""
        of_values, of_step, of_weights, of_weight_step = results
        self._tensor_backward(gradients[0], values, of_values, input_.step, of_step, input_.grid)
        self._channels_backward(
            gradients[1],
            weight.values,
            of_weights,
            weight.step,
            of_weight_step,
            weight.grid,
            _sizes_of(weight),
        )


def _sizes_of(weight: Operand) -> Sizes:
    if weight.sizes is None:
        msg = "the weight of a pair has a step size for each channel"
        raise ValueError(msg)
    return weight.sizes


def _in_layout_of(result: Tensor, tensor: Tensor) -> Tensor:
    """`tensor` in the memory layout of `result`, which has its shape and no gaps."""
    if tensor.is_contiguous() and result.is_contiguous():
        return tensor
    if tensor.stride() == result.stride():
        return tensor
    return torch.empty_like(result).copy_(tensor)

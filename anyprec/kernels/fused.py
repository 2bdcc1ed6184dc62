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


class FusedKernel(ABC):
    """Fake quantization on one device. Knows no autograd: results have no gradient.

    All methods take the step sizes of every candidate, shape `(rows, channels)` or `(rows,)`, and
    the `row` to use. Backward returns a gradient of all of them, which is zero in other rows.

    Attributes:
        name: As `describe` has it.
        dtypes: Of the values that it reads and writes; narrower ones are widened for it.
    """

    name: ClassVar[str]
    dtypes: ClassVar[frozenset[torch.dtype]]

    def quantize(self, values: Tensor, step: Tensor, *, row: int, qmin: int, qmax: int) -> Tensor:
        """`step * clamp(round(values / step), qmin, qmax)` with one step size."""
        if values.dtype not in self.dtypes:
            wide = self.quantize(widened(values), step, row=row, qmin=qmin, qmax=qmax)
            return narrowed(wide, values.dtype)
        result = torch.empty_like(values)
        self._tensor(_in_layout_of(result, values), result, step, row, qmin, qmax)
        return result

    def quantize_backward(
        self,
        gradient: Tensor,
        values: Tensor,
        step: Tensor,
        *,
        row: int,
        qmin: int,
        qmax: int,
        factor: float,
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the values and of all step sizes, these times `factor`.

        Args:
            gradient: Of the result, in its dtype.
            values: As in the forward pass.
            step: As in the forward pass.
            row: As in the forward pass.
            qmin: As in the forward pass.
            qmax: As in the forward pass.
            factor: On the gradient of the step size.
        """
        if values.dtype not in self.dtypes:
            of_values, of_step = self.quantize_backward(
                widened(gradient),
                widened(values),
                step,
                row=row,
                qmin=qmin,
                qmax=qmax,
                factor=factor,
            )
            return of_values.to(values.dtype), of_step
        of_values, of_step = torch.empty_like(values), torch.empty_like(step)
        values, gradient = _in_layout_of(of_values, values), _in_layout_of(of_values, gradient)
        self._tensor_backward(gradient, values, of_values, step, of_step, row, qmin, qmax, factor)
        return of_values, of_step

    def quantize_channels(
        self, values: Tensor, step: Tensor, sizes: Sizes, *, row: int, qmin: int, qmax: int
    ) -> Tensor:
        """`quantize` with a step size for each channel, of values that lie as `sizes` say."""
        if values.dtype not in self.dtypes:
            wide = self.quantize_channels(
                widened(values), step, sizes, row=row, qmin=qmin, qmax=qmax
            )
            return narrowed(wide, values.dtype)
        result = torch.empty_like(values)
        self._channels(values, result, step, row, qmin, qmax, sizes)
        return result

    def quantize_channels_backward(
        self,
        gradient: Tensor,
        values: Tensor,
        step: Tensor,
        sizes: Sizes,
        *,
        row: int,
        qmin: int,
        qmax: int,
        factor: float,
    ) -> tuple[Tensor, Tensor]:
        """As `quantize_backward`, with a step size for each channel."""
        if values.dtype not in self.dtypes:
            of_values, of_step = self.quantize_channels_backward(
                widened(gradient),
                widened(values),
                step,
                sizes,
                row=row,
                qmin=qmin,
                qmax=qmax,
                factor=factor,
            )
            return of_values.to(values.dtype), of_step
        of_values, of_step = torch.empty_like(values), torch.empty_like(step)
        gradient = _in_layout_of(of_values, gradient)
        self._channels_backward(
            gradient, values, of_values, step, of_step, row, qmin, qmax, factor, sizes
        )
        return of_values, of_step

    # What runs on the device. All tensors of the size of the values lie in memory alike, without
    # gaps; step sizes and their gradient are contiguous. Positional: each keyword costs time.

    @abstractmethod
    def _tensor(
        self, values: Tensor, result: Tensor, step: Tensor, row: int, qmin: int, qmax: int
    ) -> None:
        """Write `result`."""

    @abstractmethod
    def _tensor_backward(
        self,
        gradient: Tensor,
        values: Tensor,
        of_values: Tensor,
        step: Tensor,
        of_step: Tensor,
        row: int,
        qmin: int,
        qmax: int,
        factor: float,
    ) -> None:
        """Write `of_values` and all of `of_step`."""

    @abstractmethod
    def _channels(
        self,
        values: Tensor,
        result: Tensor,
        step: Tensor,
        row: int,
        qmin: int,
        qmax: int,
        sizes: Sizes,
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
        row: int,
        qmin: int,
        qmax: int,
        factor: float,
        sizes: Sizes,
    ) -> None:
        """Write `of_values` and all of `of_step`."""


def _in_layout_of(result: Tensor, tensor: Tensor) -> Tensor:
    """`tensor` in the memory layout of `result`, which has its shape and no gaps."""
    if tensor.is_contiguous() and result.is_contiguous():
        return tensor
    if tensor.stride() == result.stride():
        return tensor
    return torch.empty_like(result).copy_(tensor)

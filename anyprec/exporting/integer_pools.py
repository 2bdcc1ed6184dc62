"""Average pooling of an integer network: uint8 codes in, uint8 codes out.

The arithmetic is that of onnxruntime's QLinearGlobalAveragePool and QLinearAveragePool. Max pooling
needs nothing of its own: it chooses codes.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyprec.exporting.graphs import Grid
from anyprec.exporting.integer_arithmetic import codes_of, float32, whole_numbers
from anyprec.exporting.integer_layers import described


class IntegerGlobalAverage(nn.Module):
    """The average over all positions of a channel: `round(sum * scale) + zero point`.

    Args:
        keepdim: Whether the axes stay, with length 1.
        source: Grid of the input.
        target: Grid of the output.
    """

    def __init__(self, *, keepdim: bool, source: Grid, target: Grid) -> None:
        super().__init__()
        self.keepdim = keepdim
        self.source = source
        self.target = target

    def forward(self, codes: Tensor) -> Tensor:
        """Averages of codes of shape `(batch, channels, ...)`."""
        size = codes[0, 0].numel()
        axes = list(range(2, codes.ndim))
        total = codes.to(torch.int32).sum(dim=axes, keepdim=self.keepdim, dtype=torch.int32)
        total = total - self.source.zero_point * size
        factor = float32(self.source.scale) / (float32(self.target.scale) * float32(size))
        return codes_of(total.to(torch.float32) * factor.to(codes.device), self.target)

    def extra_repr(self) -> str:
        """See `torch.nn.Module`."""
        return f"input {described(self.source)}, output {described(self.target)}"


class IntegerWindowAverage(nn.Module):
    """Averages over windows of two axes, as onnxruntime's QLinearAveragePool computes them.

    It adds up the values of codes in float32, row by row, so that its order of sums is part of it.

    Args:
        kernel: Height and width of a window.
        stride: Of the windows.
        padding: Zeros at each border.
        ceil_mode: Whether windows may reach beyond the last value.
        counts_padding: Whether the zeros count; not together with `ceil_mode`.
        source: Grid of the input.
        target: Grid of the output.
    """

    def __init__(
        self,
        *,
        kernel: tuple[int, int],
        stride: tuple[int, int],
        padding: tuple[int, int],
        ceil_mode: bool,
        counts_padding: bool,
        source: Grid,
        target: Grid,
    ) -> None:
        super().__init__()
        self.kernel = kernel
        self.stride = stride
        self.padding = padding
        self.ceil_mode = ceil_mode
        self.counts_padding = counts_padding
        self.source = source
        self.target = target

    def forward(self, codes: Tensor) -> Tensor:
        """Averages of codes of shape `(batch, channels, height, width)`."""
        step = float32(self.source.scale).to(codes.device)
        values = whole_numbers(codes, self.source, torch.float32).mul_(step)
        total = self._sums(values)
        count: Tensor | int = self.kernel[0] * self.kernel[1]
        if not self.counts_padding:
            count = self._sums(torch.ones_like(values[:1, :1]))
        ratio = (total / count) / float32(self.target.scale).to(codes.device)
        # The zero point is added before rounding, unlike anywhere else.
        rounded = (ratio + self.target.zero_point).round()
        return rounded.clamp_(self.target.low, self.target.high).to(torch.uint8)

    def _sums(self, values: Tensor) -> Tensor:
        """The sums of windows, term by term."""
        counts = [self._count(axis, values.shape[2 + axis]) for axis in (0, 1)]
        ends = [self._end(axis, values.shape[2 + axis], counts[axis]) for axis in (0, 1)]
        padded = F.pad(values, (self.padding[1], ends[1], self.padding[0], ends[0]))
        total = padded.new_zeros(*values.shape[:2], *counts)
        for row, column in itertools.product(*(range(size) for size in self.kernel)):
            last = (row + self.stride[0] * counts[0], column + self.stride[1] * counts[1])
            total += padded[..., row : last[0] : self.stride[0], column : last[1] : self.stride[1]]
        return total

    def _count(self, axis: int, size: int) -> int:
        """Number of windows along an axis, as torch counts them."""
        stride, padding = self.stride[axis], self.padding[axis]
        room = size + 2 * padding - self.kernel[axis]
        count = room // stride + 1
        if self.ceil_mode and room % stride and count * stride < size + padding:
            count += 1
        return count

    def _end(self, axis: int, size: int, count: int) -> int:
        """Zeros behind the last value, so that every window is full."""
        needed = (count - 1) * self.stride[axis] + self.kernel[axis]
        return max(needed - size - self.padding[axis], 0)

    def extra_repr(self) -> str:
        """See `torch.nn.Module`."""
        window = f"kernel {self.kernel}, stride {self.stride}, padding {self.padding}"
        return f"{window}, input {described(self.source)}, output {described(self.target)}"

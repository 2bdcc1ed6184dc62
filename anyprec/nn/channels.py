"""Which weights belong to which output channel: the axis of channels, as quantizers know it.

That is one axis of the weight, but for grouped transposed convolutions. The weight of those has the
shape `(inputs, outputs of a group, ...)`, and its first axis says the group, too. No weight values
are computed with here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from anyprec.kernels import Sizes


@dataclass(frozen=True)
class GroupedAxis:
    """The output channels of a transposed convolution's weight with several groups.

    The first axis of such a weight counts the inputs, group by group, and the second one the
    outputs of a group. So a channel is a group and an index of the second axis, counted in this
    order.

    Attributes:
        groups: Number of groups.
    """

    groups: int


Axis = int | GroupedAxis
"""Where the output channels of a weight are."""


def output_axis(axis: int, groups: int) -> Axis:
    """The channels of a weight whose outputs, of one group, are along `axis`.

    Args:
        axis: An axis of the weight.
        groups: Of a transposed convolution; 1 for anything else.
    """
    if groups > 1:
        return GroupedAxis(groups)
    return axis


def channel_count(shape: tuple[int, ...], axis: Axis) -> int:
    """Number of output channels of a weight of this shape."""
    if isinstance(axis, GroupedAxis):
        return axis.groups * shape[1]
    return shape[axis]


def along(step: Tensor, axis: Axis | None, values: Tensor) -> Tensor:
    """`step`, shape `(channels,)`, shaped to multiply `values` along `axis`.

    Unchanged if `axis` is None.
    """
    if axis is None:
        return step
    if isinstance(axis, GroupedAxis):
        # An entry for each input and output of its group: small against the kernels themselves.
        inputs, outputs = values.shape[:2]
        by_group = step.reshape(axis.groups, 1, outputs)
        expanded = by_group.expand(-1, inputs // axis.groups, -1)
        return expanded.reshape(inputs, outputs, *[1] * (values.ndim - 2))
    shape = [1] * values.ndim
    shape[axis] = -1
    return step.reshape(shape)


@lru_cache(maxsize=1024)
def sizes_of_channels(shape: tuple[int, ...], axis: Axis) -> Sizes:
    """How the channels of a contiguous weight of this shape lie in memory."""
    if isinstance(axis, GroupedAxis):
        inner = math.prod(shape[2:])
        return Sizes(axis.groups, shape[0] // axis.groups, shape[1], inner)
    axis %= len(shape)
    return Sizes(1, math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :]))


def sum_of_channels(values: Tensor, axis: Axis) -> Tensor:
    """The sum of each output channel of `values`, shape `(channels,)`."""
    if isinstance(axis, GroupedAxis):
        return rows_of_channels(values, axis).sum(dim=1)
    others = [dim for dim in range(values.ndim) if dim != axis % values.ndim]
    if not others:  # torch would sum over all dimensions if there are none
        return values
    return values.sum(dim=others)


def rows_of_channels(values: Tensor, axis: Axis) -> Tensor:
    """`values` as a matrix with a row for each output channel, shape `(channels, rest)`."""
    if isinstance(axis, GroupedAxis):
        by_group = values.reshape(axis.groups, -1, *values.shape[1:])
        return by_group.transpose(1, 2).flatten(0, 1).flatten(1)
    return values.movedim(axis, 0).flatten(1)


def from_rows(rows: Tensor, shape: tuple[int, ...], axis: Axis) -> Tensor:
    """The inverse of `rows_of_channels`: a tensor of this shape."""
    if isinstance(axis, GroupedAxis):
        inputs, outputs, *kernel = shape
        by_group = rows.reshape(axis.groups, outputs, inputs // axis.groups, *kernel)
        return by_group.transpose(1, 2).reshape(shape).contiguous()
    channels_first = (shape[axis], *shape[:axis], *shape[axis + 1 :])
    return rows.reshape(channels_first).movedim(0, axis).contiguous()

"""Reading and changing torch.fx graphs of operators: what every pass needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import Node

from anyprec.exporting.operators import DEQUANTIZE, FAKE_QUANTIZE
from anyprec.nn.channels import Axis, output_axis

ATEN = torch.ops.aten

_CONVOLUTIONS = {
    ATEN.conv1d.default,
    ATEN.conv2d.default,
    ATEN.conv3d.default,
}
_TRANSPOSED = {
    ATEN.conv_transpose1d.default,
    ATEN.conv_transpose2d.input,
    ATEN.conv_transpose3d.input,
}

RESHAPING = {
    ATEN.view.default,
    ATEN.reshape.default,
    ATEN.flatten.using_ints,
    ATEN.permute.default,
    ATEN.transpose.int,
    ATEN.unsqueeze.default,
    ATEN.squeeze.dim,
    ATEN.squeeze.dims,
    ATEN.clone.default,
    ATEN.contiguous.default,
    ATEN.alias.default,
}
"""Operators that keep every value of their first argument once, at another place at most."""

ARRANGING = RESHAPING | {
    ATEN.slice.Tensor,
    ATEN.select.int,
    ATEN.expand.default,
    ATEN.pixel_shuffle.default,
    ATEN.pixel_unshuffle.default,
    ATEN.channel_shuffle.default,
}
"""Operators that only arrange values of their first argument."""

MAX_POOLS = {ATEN.max_pool1d.default, ATEN.max_pool2d.default, ATEN.max_pool3d.default}


@dataclass(frozen=True, eq=False)
class Multiplication:
    """A convolution or Linear layer of a graph.

    Attributes:
        node: The operator.
        axis: Where the output channels of its weight are.
        is_linear: Whether it is a Linear layer.
    """

    node: Node
    axis: Axis
    is_linear: bool

    @property
    def input(self) -> Node:
        """What is multiplied by the weight."""
        value: Node = self.node.args[0]  # type: ignore[assignment]
        return value

    @property
    def weight(self) -> Node:
        """The weight operand."""
        value: Node = self.node.args[1]  # type: ignore[assignment]
        return value

    @property
    def bias(self) -> Node | None:
        """What is added, if anything."""
        value: Node | None = argument(self.node, 2, "bias")
        return value

    @property
    def layer(self) -> str:
        """Path of the layer, if its weight is codes; else the node's name."""
        if is_call(self.weight, DEQUANTIZE):
            return str(self.weight.args[3])
        return self.node.name

    def replace_weight(self, weight: Node) -> None:
        """Multiply by another weight."""
        self.node.update_arg(1, weight)

    def replace_bias(self, bias: Node) -> None:
        """Add another bias."""
        args = [*self.node.args]
        if len(args) < 3:
            args.append(bias)
        args[2] = bias
        self.node.args = tuple(args)
        self.node.kwargs = {
            name: value for name, value in self.node.kwargs.items() if name != "bias"
        }


def multiplication(node: Any) -> Multiplication | None:
    """The convolution or Linear layer that a node is, if it is one."""
    if not isinstance(node, Node) or node.op != "call_function":
        return None
    if node.target is ATEN.linear.default:
        return Multiplication(node, 0, is_linear=True)
    if node.target in _CONVOLUTIONS:
        return Multiplication(node, 0, is_linear=False)
    if node.target in _TRANSPOSED:
        groups = argument(node, 6, "groups", 1)
        return Multiplication(node, output_axis(1, groups), is_linear=False)
    return None


@dataclass(frozen=True)
class Grid:
    """What the codes of an activation stand for.

    Attributes:
        scale: Width of a bin.
        zero_point: Code of real zero.
        low: Lowest code in use.
        high: Highest code in use.
        bits: Bit-width: the codes are within `0 .. 2^bits - 1`.
    """

    scale: float
    zero_point: int
    low: int
    high: int
    bits: int

    @property
    def saturates(self) -> bool:
        """Whether eight bits alone keep codes within `low .. high`."""
        return self.low == 0 and self.high == 255

    @property
    def has_zero(self) -> bool:
        """Whether real zero is a code in use."""
        return self.low <= self.zero_point <= self.high

    def keeps(self, other: Grid) -> bool:
        """Whether every value on another grid, and zero, stays as it is on this one."""
        same = (self.scale, self.zero_point) == (other.scale, other.zero_point)
        return same and self.low <= other.low and other.high <= self.high and self.has_zero


def grid_of(node: Node) -> Grid:
    """The grid of a `fake_quantize` node."""
    scale, zero_point, low, high, bits = node.args[1:6]
    return Grid(scale, zero_point, low, high, bits)  # type: ignore[arg-type]


def quantizer_of(value: Any) -> Node | None:
    """The `fake_quantize` node whose values a node has, rearranged at most; None without one."""
    while isinstance(value, Node) and value.op == "call_function":
        if value.target is FAKE_QUANTIZE:
            return value
        if not (value.target in ARRANGING or value.target in MAX_POOLS or is_zero_pad(value)):
            return None
        value = value.args[0]
    return None


def is_zero_pad(node: Any) -> bool:
    """Whether a node adds zeros at the borders, and nothing else."""
    if is_call(node, ATEN.pad.default):
        mode, value = argument(node, 2, "mode", "constant"), argument(node, 3, "value")
        return mode == "constant" and not value
    return is_call(node, ATEN.constant_pad_nd.default) and not argument(node, 2, "value", 0)


def averages_images(node: Any) -> bool | None:
    """Whether a node that averages all positions of images keeps their axes.

    None if it does something else.
    """
    if is_call(node, ATEN.adaptive_avg_pool2d.default):
        return True if all(size == 1 for size in node.args[1]) else None
    if not is_call(node, ATEN.mean.dim):
        return None
    rank = node.args[0].meta["val"].ndim
    axes = {axis % rank for axis in argument(node, 1, "dim")}
    if rank != 4 or axes != {2, 3}:
        return None
    return bool(argument(node, 2, "keepdim", default=False))


def clamp_of(node: Any) -> tuple[float | None, float | None] | None:
    """Bounds of a node that clamps its first argument; None if it does something else."""
    if is_call(node, ATEN.relu.default):
        return 0.0, None
    if is_call(node, ATEN.relu6.default):
        return 0.0, 6.0
    if is_call(node, ATEN.hardtanh.default):
        return argument(node, 1, "min_val", -1.0), argument(node, 2, "max_val", 1.0)
    if is_call(node, ATEN.clamp.default):
        return argument(node, 1, "min"), argument(node, 2, "max")
    if is_call(node, ATEN.clamp_min.default):
        return argument(node, 1, "min"), None
    return None


def is_call(node: Any, *functions: Callable[..., Any]) -> bool:
    """Whether a node, if it is one, calls one of these functions."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in functions


def replace_weight(
    graph: fx.GraphModule, product: Multiplication, scale: Tensor, *, codes: Tensor | None = None
) -> None:
    """Let a layer multiply by a weight of another scale.

    Args:
        graph: The graph of the layer.
        product: The layer, whose weight is codes.
        scale: The new scale.
        codes: The new codes; None keeps them.
    """
    weight = product.weight
    with graph.graph.inserting_before(product.node):
        held_codes = weight.args[0] if codes is None else with_buffer(graph, "codes", codes)
        held = held_codes, with_buffer(graph, "scale", scale)
        dequantized = graph.graph.call_function(DEQUANTIZE, (*held, *weight.args[2:]))
    dequantized.meta = dict(weight.meta)
    product.replace_weight(dequantized)


def tensor_of(graph: fx.GraphModule, node: Any) -> Tensor:
    """The parameter or buffer that a node reads."""
    holder, _, name = str(node.target).rpartition(".")
    tensor: Tensor = getattr(graph.get_submodule(holder), name)
    return tensor.detach()


def with_buffer(graph: fx.GraphModule, name: str, tensor: Tensor) -> Node:
    """A node, at the graph's point of insertion, that reads a new buffer with these values."""
    number = 0
    while hasattr(graph, f"{name}_{number}"):
        number += 1
    graph.register_buffer(f"{name}_{number}", tensor.detach().clone())
    return graph.graph.get_attr(f"{name}_{number}")


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, however it was passed."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def only_reader(node: Node) -> Node | None:
    """The one node that reads a node; None if there are several or none."""
    if len(node.users) != 1:
        return None
    return next(iter(node.users))

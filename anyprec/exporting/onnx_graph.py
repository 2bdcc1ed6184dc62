"""The graph of an integer network in the form that becomes ONNX, before it is written.

ONNX wants the scale of a weight as a vector along one axis, and a matrix product with the weight as
it is used. Both are arranged here, on the codes, so that no runtime has to move a weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.node import Node

from anyprec.exporting.codes import quantize_behind_pools
from anyprec.exporting.constants import clean
from anyprec.exporting.graphs import (
    ATEN,
    averages_images,
    grid_of,
    is_call,
    multiplication,
    quantizer_of,
    tensor_of,
    with_buffer,
)
from anyprec.exporting.operators import DEQUANTIZE, FAKE_QUANTIZE


@torch.library.custom_op("anyprec::dequantize_linear", mutates_args=())
def dequantize_linear(codes: Tensor, scale: Tensor, axis: int, bits: int, layer: str) -> Tensor:
    """`DequantizeLinear` of ONNX, without zero point.

    Args:
        codes: int8 or int32.
        scale: float32, of shape `()` or `(codes.shape[axis],)`.
        axis: Along which the scale is.
        bits: Bit-width of the codes; the writer reads it.
        layer: Path of the layer, or of its bias.
    """
    del bits, layer
    shape = [1] * codes.ndim
    if scale.ndim:
        shape[axis] = -1
    return codes.to(scale.dtype) * scale.reshape(shape)


@dequantize_linear.register_fake
def _(codes: Tensor, scale: Tensor, axis: int, bits: int, layer: str) -> Tensor:
    del axis, bits, layer
    return torch.empty(codes.shape, dtype=scale.dtype, device=scale.device)


@torch.library.custom_op("anyprec::requantize", mutates_args=())
def requantize(
    values: Tensor, scale: float, zero_point: int, low: int, high: int, bits: int, layer: str
) -> Tensor:
    """`fake_quantize` of what is on another grid; the writer marks it for onnxruntime."""
    result: Tensor = FAKE_QUANTIZE(values, scale, zero_point, low, high, bits, layer)
    return result


@requantize.register_fake
def _(
    values: Tensor, scale: float, zero_point: int, low: int, high: int, bits: int, layer: str
) -> Tensor:
    del scale, zero_point, low, high, bits, layer
    return torch.empty_like(values)


REQUANTIZE = torch.ops.anyprec.requantize.default


@torch.library.custom_op("anyprec::global_average", mutates_args=())
def global_average(values: Tensor) -> Tensor:
    """`GlobalAveragePool` of ONNX, on images: runtimes have it on codes, and no mean.

    Args:
        values: Of shape `(batch, channels, height, width)`.
    """
    return values.mean(dim=(2, 3), keepdim=True)


@global_average.register_fake
def _(values: Tensor) -> Tensor:
    return values.new_empty(*values.shape[:2], 1, 1)


GLOBAL_AVERAGE = torch.ops.anyprec.global_average.default
DEQUANTIZE_LINEAR = torch.ops.anyprec.dequantize_linear.default


@dataclass(frozen=True)
class HeldCodes:
    """The codes in a buffer.

    Attributes:
        layer: Path of the layer whose weight they are, or of its bias.
        bits: Their bit-width.
    """

    layer: str
    bits: int


@torch.no_grad()
def arrange_for_onnx(graph: fx.GraphModule) -> None:
    """Bring an integer graph into the form that the writer translates, in place."""
    quantize_behind_pools(graph)
    _use_global_averages(graph)
    with_matrix_products(graph)
    for node in list(graph.graph.nodes):
        if _requantizes(node):
            node.target = REQUANTIZE
        if is_call(node, DEQUANTIZE):
            _with_vector_scale(graph, node)
    clean(graph)


def with_matrix_products(graph: fx.GraphModule) -> None:
    """Write the Linear layers on sequences as what ONNX has for them, in place."""
    for node in list(graph.graph.nodes):
        product = multiplication(node)
        if product is not None and product.is_linear and node.meta["val"].ndim > 2:
            _as_matrix_product(graph, node)


def _requantizes(node: Node) -> bool:
    """Whether a node quantizes what is on another grid already."""
    if not is_call(node, FAKE_QUANTIZE):
        return False
    before = quantizer_of(node.args[0])
    if before is None:
        return False
    grids = grid_of(node), grid_of(before)
    return len({(grid.scale, grid.zero_point) for grid in grids}) > 1


def _use_global_averages(graph: fx.GraphModule) -> None:
    for node in list(graph.graph.nodes):
        keepdim = averages_images(node)
        if keepdim is None:
            continue
        with graph.graph.inserting_before(node):
            average = graph.graph.call_function(GLOBAL_AVERAGE, (node.args[0],))
            if not keepdim:
                average = graph.graph.call_function(ATEN.flatten.using_ints, (average, 1))
        average.meta = {"val": node.meta["val"]}
        node.replace_all_uses_with(average)
        graph.graph.erase_node(node)


_ATTENTION = ATEN.scaled_dot_product_attention.default
_ATTENTION_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


@torch.no_grad()
def write_out_attention(graph: fx.GraphModule) -> None:
    """Write attention over other than four axes (Hiera's windows) as its products, in place.

    torch's exporter knows it on `(batch, heads, tokens, channels)` alone.
    """
    for node in list(graph.graph.nodes):
        if not is_call(node, _ATTENTION) or node.meta["val"].ndim == 4:
            continue
        given = dict(zip(_ATTENTION_ARGUMENTS, node.args, strict=False)) | node.kwargs
        if given.get("is_causal") or given.get("enable_gqa"):
            continue
        query, key, value = (cast(Node, given[name]) for name in _ATTENTION_ARGUMENTS[:3])
        scale = given.get("scale") or query.meta["val"].shape[-1] ** -0.5
        call = graph.graph.call_function
        with graph.graph.inserting_before(node):
            scaled = call(ATEN.mul.Tensor, (query, scale))
            scores = call(ATEN.matmul.default, (scaled, call(ATEN.transpose.int, (key, -2, -1))))
            scores = _masked(graph, scores, given.get("attn_mask"))
            weights = call(ATEN.softmax.int, (scores, -1))
            result = call(ATEN.matmul.default, (weights, value))
        result.meta = dict(node.meta)
        node.replace_all_uses_with(result)
        graph.graph.erase_node(node)
    graph.recompile()


def _masked(graph: fx.GraphModule, scores: Node, mask: Any) -> Node:
    if mask is None:
        return scores
    if mask.meta["val"].dtype == torch.bool:
        hidden = graph.graph.call_function(ATEN.logical_not.default, (mask,))
        return graph.graph.call_function(ATEN.masked_fill.Scalar, (scores, hidden, -math.inf))
    return graph.graph.call_function(ATEN.add.Tensor, (scores, mask))


def _as_matrix_product(graph: fx.GraphModule, linear: Node) -> None:
    """Write a Linear layer on sequences as a product with its transposed weight, and an addition.

    ONNX has no operator for it. A transposition of the weight would be done by the runtime, on
    floats.
    """
    values, weight, *rest = linear.args
    weight = cast(Node, weight)
    if not is_call(weight, DEQUANTIZE):
        return
    codes, scale = (tensor_of(graph, operand) for operand in weight.args[:2])
    if scale.ndim == 2:
        scale = scale.t()
    with graph.graph.inserting_before(linear):
        held = (
            with_buffer(graph, "codes", codes.t().contiguous()),
            with_buffer(graph, "scale", scale),
        )
        transposed = graph.graph.call_function(DEQUANTIZE, (*held, *weight.args[2:]))
        result = graph.graph.call_function(ATEN.matmul.default, (values, transposed))
        if rest and rest[0] is not None:
            bias = _in_floating_point(graph, rest[0])
            result = graph.graph.call_function(ATEN.add.Tensor, (result, bias))
    result.meta = dict(linear.meta)
    linear.replace_all_uses_with(result)
    graph.graph.erase_node(linear)


def _in_floating_point(graph: fx.GraphModule, bias: object) -> Node:
    """A bias in floating point, which is what an addition behind a product takes."""
    if not isinstance(bias, Node):
        msg = f"a bias is a node, not a {type(bias).__name__}"
        raise TypeError(msg)
    if not is_call(bias, DEQUANTIZE):
        return bias
    codes, scale = (tensor_of(graph, operand) for operand in bias.args[:2])
    return with_buffer(graph, "bias", codes.to(scale.dtype) * scale)


def codes_in(graph: fx.GraphModule) -> dict[str, HeldCodes]:
    """What the buffers with codes of weights hold, by their name."""
    held: dict[str, HeldCodes] = {}
    for node in graph.graph.nodes:
        if is_call(node, DEQUANTIZE_LINEAR):
            *_, bits, layer = node.args
            held[str(node.args[0].target)] = HeldCodes(layer, bits)
    return held


def _with_vector_scale(graph: fx.GraphModule, node: Node) -> None:
    codes, scale = (tensor_of(graph, operand) for operand in node.args[:2])
    axes = [axis for axis in range(scale.ndim) if scale.shape[axis] > 1]
    bits, layer = node.args[2:4]
    with graph.graph.inserting_before(node):
        if len(axes) > 1:
            # Grouped transposed convolutions: ONNX has no vector for these scales.
            held = with_buffer(graph, "weight", codes.to(scale.dtype) * scale)
        else:
            axis = axes[0] if axes else 0
            vector = scale.flatten() if axes else scale.reshape(())
            operands = node.args[0], with_buffer(graph, "scale", vector)
            held = graph.graph.call_function(DEQUANTIZE_LINEAR, (*operands, axis, bits, layer))
    held.meta = dict(node.meta)
    node.replace_all_uses_with(held)
    graph.graph.erase_node(node)

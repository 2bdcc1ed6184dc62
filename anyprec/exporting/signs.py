"""Pass: weight scales become positive, for targets that know no others.

The scale of a norm can be negative, and then so is the weight scale that it went into. The sign
moves into the codes of the channel where its lowest code allows that: codes reach from
`-2^(bits - 1)` to `2^(bits - 1) - 1`. Where it does not, the channel's result is multiplied by -1.
Both are exact.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.fx.node import Node

from anyprec.exporting.constants import clean
from anyprec.exporting.graphs import (
    ATEN,
    Multiplication,
    is_call,
    multiplication,
    replace_weight,
    tensor_of,
    with_buffer,
)
from anyprec.exporting.operators import DEQUANTIZE
from anyprec.nn.channels import along, rows_of_channels


@torch.no_grad()
def make_scales_positive(graph: fx.GraphModule, *, code_bits: int | None = None) -> list[str]:
    """Make every weight scale positive, in place; values stay equal.

    Biases must not be codes yet.

    Args:
        graph: The graph of an integer network.
        code_bits: Bits that a code may take; None is the bit-width of its layer.

    Returns:
        Layers whose result is multiplied by signs behind them.
    """
    signed: list[str] = []
    for node in list(graph.graph.nodes):
        product = multiplication(node)
        if product is None or not is_call(product.weight, DEQUANTIZE):
            continue
        if _make_positive(graph, product, code_bits):
            signed.append(product.layer)
    clean(graph)
    return signed


def _make_positive(graph: fx.GraphModule, product: Multiplication, code_bits: int | None) -> bool:
    """Returns whether the result of the layer needed signs."""
    weight = product.weight
    codes, scale = tensor_of(graph, weight.args[0]), tensor_of(graph, weight.args[1])
    negative = rows_of_channels(scale.expand(codes.shape), product.axis)[:, 0] < 0
    if not bool(negative.any()):
        return False
    bits: int = code_bits or weight.args[2]  # type: ignore[assignment]
    lowest = rows_of_channels(codes, product.axis).amin(dim=1).int()
    stuck = negative & (-lowest > 2 ** (bits - 1) - 1)
    flipped = along(torch.where(negative & ~stuck, -1, 1), product.axis, codes)
    replace_weight(graph, product, scale.abs(), codes=(codes.int() * flipped).to(torch.int8))
    if bool(stuck.any()):
        _multiply_behind(graph, product, torch.where(stuck, -1.0, 1.0))
    return bool(stuck.any())


def _multiply_behind(graph: fx.GraphModule, product: Multiplication, signs: Tensor) -> None:
    """Negate channels of a layer's result, and their bias to match."""
    node = product.node
    if product.bias is not None:
        bias = tensor_of(graph, product.bias)
        with graph.graph.inserting_before(node):
            product.replace_bias(with_buffer(graph, "bias", bias * signs))
    readers = list(node.users)
    with graph.graph.inserting_after(node):
        result = graph.graph.call_function(ATEN.mul.Tensor, (node, node))
    with graph.graph.inserting_before(result):
        spatial = 0 if product.is_linear else node.meta["val"].ndim - 2
        held = with_buffer(graph, "signs", signs.reshape(-1, *[1] * spatial))
    result.args = (node, held)
    result.meta = {"val": node.meta["val"]}
    _redirect(readers, node, result)


def _redirect(readers: list[Node], old: Node, new: Node) -> None:
    for reader in readers:
        reader.replace_input_with(old, new)

"""Pass: a BatchNorm behind a convolution goes into the scale and bias of that convolution.

The codes stay as they are, so the integer weights of the chip are those that were trained. Scales
are computed in float64; the result differs from the network's by the rounding of float32 only.
(Jacob et al., CVPR 2018, section 3.2, fold into the weights before quantizing instead.)
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx
from torch.fx.node import Node

from anyprec.exporting.constants import clean
from anyprec.exporting.graphs import (
    ATEN,
    Multiplication,
    argument,
    is_call,
    multiplication,
    only_reader,
    replace_weight,
    tensor_of,
    with_buffer,
)
from anyprec.exporting.operators import DEQUANTIZE
from anyprec.nn.channels import along

_NORMS = (ATEN._native_batch_norm_legit_no_training.default, ATEN.batch_norm.default)  # noqa: SLF001


@torch.no_grad()
def fold_norms(graph: fx.GraphModule) -> list[str]:
    """Fold every BatchNorm that reads a quantized convolution alone, in place.

    Returns:
        The layers that took one.
    """
    folded: list[str] = []
    for norm in list(graph.graph.nodes):
        if not is_call(norm, *_NORMS):
            continue
        product = multiplication(norm.args[0])
        if product is not None and _can_take_norm(product):
            _fold(graph, product, norm)
            folded.append(product.layer)
    clean(graph)
    return folded


def _can_take_norm(product: Multiplication) -> bool:
    if only_reader(product.node) is None or not is_call(product.weight, DEQUANTIZE):
        return False
    # The norm's channels are along axis 1, those of a Linear layer along the last one.
    return not product.is_linear or product.node.meta["val"].ndim == 2


def _fold(graph: fx.GraphModule, product: Multiplication, norm: Node) -> None:
    factor, shift = _affine(graph, norm)
    weight = product.weight
    codes, scale = tensor_of(graph, weight.args[0]), tensor_of(graph, weight.args[1])
    if product.bias is not None:
        shift = shift + tensor_of(graph, product.bias).double() * factor
    folded = scale.double() * along(factor, product.axis, codes)
    replace_weight(graph, product, folded.float())
    with graph.graph.inserting_before(product.node):
        bias = with_buffer(graph, "bias", shift.float())
    product.replace_bias(bias)
    result = norm
    for reader in list(norm.users):
        if is_call(reader, operator.getitem):
            reader.replace_all_uses_with(product.node)
            graph.graph.erase_node(reader)
    result.replace_all_uses_with(product.node)
    graph.graph.erase_node(norm)


def _affine(graph: fx.GraphModule, norm: Node) -> tuple[Tensor, Tensor]:
    """Scale and shift of a norm in float64, shape `(channels,)` each."""
    is_native = norm.target is _NORMS[0]
    scale, shift, mean, variance = (
        None if node is None else tensor_of(graph, node).double() for node in norm.args[1:5]
    )
    eps = argument(norm, 6 if is_native else 7, "eps", 1e-5)
    if mean is None or variance is None:  # pragma: no cover (a norm in eval mode has statistics)
        msg = f"{norm} has no statistics"
        raise ValueError(msg)
    factor = (variance + eps).rsqrt()
    if scale is not None:
        factor = factor * scale
    moved = -mean * factor
    return factor, moved if shift is None else moved + shift

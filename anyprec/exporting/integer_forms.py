"""Which module computes an operator of a lowered network on codes, or why none does.

An operator between quantizers takes the quantizer behind it in: what it sums up is rounded to the
codes of its result at once. That needs one quantizer that alone reads the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Node

from anyprec.exporting.graphs import (
    ATEN,
    Grid,
    Multiplication,
    argument,
    averages_images,
    grid_of,
    is_call,
    multiplication,
    only_reader,
    tensor_of,
)
from anyprec.exporting.integer_layers import IntegerPair, IntegerProduct
from anyprec.exporting.integer_pools import IntegerGlobalAverage, IntegerWindowAverage
from anyprec.exporting.operators import DEQUANTIZE, FAKE_QUANTIZE
from anyprec.nn.channels import rows_of_channels

_PAIRS = {ATEN.add.Tensor: "add", ATEN.mul.Tensor: "multiply"}
_GLOBAL_POOLS = (ATEN.adaptive_avg_pool2d.default, ATEN.mean.dim)

NO_FORM = "it has no integer form"
_NO_READER = "no quantizer alone reads its result"


@dataclass(frozen=True, eq=False)
class IntegerForm:
    """How an operator runs on codes.

    Attributes:
        module: Takes the codes of the operands.
        operands: Nodes whose codes it takes.
        quantizer: The quantizer that it takes in; None if it returns numbers.
    """

    module: nn.Module
    operands: tuple[Node, ...]
    quantizer: Node | None


class _NoFormError(Exception):
    """An operator has no integer form; the message says why."""


def integer_form(
    graph: fx.GraphModule, node: Node, grids: Mapping[Node, Grid]
) -> IntegerForm | str:
    """The integer form of an operator, or why it has none.

    Args:
        graph: The graph of the node.
        node: An operator.
        grids: Grid of each node whose values are codes.
    """
    try:
        product = multiplication(node)
        if product is not None:
            return _product_form(graph, product, grids)
        if node.target in _PAIRS:
            return _pair_form(node, grids)
        if is_call(node, *_GLOBAL_POOLS):
            return _global_average_form(node, grids)
        if is_call(node, ATEN.avg_pool2d.default):
            return _window_average_form(node, grids)
    except _NoFormError as error:
        return str(error)
    return NO_FORM


def _quantizer_behind(node: Node) -> Node | None:
    reader = only_reader(node)
    return reader if is_call(reader, FAKE_QUANTIZE) else None


def _needed_quantizer(node: Node) -> Node:
    quantizer = _quantizer_behind(node)
    if quantizer is None:
        raise _NoFormError(_NO_READER)
    return quantizer


def _grid(value: Any, grids: Mapping[Node, Grid], what: str) -> Grid:
    if not isinstance(value, Node) or value not in grids:
        msg = f"{what} is not quantized"
        raise _NoFormError(msg)
    return grids[value]


def _product_form(
    graph: fx.GraphModule, product: Multiplication, grids: Mapping[Node, Grid]
) -> IntegerForm:
    source = _grid(product.input, grids, "its input")
    if not is_call(product.weight, DEQUANTIZE):
        msg = "its weight is no constant of codes"
        raise _NoFormError(msg)
    bits: Any = product.weight.args[2]
    codes = tensor_of(graph, product.weight.args[0])
    quantizer = _quantizer_behind(product.node)
    module = IntegerProduct(
        str(product.node.target).removeprefix("aten."),
        _options(product.node),
        codes=codes,
        scale=_channel_scales(tensor_of(graph, product.weight.args[1]), codes, product),
        bias=_bias_codes(graph, product),
        source=source,
        target=None if quantizer is None else grid_of(quantizer),
        weight_bits=bits,
        axis=product.axis,
        layer=product.layer,
    )
    return IntegerForm(module, (product.input,), quantizer)


def _options(node: Node) -> tuple[Any, ...]:
    if set(node.kwargs) - {"bias"}:
        msg = f"its options are named: {', '.join(sorted(node.kwargs))}"
        raise _NoFormError(msg)
    return tuple(list(value) if isinstance(value, list) else value for value in node.args[3:])


def _channel_scales(scale: Tensor, codes: Tensor, product: Multiplication) -> Tensor:
    rows = rows_of_channels(scale.expand(codes.shape), product.axis)
    if not bool((rows == rows[:, :1]).all()):
        msg = "an output channel of its weight has several scales"
        raise _NoFormError(msg)
    return rows[:, 0].clone()


def _bias_codes(graph: fx.GraphModule, product: Multiplication) -> Tensor | None:
    if product.bias is None:
        return None
    if not is_call(product.bias, DEQUANTIZE):
        msg = "its bias is no constant of codes"
        raise _NoFormError(msg)
    return tensor_of(graph, product.bias.args[0]).to(torch.int32)


def _pair_form(node: Node, grids: Mapping[Node, Grid]) -> IntegerForm:
    if argument(node, 2, "alpha", 1) != 1:
        raise _NoFormError(NO_FORM)
    operands = node.args[:2]
    first, second = (_grid(operand, grids, "an operand") for operand in operands)
    quantizer = _needed_quantizer(node)
    kind = _PAIRS[node.target]  # type: ignore[index]
    module = IntegerPair(kind, first=first, second=second, target=grid_of(quantizer))
    return IntegerForm(module, operands, quantizer)  # type: ignore[arg-type]


def _global_average_form(node: Node, grids: Mapping[Node, Grid]) -> IntegerForm:
    source = _grid(node.args[0], grids, "its input")
    keepdim = averages_images(node)
    if keepdim is None:
        raise _NoFormError(NO_FORM)
    quantizer = _needed_quantizer(node)
    module = IntegerGlobalAverage(keepdim=keepdim, source=source, target=grid_of(quantizer))
    return IntegerForm(module, (node.args[0],), quantizer)  # type: ignore[arg-type]


def _window_average_form(node: Node, grids: Mapping[Node, Grid]) -> IntegerForm:
    source = _grid(node.args[0], grids, "its input")
    kernel = _both(node.args[1])
    ceil_mode = bool(argument(node, 4, "ceil_mode", default=False))
    counts_padding = bool(argument(node, 5, "count_include_pad", default=True))
    if argument(node, 6, "divisor_override") is not None or (ceil_mode and counts_padding):
        raise _NoFormError(NO_FORM)
    quantizer = _needed_quantizer(node)
    module = IntegerWindowAverage(
        kernel=kernel,
        stride=_both(argument(node, 2, "stride") or kernel),
        padding=_both(argument(node, 3, "padding", 0)),
        ceil_mode=ceil_mode,
        counts_padding=counts_padding,
        source=source,
        target=grid_of(quantizer),
    )
    return IntegerForm(module, (node.args[0],), quantizer)  # type: ignore[arg-type]


def _both(value: Any) -> tuple[int, int]:
    """A size for both axes."""
    sizes = list(value) if isinstance(value, (list, tuple)) else [value]
    return int(sizes[0]), int(sizes[-1])

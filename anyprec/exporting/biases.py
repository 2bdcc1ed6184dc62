"""Pass: biases of integer layers become int32 codes, on the scale of the accumulator.

That scale is the product of the input's and the weight's (Jacob et al., CVPR 2018, section 2.4). In
a channel whose weights are next to nothing it can be so small that the bias has no int32 code. Such
a channel gets a coarser weight scale, larger by a power of two, and codes to match.

Codes of few bits leave the accumulator so coarse that rounding the bias to it would move results by
steps of the next quantizer. They are multiplied by the power of two that fills eight bits, and
their scale is divided by it: the weights stay the same numbers, and the bias is as exact as at
eight bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from anyprec.exporting.constants import clean
from anyprec.exporting.graphs import (
    Multiplication,
    grid_of,
    is_call,
    multiplication,
    quantizer_of,
    replace_weight,
    tensor_of,
    with_buffer,
)
from anyprec.exporting.operators import DEQUANTIZE
from anyprec.nn.channels import along, rows_of_channels

LARGEST_BIAS = 2**30
"""Magnitude of a bias code, at most: half of the int32 range is left for the products."""

_LEAST_SCALE = 2.0**-100
"""Weight scales below this count as zero."""


@dataclass(frozen=True)
class RaisedScale:
    """Channels of a layer whose weight scale was raised so that their bias fits.

    Attributes:
        layer: Path of the layer.
        channels: Number of these channels.
        largest: The largest factor.
    """

    layer: str
    channels: int
    largest: float


@torch.no_grad()
def quantize_biases(graph: fx.GraphModule) -> list[RaisedScale]:
    """Give every layer whose input and weight are codes an int32 bias, in place.

    Returns:
        The layers that have channels with another scale.
    """
    raised: list[RaisedScale] = []
    for node in list(graph.graph.nodes):
        product = multiplication(node)
        if product is None or product.bias is None or product.bias.op != "get_attr":
            continue
        source = quantizer_of(product.input)
        if source is None or not is_call(product.weight, DEQUANTIZE):
            continue
        change = _quantize_bias(graph, product, grid_of(source).scale)
        if change is not None:
            raised.append(change)
    clean(graph)
    return raised


def _quantize_bias(
    graph: fx.GraphModule, product: Multiplication, input_scale: float
) -> RaisedScale | None:
    weight = product.weight
    finer = 2 ** (8 - int(weight.args[2]))  # type: ignore[arg-type]
    # Both are exact: the codes fit into int8, and the scale is far from float32's smallest number.
    codes = tensor_of(graph, weight.args[0]) * finer
    scale = tensor_of(graph, weight.args[1]) / finer
    bias_node: Any = product.bias
    bias = tensor_of(graph, bias_node).double()
    by_channel = _channel_scales(scale, codes, product)
    factor = _factors(bias, by_channel.double() * input_scale)
    if bool((factor != 1).any()):
        by_channel = torch.where(factor == 0, _scale_for(bias, input_scale), by_channel * factor)
        spread = along(factor, product.axis, codes)
        # A channel without any scale has codes that mean nothing.
        coarser = torch.where(spread == 0, 0, codes.double() / spread.clamp_min(1)).round()
        codes, scale = coarser.to(torch.int8), along(by_channel.float(), product.axis, codes)
    replace_weight(graph, product, scale, codes=codes)
    accumulator = (torch.tensor(input_scale) * by_channel.float()).float()
    bias_codes = (bias / accumulator.double()).round().to(torch.int32)
    with graph.graph.inserting_before(product.node):
        held = with_buffer(graph, "bias", bias_codes), with_buffer(graph, "scale", accumulator)
        layer = f"{product.layer}.bias"
        dequantized = graph.graph.call_function(DEQUANTIZE, (*held, 32, layer))
    dequantized.meta = dict(bias_node.meta)
    product.replace_bias(dequantized)
    # Up to the factor that made the codes finer, they get coarser again without a loss.
    raised = (factor > finer) | (factor == 0)
    if not bool(raised.any()):
        return None
    return RaisedScale(product.layer, int(raised.sum()), max(1.0, float(factor.max()) / finer))


def _channel_scales(scale: Tensor, codes: Tensor, product: Multiplication) -> Tensor:
    """The weight scale of each output channel."""
    return rows_of_channels(scale.expand(codes.shape), product.axis)[:, 0]


def _factors(bias: Tensor, accumulator: Tensor) -> Tensor:
    """By what each channel's scale is to grow, a power of two; 0 where there is no scale."""
    needed = bias.abs() / (LARGEST_BIAS * accumulator.abs())
    factor = torch.exp2(torch.log2(needed.clamp_min(1)).ceil())
    return torch.where(accumulator.abs() < _LEAST_SCALE, 0, factor)


def _scale_for(bias: Tensor, input_scale: float) -> Tensor:
    """A weight scale on which the bias is exact to 30 bits; 1 where that is zero."""
    scale = bias.abs() / (LARGEST_BIAS * input_scale)
    return torch.where(bias == 0, torch.ones_like(scale), scale)

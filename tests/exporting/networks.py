"""Small converted networks, and graphs of operators, that tests of the export share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

import anyprec
from anyprec.exporting.operators import DEQUANTIZE, FAKE_QUANTIZE


def converted(network: nn.Module, images: Tensor, **settings: Any) -> anyprec.ConvertedModel:
    """The network, calibrated on these images."""
    model = anyprec.convert(network.eval(), bits=(2, 4, 8), example_input=images[:1], **settings)
    anyprec.calibrate(model, [images])
    return model


def graph_of(build: Callable[[fx.Graph, fx.Node], fx.Node], **tensors: Tensor) -> fx.GraphModule:
    """A graph of one input, built node by node; `tensors` become its buffers."""
    root = nn.Module()
    for name, tensor in tensors.items():
        root.register_buffer(name, tensor)
    graph = fx.Graph()
    graph.output(build(graph, graph.placeholder("x")))
    return fx.GraphModule(root, graph)


def quantized(
    graph: fx.Graph, values: Any, scale: float, zero_point: int = 0, bits: int = 8
) -> fx.Node:
    """`fake_quantize` on the full grid."""
    top = 2**bits - 1
    return graph.call_function(FAKE_QUANTIZE, (values, scale, zero_point, 0, top, bits, "layer"))


def weight(
    graph: fx.Graph, codes: str = "codes", scale: str = "scale", *, bits: int = 8
) -> fx.Node:
    """A weight of the codes and scale that are buffers of these names."""
    held = graph.get_attr(codes), graph.get_attr(scale)
    return graph.call_function(DEQUANTIZE, (*held, bits, "layer"))


def operators(graph: fx.GraphModule) -> Counter[str]:
    """How often each operator is called, by its short name."""
    calls = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    return Counter(str(target).split(".")[1] if "." in str(target) else "" for target in calls)


def channel_codes(outputs: int = 4, inputs: int = 3, size: int = 3) -> tuple[Tensor, Tensor]:
    """Random codes of a convolution, and a scale for each output channel."""
    codes = torch.randint(-128, 128, (outputs, inputs, size, size)).to(torch.int8)
    return codes, torch.rand(outputs, 1, 1, 1) * 0.01 + 0.001

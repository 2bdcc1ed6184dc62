"""Names of the places where a graph has codes: each `fake_quantize` has one that no other has.

They are how a file is compared with the network that it was made of: the quantizers of the lowered
graph keep their names through all passes, and the codes in an ONNX file are named after them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container

from torch import fx
from torch.fx.node import Node

from anyprec.exporting.graphs import is_call
from anyprec.exporting.operators import FAKE_QUANTIZE

_REPEATED = ":"
"""Between a path and the number of the call, from the second one on."""


def name_points(graph: fx.GraphModule) -> None:
    """Give every quantizer a name of its own, in place.

    It is the path of its layer; what a layer quantizes in its second call is `path:2`.
    """
    calls: Counter[str] = Counter()
    for node in quantizers_of(graph):
        path = layer_of(point_of(node))
        calls[path] += 1
        name = path if calls[path] == 1 else f"{path}{_REPEATED}{calls[path]}"
        node.update_arg(6, name)


def quantizers_of(graph: fx.GraphModule) -> list[Node]:
    """The nodes that quantize activations, in order."""
    return [node for node in graph.graph.nodes if is_call(node, FAKE_QUANTIZE)]


def point_of(quantizer: Node) -> str:
    """The name of a quantizer."""
    return str(quantizer.args[6])


def layer_of(point: str) -> str:
    """Path of the layer whose input a point is."""
    return point.partition(_REPEATED)[0]


def codes_name(point: str, layers: Container[str]) -> str:
    """Name of a point's codes in a file.

    Args:
        point: Its name.
        layers: Paths of the quantized layers; other points are the outputs of something.
    """
    kind = "input_codes" if layer_of(point) in layers else "codes"
    return f"{point}.{kind}"

"""Names of an ONNX model's operators: those of layers say which layer it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

CALL = "#"
"""Comes before the number of a call, from the second on, of a layer that is called again."""


def name_layers(model: onnx.ModelProto, layers: Mapping[str, str]) -> None:
    """Name every operator that multiplies by the weight of a layer after the layer, in place.

    So do the runtimes' reports of times and errors.

    Args:
        model: The model.
        layers: The layer of each initializer that holds codes, by the initializer's name.
    """
    weights: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in layers:
            weights[node.output[0]] = layers[node.input[0]]
    calls: Counter[str] = Counter()
    for node in model.graph.node:
        multiplied = [weights[name] for name in node.input[:2] if name in weights]
        if multiplied and node.op_type != "DequantizeLinear":
            layer = multiplied[0]
            calls[layer] += 1
            node.name = layer if calls[layer] == 1 else f"{layer}{CALL}{calls[layer]}"

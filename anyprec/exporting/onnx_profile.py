"""Which layer each operator of an optimized ONNX model belongs to."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection
from typing import Any

from anyprec.exporting.onnx_names import CALL

_OF_THE_RUNTIME = re.compile(r"(_token_\d+|_nchwc|_nhwc|_fused|_quant|/duplicated)+$")
"""What onnxruntime appends to the name of an operator that it changes."""


def layer_of_operators(model: Any, layers: Collection[str]) -> dict[str, str]:
    """The layer of each operator, by the operator's name.

    A multiplication belongs to the layer that it is named after. Any other operator belongs to the
    next layer that reads its result; behind the last layer, to the one before it.

    Args:
        model: An optimized model of a network whose layers are named (`onnx_names.py`).
        layers: Their paths, one at least.
    """
    nodes = list(model.graph.node)
    readers: dict[str, list[Any]] = defaultdict(list)
    for node in nodes:
        for name in node.input:
            readers[name].append(node)
    belongs: dict[str, str | None] = {}
    # From the back, so that the readers of each result are known.
    for node in reversed(nodes):
        layer = _own_layer(node.name, layers)
        if layer is None:
            behind = [reader for name in node.output for reader in readers[name]]
            layer = next((belongs[reader.name] for reader in behind if belongs[reader.name]), None)
        belongs[node.name] = layer
    found: dict[str, str] = {}
    before = next((layer for layer in belongs.values() if layer is not None), next(iter(layers)))
    for node in nodes:
        before = belongs[node.name] or before
        found[node.name] = before
    return found


def _own_layer(name: str, layers: Collection[str]) -> str | None:
    """The layer that an operator is named after, if any."""
    plain = _OF_THE_RUNTIME.sub("", name).partition(CALL)[0]
    return plain if plain in layers else None

"""Layers that belong together in a network: those that read one tensor, or whose outputs add."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Literal

from torch import fx

from anyprec.errors import SearchError
from anyprec.model.converted import ConvertedModel
from anyprec.model.switching import outputs_in_float
from anyprec.network.tracing import trace
from anyprec.nn.layers import QuantizedLayer
from anyprec.nn.owners import FunctionalOwner
from anyprec.runtime.modes import evaluating

TiedLayers = Literal["inputs", "residual"] | Iterable[Sequence[str]]
"""A rule, or groups of paths or patterns."""

_ADDITIONS = (operator.add, operator.iadd, "add", "add_")


def tied_groups(model: ConvertedModel, tied: TiedLayers) -> list[Sequence[str]]:
    """The groups that `tied` means for a network.

    Raises:
        SearchError: The rule is unknown, or needs a graph and the network cannot be traced.
    """
    if not isinstance(tied, str):
        return list(tied)
    if tied not in ("inputs", "residual"):
        msg = f"tied={tied!r} is unknown: use 'inputs', 'residual', or a list of groups of layers"
        raise SearchError(msg)
    with evaluating(model), outputs_in_float(model):
        graph, reason = trace(model, opaque=(QuantizedLayer, FunctionalOwner))
    if graph is None:
        msg = f"tied={tied!r} needs the network's graph, and torch.fx cannot trace it ({reason}): "
        msg += "name the groups yourself"
        raise SearchError(msg)
    layers = _layers_by_node(model, graph)
    return _same_inputs(graph, layers) if tied == "inputs" else _added(graph, layers)


def _layers_by_node(model: ConvertedModel, graph: fx.Graph) -> dict[fx.Node, list[str]]:
    """Paths of the quantized layers that each node executes."""
    layers: dict[fx.Node, list[str]] = {}
    for node in graph.nodes:
        if node.op != "call_module":
            continue
        target = str(node.target)
        layers[node] = []
        for path, module in model.get_submodule(target).named_modules():
            if isinstance(module, QuantizedLayer):
                layers[node].append(f"{target}.{path}" if path else target)
    return layers


def _same_inputs(graph: fx.Graph, layers: dict[fx.Node, list[str]]) -> list[Sequence[str]]:
    readers: dict[fx.Node, list[str]] = {}
    for node in graph.nodes:
        if len(layers.get(node, ())) == 1 and node.all_input_nodes:
            readers.setdefault(node.all_input_nodes[0], []).extend(layers[node])
    # A layer that is called twice on the same tensor reads it once.
    groups = [tuple(dict.fromkeys(paths)) for paths in readers.values()]
    return [group for group in groups if len(group) > 1]


def _added(graph: fx.Graph, layers: dict[fx.Node, list[str]]) -> list[Sequence[str]]:
    """Layers whose outputs are added, with no other layer in between."""
    last: dict[fx.Node, frozenset[str]] = {}
    groups = []
    for node in graph.nodes:
        if layers.get(node):
            last[node] = frozenset(layers[node])
            continue
        summands = [last.get(source, frozenset()) for source in node.all_input_nodes]
        last[node] = frozenset().union(*summands)
        if node.target in _ADDITIONS and sum(map(bool, summands)) > 1:
            groups.append(tuple(sorted(last[node])))
    return [group for group in groups if len(group) > 1]

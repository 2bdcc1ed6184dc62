"""Which kind each layer is, as hardware sees it: read off its class."""

from __future__ import annotations

import dataclasses

from torch import nn

from anyprec.network.facts import LayerFacts, LayerKind, NetworkFacts


def with_kinds(model: nn.Module, facts: NetworkFacts) -> NetworkFacts:
    """`facts` of a float or converted network, with the kind of every layer."""
    layers: dict[str, LayerFacts] = {}
    for path, layer in facts.layers.items():
        layers[path] = dataclasses.replace(layer, kind=layer_kind(model, layer))
    return dataclasses.replace(facts, layers=layers)


def layer_kind(model: nn.Module, facts: LayerFacts) -> LayerKind:
    """The kind of one layer of `model`."""
    if facts.dynamic:
        return "other"  # a weight that depends on the input is none to a compiler
    if facts.parameter is not None:
        holder = model.get_submodule(facts.parameter.rpartition(".")[0])
        # Of other bare parameters nothing says that a target takes their product for a layer.
        return "linear" if isinstance(holder, nn.MultiheadAttention) else "other"
    layer = model.get_submodule(facts.path)
    if isinstance(layer, nn.Linear):
        return "linear"
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return "depthwise" if facts.depthwise else "convolution"
    return "other"

"""How layers are connected: what reads the image, what makes the output, which layer feeds a norm.

The torch.fx graph of the eval-mode network answers this by one walk in execution order. Where there
is no graph, one observed forward pass shows a part of it; then signs stay unknown.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from anyprec.network.observation import Observation
from anyprec.network.signs import (
    IDENTITY_MODULES,
    SIGN_KEEPING_MODULES,
    function_is_identity,
    function_is_nonnegative,
    function_keeps_signs,
    is_activation,
    module_is_nonnegative,
)
from anyprec.network.weights import named_layers
from anyprec.nn.norms import NORM_TYPES
from anyprec.nn.operators import LAYER_TYPES, OPERATORS


@dataclass
class Flow:
    """How layers are connected. Everything is named by its path.

    Attributes:
        feeds: BatchNorm to the single layer that feeds it, or None.
        features: Layer to the other norm or the activation right behind it.
        first: Layers that read the network's input.
        last: Layers that make the network's output.
        constant: Layers whose input does not depend on the network's input; None if unknown.
        nonnegative: Layers whose input cannot be negative.
    """

    feeds: dict[str, str | None] = field(default_factory=dict)
    features: dict[str, str] = field(default_factory=dict)
    first: set[str] = field(default_factory=set)
    last: set[str] = field(default_factory=set)
    constant: set[str] | None = None
    nonnegative: set[str] = field(default_factory=set)


def flow_from_observation(observation: Observation) -> Flow:
    """Connections as far as one forward pass shows them: layers are taken in the order of calls."""
    order = observation.order
    return Flow(feeds=dict(observation.fed), first=set(order[:1]), last=set(order[-1:]))


def flow_from_graph(model: nn.Module, graph: fx.Graph) -> Flow:
    """Connections as the graph of `model` shows them."""
    return _GraphWalk(model, graph).run()


@dataclass(frozen=True)
class _Value:
    """What is known of the value of a graph node.

    Attributes:
        layers: The last layers on every way from the network's input to the value.
        from_input: It is reached from the network's input with no layer in between.
        varies: It depends on the network's input at all.
        nonnegative: It cannot be negative.
        direct: The layer whose output it is, unchanged.
    """

    layers: frozenset[str] = frozenset()
    from_input: bool = False
    varies: bool = False
    nonnegative: bool = False
    direct: str | None = None


class _GraphWalk:
    """One walk through a graph, in execution order."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self._graph = graph
        self._modules = dict(model.named_modules())
        # A module that stands in several places has one path here, as everywhere else.
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._values: dict[fx.Node, _Value] = {}
        self._weight_nodes: dict[fx.Node, str] = {}
        self._visited: set[str] = set()
        self._signed: set[str] = set()
        self._varying: set[str] = set()
        self._consumed: set[str] = set()
        self._flow = Flow()

    def run(self) -> Flow:
        for node in self._graph.nodes:
            self._values[node] = self._visit(node)
        self._flow.nonnegative = self._visited - self._signed
        self._flow.constant = self._visited - self._varying
        return self._flow

    def _visit(self, node: fx.Node) -> _Value:
        inputs = [self._values[source] for source in node.all_input_nodes]
        if node.op == "placeholder":
            is_input = not node.args  # an argument with a default is none
            return _Value(from_input=is_input, varies=is_input)
        if node.op == "get_attr":
            return self._visit_attribute(node)
        if node.op == "output":
            # On a residual stream every block's output reaches the end; the last one is read by no
            # other layer.
            self._flow.last = set(_merge(inputs).layers) - self._consumed
            return _Value()
        if node.op == "call_module":
            return self._visit_module(node, inputs)
        return self._visit_function(node, inputs)

    def _visit_attribute(self, node: fx.Node) -> _Value:
        owner, _, name = str(node.target).rpartition(".")
        module = self._modules.get(owner)
        if name == "weight" and isinstance(module, LAYER_TYPES):
            self._weight_nodes[node] = self._paths[id(module)]
        return _Value()

    def _visit_module(self, node: fx.Node, inputs: list[_Value]) -> _Value:
        module = self._modules[str(node.target)]
        path = self._paths[id(module)]
        if isinstance(module, LAYER_TYPES) and inputs:
            return self._visit_layer(path, inputs[0])
        if isinstance(module, NORM_TYPES):
            return self._visit_norm(path, module, inputs)
        layers_inside = frozenset(f"{path}.{name}" for name, _ in named_layers(module))
        if layers_inside:
            # A block that could not be traced: what happens in it is unknown.
            merged = _merge(inputs)
            self._consumed |= merged.layers
            return _Value(layers=layers_inside, varies=merged.varies)
        if isinstance(module, SIGN_KEEPING_MODULES):
            nonnegative = _are_nonnegative(inputs)
            return _merge(
                inputs, nonnegative=nonnegative, direct=isinstance(module, IDENTITY_MODULES)
            )
        feeding = _single_direct(inputs)
        if feeding is not None and is_activation(module):
            self._flow.features.setdefault(feeding, path)
        return _merge(inputs, nonnegative=module_is_nonnegative(module))

    def _visit_norm(self, path: str, norm: nn.Module, inputs: list[_Value]) -> _Value:
        feeding = _single_direct(inputs)
        if isinstance(norm, _BatchNorm):
            # A norm that is called with the outputs of several layers belongs to none of them.
            unambiguous = self._flow.feeds.get(path, feeding) == feeding
            self._flow.feeds[path] = feeding if unambiguous else None
        elif feeding is not None:
            self._flow.features.setdefault(feeding, path)
        activation = getattr(norm, "act", None)  # of timm's BatchNormAct2d
        nonnegative = activation is not None and module_is_nonnegative(activation)
        return _merge(inputs, nonnegative=nonnegative)

    def _visit_function(self, node: fx.Node, inputs: list[_Value]) -> _Value:
        if node.target in OPERATORS:
            for source in node.all_input_nodes:
                if source in self._weight_nodes:
                    return self._visit_layer(self._weight_nodes[source], inputs[0])
        if function_is_nonnegative(node):
            return _merge(inputs, nonnegative=True)
        nonnegative = function_keeps_signs(node) and _are_nonnegative(inputs)
        return _merge(inputs, nonnegative=nonnegative, direct=function_is_identity(node))

    def _visit_layer(self, path: str, input_: _Value) -> _Value:
        self._visited.add(path)
        self._consumed |= input_.layers
        if not input_.nonnegative:
            self._signed.add(path)
        if input_.varies:
            self._varying.add(path)
        if input_.from_input:
            self._flow.first.add(path)
        return _Value(layers=frozenset({path}), varies=input_.varies, direct=path)


def _merge(inputs: list[_Value], *, nonnegative: bool = False, direct: bool = False) -> _Value:
    """The value of an operation on `inputs`; if it is `direct`, a single input stays unchanged."""
    layers: frozenset[str] = frozenset()
    from_input = varies = False
    for value in inputs:
        layers |= value.layers
        from_input |= value.from_input
        varies |= value.varies
    return _Value(
        layers, from_input, varies, nonnegative, _single_direct(inputs) if direct else None
    )


def _are_nonnegative(inputs: list[_Value]) -> bool:
    return bool(inputs) and all(value.nonnegative for value in inputs)


def _single_direct(inputs: list[_Value]) -> str | None:
    """The layer whose output is the only input."""
    return inputs[0].direct if len(inputs) == 1 else None

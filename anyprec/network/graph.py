"""What a network is: facts about its layers and norms, found by torch.fx and by one observed forward pass.

Two sources, each for what it knows best:

- The torch.fx graph of the eval-mode network tells how layers are connected: which read the image, which make the
  output, whose input can never be negative, and which single layer feeds a BatchNorm.
- One real forward pass (`observation.py`) tells what happens: in which operators each weight meets an input, its
  MACs, whether it is used without calling its layer, and what else costs something. It is also the fallback where a
  network cannot be traced; then layers are taken in the order of their calls, and signs stay unknown.

Nothing is rewritten and nothing of the network is changed here. Tracing follows timm's own lists of modules and
functions that must not be traced through.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from anyprec.network.facts import LayerFacts, NetworkFacts
from anyprec.network.observation import Observation, named_layers, observe
from anyprec.nn.norms import NORM_TYPES
from anyprec.nn.operators import LAYER_TYPES, MATRICES, OPERATORS
from anyprec.runtime.modes import evaluating


def analyze(model: nn.Module, example_input: Tensor) -> NetworkFacts:
    """Find the facts of `model`. Its parameters, buffers and mode are left as they were.

    Args:
        model: Any float network.
        example_input: A batch of at least one sample, e.g. shape `(1, 3, 224, 224)`, on the network's device.

    Raises:
        ConversionError: The network does not run on `example_input`.
    """
    with evaluating(model):
        seen = observe(model, example_input)
        graph, untraceable = trace(model)
    flow = _flow_without_graph(seen) if graph is None else _FlowBuilder(model, graph).build()
    layers = {facts.path: facts for facts in _all_layer_facts(model, seen, flow)}
    norms = {
        path: flow.feeds.get(path)
        for path, norm in model.named_modules()
        if isinstance(norm, _BatchNorm)
    }
    uncounted = {
        name: (calls, macs // seen.samples)
        for name, (calls, macs) in sorted(seen.uncounted.items())
    }
    return NetworkFacts(layers, norms, uncounted, tuple(example_input.shape), untraceable)


def _all_layer_facts(model: nn.Module, seen: Observation, flow: _Flow) -> Iterable[LayerFacts]:
    """Facts of every Conv and Linear layer, and of whatever else was seen to multiply by a weight, in network order."""
    matrices: dict[str, list[str]] = {}
    for path in {**seen.uses, **seen.hidden}:
        if path in seen.parameters:
            matrices.setdefault(seen.parameters[path].rpartition(".")[0], []).append(path)
    for path, module in model.named_modules():
        if isinstance(module, LAYER_TYPES) or path in seen.uses:
            yield _layer_facts(path, module, seen, flow)
        for matrix in matrices.get(path, ()):
            yield _matrix_facts(matrix, model.get_parameter(seen.parameters[matrix]), seen)


def _layer_facts(path: str, layer: nn.Module, seen: Observation, flow: _Flow) -> LayerFacts:
    uses = seen.uses.get(path, [])
    weight: Tensor = layer.weight  # type: ignore[assignment]
    is_class = isinstance(layer, LAYER_TYPES)
    mixed = (
        f"{path}.{MATRICES}.weight" in seen.uses
    )  # a product of its weight (experts) is what meets the input
    return LayerFacts(
        path=path,
        calls=len(uses),
        macs=sum(use.macs for use in uses) // seen.samples,
        weights=0 if mixed else weight.numel(),
        owner=_owner(path, [use.module for use in uses if use.module != path]),
        per_tensor=not is_class or not all(use.rows for use in uses),
        dynamic=any(use.dynamic for use in uses),
        derived=any(use.derived for use in uses),
        feature=flow.features.get(path),
        depthwise=getattr(layer, "groups", 1) > 1 and layer.groups == layer.in_channels,
        nonnegative=path in flow.nonnegative,
        first=path in flow.first,
        last=path in flow.last,
        # Both must say so: the graph may hide what a block does, and a tensor of another kind may hide where it is from.
        constant=bool(uses)
        and not any(use.varies for use in uses)
        and (flow.constant is None or path in flow.constant),
        problem=_problem(path, weight, seen),
    )


def _matrix_facts(path: str, parameter: nn.Parameter, seen: Observation) -> LayerFacts:
    uses = seen.uses.get(path, [])
    name = seen.parameters[path]
    axes = {use.axis for use in uses}
    return LayerFacts(
        path=path,
        calls=len(uses),
        macs=sum(use.macs for use in uses) // seen.samples,
        weights=parameter.numel(),
        owner=_owner(name, [use.module for use in uses]),
        parameter=name,
        axis=next(iter(axes)) if len(axes) == 1 else None,
        per_tensor=len(axes) != 1 or None in axes,
        constant=bool(uses) and not any(use.varies for use in uses),
        problem=_problem(path, parameter, seen),
    )


def _owner(path: str, modules: list[str]) -> str | None:
    """The innermost module around the layer and all modules that use its weight without calling it."""
    if not modules:
        return None
    around = path.split(".")[:-1]
    for module in modules:
        common = 0
        for mine, other in zip(around, module.split("."), strict=False):
            if mine != other:
                break
            common += 1
        around = around[:common]
    return ".".join(around)


def _problem(path: str, weight: Tensor, seen: Observation) -> str | None:
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "its weight is not initialised yet: run the network once before converting"
    if path in seen.hidden:
        return f"its weight is used inside {seen.hidden[path]}, which hides the operator"
    if path not in seen.uses:
        return "never used in an eval-mode forward pass"
    return None


def _flow_without_graph(seen: Observation) -> _Flow:
    """Connections as far as one forward pass shows them."""
    flow = _Flow(feeds=dict(seen.fed), constant=None)
    if seen.order:
        flow.first.add(seen.order[0])
        flow.last.add(seen.order[-1])
    return flow


# --- The torch.fx graph -------------------------------------------------------------------------------------------


@dataclass
class _Flow:
    """How layers are connected, by paths.

    `feeds` maps a BatchNorm to its layer, `features` a layer to the other norm or the activation behind it.
    """

    feeds: dict[str, str | None] = field(default_factory=dict)
    first: set[str] = field(default_factory=set)
    last: set[str] = field(default_factory=set)
    constant: set[str] | None = field(default_factory=set)  # None if unknown
    nonnegative: set[str] = field(default_factory=set)
    features: dict[str, str] = field(default_factory=dict)


class _Tracer(fx.Tracer):
    """Traces through everything but layers, BatchNorms and what timm says must not be traced.

    Args:
        opening: Trace through timm's untraceable blocks after all if they hold layers, which they would hide.
        opaque: More classes of modules that are not traced through.
    """

    def __init__(self, *, opening: bool, opaque: tuple[type, ...]) -> None:
        self._opening = opening
        self._opaque = opaque
        notrace_modules, notrace_functions = _timm_notrace()
        super().__init__(
            autowrap_modules=(math,),
            autowrap_functions=notrace_functions,
            param_shapes_constant=True,
        )
        self._notrace = notrace_modules

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, (*LAYER_TYPES, *NORM_TYPES, *self._opaque)):
            return True
        if isinstance(m, self._notrace):
            return not (self._opening and any(named_layers(m)))
        return super().is_leaf_module(m, module_qualified_name)


def _timm_notrace() -> tuple[tuple[type, ...], tuple[Callable[..., Any], ...]]:
    from timm.models import get_notrace_functions, get_notrace_modules  # noqa: PLC0415 (timm is slow to import)

    return tuple(get_notrace_modules()), tuple(get_notrace_functions())


def trace(model: nn.Module, *, opaque: tuple[type, ...] = ()) -> tuple[fx.Graph | None, str | None]:
    """The graph of `model` in its present mode, or None and the reason why it cannot be traced.

    Args:
        model: A float or a converted network.
        opaque: Classes of modules that are not traced through, beside layers, norms and what timm says.
    """
    reason = None
    for opening in (True, False):
        tracer = _Tracer(opening=opening, opaque=opaque)
        try:
            return tracer.trace(model, concrete_args=_default_arguments(model)), None
        except Exception as error:  # noqa: BLE001 (tracing runs any code with proxies: every error means "no graph")
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None, reason


def _default_arguments(model: nn.Module) -> dict[str, Any]:
    """Everything after the input keeps its default, so that branches on optional arguments are taken as in use."""
    parameters = list(inspect.signature(model.forward).parameters.values())[1:]
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


@dataclass(frozen=True)
class _Value:
    """What is known of the value of a graph node."""

    layers: frozenset[str] = frozenset()  # the layers met last on the way from the input
    from_input: bool = False  # reached from the network's input, with no layer in between
    varies: bool = False  # depends on the network's input at all
    nonnegative: bool = False
    direct: str | None = None  # the layer whose output this is, unchanged


class _FlowBuilder:
    """Walks the graph once, in execution order."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self.modules = dict(model.named_modules())
        self.aliases = {id(module): path for path, module in model.named_modules()}
        self.graph = graph
        self.values: dict[fx.Node, _Value] = {}
        self.flow = _Flow()
        self.signs: dict[str, list[bool]] = {}
        self.varying: dict[str, list[bool]] = {}
        self.consumed: set[str] = set()
        self._weight_nodes: dict[fx.Node, str] = {}

    def build(self) -> _Flow:
        for node in self.graph.nodes:
            self.values[node] = self._visit(node)
        self.flow.nonnegative = {path for path, signs in self.signs.items() if all(signs)}
        self.flow.constant = {path for path, varying in self.varying.items() if not any(varying)}
        return self.flow

    def _visit(self, node: fx.Node) -> _Value:
        inputs = [self.values[source] for source in node.all_input_nodes]
        if node.op == "placeholder":
            return _Value(from_input=True, varies=True) if not node.args else _Value()
        if node.op == "get_attr":
            return self._visit_attribute(node)
        if node.op == "output":
            self.flow.last = set().union(*(value.layers for value in inputs))
            self.flow.last -= (
                self.consumed
            )  # on a residual stream, every block's output reaches the end
            return _Value()
        if node.op == "call_module":
            return self._visit_module(node, inputs)
        return self._visit_function(node, inputs)

    def _visit_attribute(self, node: fx.Node) -> _Value:
        owner, _, name = str(node.target).rpartition(".")
        module = self.modules.get(owner)
        if name == "weight" and isinstance(module, LAYER_TYPES):
            self._weight_nodes[node] = self.aliases[id(module)]
        return _Value()

    def _visit_module(self, node: fx.Node, inputs: list[_Value]) -> _Value:
        module = self.modules[str(node.target)]
        path = self.aliases[id(module)]
        if isinstance(module, LAYER_TYPES) and inputs:
            return self._visit_layer(path, inputs[0])
        feeding = inputs[0].direct if len(inputs) == 1 else None
        if isinstance(module, NORM_TYPES):
            if isinstance(module, _BatchNorm):
                # A norm called with the outputs of several layers belongs to none of them.
                self.flow.feeds[path] = (
                    feeding if self.flow.feeds.get(path, feeding) == feeding else None
                )
            elif feeding is not None:
                self.flow.features.setdefault(feeding, path)
            activation = getattr(module, "act", None)
            return _merge(
                inputs, nonnegative=activation is not None and _maps_to_nonnegative(activation)
            )
        inside = frozenset(f"{path}.{name}" for name, _ in named_layers(module))
        if inside:  # a block that could not be traced: what happens in it is unknown
            self.consumed = self.consumed.union(*(value.layers for value in inputs))
            return _Value(layers=inside, varies=any(value.varies for value in inputs))
        if isinstance(module, _KEEPING_MODULES):
            return _merge(inputs, direct=isinstance(module, _IDENTITY_MODULES))
        if feeding is not None and _is_activation(module):
            self.flow.features.setdefault(feeding, path)
        return _merge(inputs, nonnegative=_maps_to_nonnegative(module))

    def _visit_function(self, node: fx.Node, inputs: list[_Value]) -> _Value:
        weight = next(
            (self._weight_nodes[n] for n in node.all_input_nodes if n in self._weight_nodes), None
        )
        if weight is not None and node.target in OPERATORS:
            return self._visit_layer(weight, inputs[0])
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if name in _NONNEGATIVE_FUNCTIONS or (
            name in {"clamp", "clamp_", "clip", "hardtanh"} and _floor(node) >= 0
        ):
            return _merge(inputs, nonnegative=True)
        if name in _KEEPING_FUNCTIONS:
            # A constant operand (a Python number) may be negative.
            numbers = [
                arg
                for arg in node.args
                if isinstance(arg, (int, float)) and not isinstance(arg, bool)
            ]
            signed = name in _ARITHMETIC and any(number < 0 for number in numbers)
            return _merge(inputs, signed=signed, direct=name in _IDENTITY_FUNCTIONS)
        return _merge(inputs, nonnegative=False)

    def _visit_layer(self, path: str, input_: _Value) -> _Value:
        self.signs.setdefault(path, []).append(input_.nonnegative)
        self.varying.setdefault(path, []).append(input_.varies)
        self.consumed |= input_.layers
        if input_.from_input:
            self.flow.first.add(path)
        return _Value(layers=frozenset({path}), varies=input_.varies, direct=path)


def _merge(
    inputs: list[_Value],
    *,
    nonnegative: bool | None = None,
    signed: bool = False,
    direct: bool = False,
) -> _Value:
    """The value of an operation on `inputs`; without `nonnegative` the sign is that of all inputs together."""
    if nonnegative is None:
        nonnegative = bool(inputs) and all(value.nonnegative for value in inputs) and not signed
    return _Value(
        layers=frozenset().union(*(value.layers for value in inputs)),
        from_input=any(value.from_input for value in inputs),
        varies=any(value.varies for value in inputs),
        nonnegative=nonnegative,
        direct=inputs[0].direct if direct and len(inputs) == 1 else None,
    )


def _maps_to_nonnegative(module: nn.Module) -> bool:
    """Whether an activation module never returns a negative number."""
    values = _on_the_real_line(module)
    return values is not None and bool((values >= 0).all())


def _is_activation(module: nn.Module) -> bool:
    """Whether a module changes every number by itself, always in the same way."""
    values, again = _on_the_real_line(module), _on_the_real_line(module, reverse=True)
    if (
        values is None
        or again is None
        or values.shape != again.shape
        or values.shape != _REAL_LINE.shape
    ):
        return False
    return torch.equal(values, again.flip(0)) and not torch.equal(values, _REAL_LINE)


_REAL_LINE = torch.linspace(-100.0, 100.0, 4001)


def _on_the_real_line(module: nn.Module, *, reverse: bool = False) -> Tensor | None:
    """What a module without parameters makes of the real line, or None.

    Trying it covers every subclass and every timm variant, where a list of classes would miss some. A module that has
    parameters, or does not take a plain vector, is none that could be judged so.
    """
    if any(True for _ in module.parameters()):
        return None
    probe = _REAL_LINE.flip(0) if reverse else _REAL_LINE.clone()
    try:
        with torch.no_grad():
            result = module(probe)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
        return None
    return result if isinstance(result, Tensor) else None


def _floor(node: fx.Node) -> float:
    lower = (
        node.args[1] if len(node.args) > 1 else node.kwargs.get("min", node.kwargs.get("min_val"))
    )
    return float(lower) if isinstance(lower, (int, float)) else -math.inf


_IDENTITY_MODULES = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.Dropout3d)
_KEEPING_MODULES = (
    *_IDENTITY_MODULES,
    nn.Flatten,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d,
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.ChannelShuffle, nn.PixelShuffle, nn.PixelUnshuffle, nn.ZeroPad2d,
)  # fmt: skip
_NONNEGATIVE_FUNCTIONS = {
    "relu", "relu_", "relu6", "sigmoid", "sigmoid_", "hardsigmoid", "softmax", "abs", "square", "exp", "softplus",
}  # fmt: skip
_IDENTITY_FUNCTIONS = {"contiguous", "dropout", "clone", "float"}
_ARITHMETIC = {"add", "iadd", "mul", "imul", "add_", "mul_"}
_KEEPING_FUNCTIONS = {
    *_IDENTITY_FUNCTIONS, *_ARITHMETIC,
    "flatten", "reshape", "view", "permute", "transpose", "unsqueeze", "squeeze", "expand", "repeat", "roll",
    "cat", "stack", "chunk", "split", "getitem", "unbind", "flip", "narrow",
    "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "max_pool1d", "avg_pool1d",
    "boolean_dispatch", "mean", "sum", "amax", "max", "pad", "pad_same", "upsample",
}  # fmt: skip

"""The facts of a network: what its layers and norms are, and how they are connected.

They come from two sources, each for what it knows best:

- The torch.fx graph of the eval-mode network (`tracing.py`, `flow.py`) shows how layers are
  connected.
- One real forward pass (`observation.py`) shows what happens: in which operators each weight
  multiplies an input, its MACs, whether it is used without calling its layer, and what else costs
  something. It is also the fallback where a network cannot be traced.

Nothing of the network is changed here. What becomes of its layers is decided in `anyprec.model`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from anyprec.network.facts import LayerFacts, NetworkFacts
from anyprec.network.flow import Flow, flow_from_graph, flow_from_observation
from anyprec.network.observation import Observation, WeightUse, observe
from anyprec.network.tracing import trace
from anyprec.nn.operators import LAYER_TYPES, MATRICES
from anyprec.runtime.modes import evaluating


def analyze(model: nn.Module, example_input: Tensor) -> NetworkFacts:
    """Find the facts of `model`. Its parameters, buffers and mode are left as they were.

    Args:
        model: Any float network.
        example_input: A batch of at least one sample, e.g. of shape `(1, 3, 224, 224)`, on the
            network's device.

    Raises:
        ConversionError: The network does not run on `example_input`.
    """
    with evaluating(model):
        observation = observe(model, example_input)
        graph, untraceable = trace(model)
    flow = flow_from_observation(observation) if graph is None else flow_from_graph(model, graph)
    norms = {}
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            norms[path] = flow.feeds.get(path)
    return NetworkFacts(
        layers={facts.path: facts for facts in _all_layer_facts(model, observation, flow)},
        norms=norms,
        uncounted=_uncounted(observation),
        example_shape=tuple(example_input.shape),
        untraceable=untraceable,
    )


def counted_anew(model: nn.Module, facts: NetworkFacts, example_input: Tensor) -> NetworkFacts:
    """`facts` with the calls and MACs of a forward pass on another input.

    All else is what the network was converted by, and stays.

    Args:
        model: The network that the facts are of, float or converted and in floating point.
        facts: What is known of it.
        example_input: As for `analyze`.

    Raises:
        ConversionError: The network does not run on `example_input`.
    """
    with evaluating(model):
        observation = observe(model, example_input)
    layers = dict(facts.layers)
    for counted in _all_layer_facts(model, observation, flow_from_observation(observation)):
        if counted.path in layers:
            layers[counted.path] = dataclasses.replace(
                layers[counted.path], calls=counted.calls, macs=counted.macs
            )
    return dataclasses.replace(
        facts,
        layers=layers,
        uncounted=_uncounted(observation),
        example_shape=tuple(example_input.shape),
    )


def _uncounted(observation: Observation) -> dict[str, tuple[int, int]]:
    """Calls and MACs for one sample of what belongs to no weight, by name."""
    uncounted = {}
    for name, (calls, macs) in sorted(observation.uncounted.items()):
        uncounted[name] = calls, macs // observation.samples
    return uncounted


def _all_layer_facts(
    model: nn.Module, observation: Observation, flow: Flow
) -> Iterator[LayerFacts]:
    """Facts of every Conv and Linear layer and of all other weights in use, in network order."""
    matrices_of: dict[str, list[str]] = {}
    for path in {**observation.uses, **observation.hidden}:
        if path in observation.parameters:
            holder = observation.parameters[path].rpartition(".")[0]
            matrices_of.setdefault(holder, []).append(path)
    for path, module in model.named_modules():
        if isinstance(module, LAYER_TYPES) or path in observation.uses:
            yield _layer_facts(path, module, observation, flow)
        for matrix in matrices_of.get(path, ()):
            yield _matrix_facts(matrix, model, observation)


def _layer_facts(path: str, layer: nn.Module, observation: Observation, flow: Flow) -> LayerFacts:
    use = observation.uses.get(path, WeightUse())
    weight: Tensor = layer.weight  # type: ignore[assignment]
    # In a mixture of experts a product of the weight multiplies the input. That product has no
    # weights of its own: those are counted where the product is made.
    is_product = f"{path}.{MATRICES}.weight" in observation.uses
    # Both sources must agree on a constant input. The graph may hide what a block does, and the
    # forward pass loses track of a value that leaves torch.
    constant = _is_constant(use) and (flow.constant is None or path in flow.constant)
    return LayerFacts(
        path=path,
        calls=use.calls,
        macs=use.macs // observation.samples,
        weights=0 if is_product else weight.numel(),
        owner=_owner(path, [module for module in use.modules if module != path]),
        per_tensor=not (isinstance(layer, LAYER_TYPES) and use.only_rows),
        dynamic=use.dynamic,
        derived=use.derived,
        feature=flow.features.get(path),
        depthwise=getattr(layer, "groups", 1) > 1 and layer.groups == layer.in_channels,
        nonnegative=path in flow.nonnegative,
        first=path in flow.first,
        last=path in flow.last,
        constant=constant,
        problem=_problem(path, weight, observation),
    )


def _matrix_facts(path: str, model: nn.Module, observation: Observation) -> LayerFacts:
    """Facts of a bare parameter."""
    use = observation.uses.get(path, WeightUse())
    name = observation.parameters[path]
    parameter = model.get_parameter(name)
    axis = None
    if len(use.axes) == 1:
        (axis,) = use.axes
    return LayerFacts(
        path=path,
        calls=use.calls,
        macs=use.macs // observation.samples,
        weights=parameter.numel(),
        owner=_owner(name, use.modules),
        parameter=name,
        axis=axis,
        per_tensor=axis is None,
        constant=_is_constant(use),
        problem=_problem(path, parameter, observation),
    )


def _is_constant(use: WeightUse) -> bool:
    return use.calls > 0 and not use.varies


def _owner(path: str, modules: list[str]) -> str | None:
    """The innermost module around a layer and all `modules`, which use its weight directly."""
    if not modules:
        return None
    around = path.split(".")[:-1]
    for module in modules:
        names = module.split(".")
        while around != names[: len(around)]:
            around.pop()
    return ".".join(around)


def _problem(path: str, weight: Tensor, observation: Observation) -> str | None:
    """Why a layer cannot be quantized."""
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "its weight is not initialised yet: run the network once before converting"
    if path in observation.hidden:
        return f"its weight is used inside {observation.hidden[path]}, which hides the operator"
    if path not in observation.uses:
        return "never used in an eval-mode forward pass"
    return None

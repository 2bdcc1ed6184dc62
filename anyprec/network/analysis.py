"""The facts of a network: what its layers and norms are, and how they are connected.

They come from one real forward pass of the eval-mode network (`observation.py`): in which operators
each weight multiplies an input, its MACs, whether it is used without calling its layer, what else
costs something; and where each value comes from (`flow.py`). Partial execution needs a graph as
well, so it is noted here whether there is one (`tracing.py`).

Nothing of the network is changed here. What becomes of its layers is decided in `anyprec.model`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from anyprec.errors import ConversionError
from anyprec.network.facts import HIDDEN, READ_BY, LayerFacts, NetworkFacts
from anyprec.network.observation import Observation, WeightUse, observe
from anyprec.network.tracing import trace
from anyprec.nn.channels import GroupedAxis
from anyprec.nn.operators import LAYER_TYPES, MATRICES, transposed_groups
from anyprec.runtime.modes import evaluating


def analyze(model: nn.Module, example_input: Tensor, *, outputs: bool = False) -> NetworkFacts:
    """Find the facts of `model`. It is left as it was, with all that its forward remembers.

    Args:
        model: Any float network.
        example_input: A batch of at least one sample, e.g. of shape `(1, 3, 224, 224)`, on the
            network's device.
        outputs: Find all values that can be quantized between layers, too.

    Raises:
        ConversionError: The network does not run on `example_input`, has parameters without a shape
            yet, or keeps what it computes where nothing can remove it.
    """
    _require_shapes(model)
    with evaluating(model):
        observation = observe(model, example_input, outputs=outputs)
        _, untraceable = trace(model)
    norms = {}
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            norms[path] = observation.flow.feeds.get(path)
    return NetworkFacts(
        layers={facts.path: facts for facts in _all_layer_facts(model, observation)},
        norms=norms,
        uncounted=_uncounted(observation),
        example_shape=tuple(example_input.shape),
        untraceable=untraceable,
        outputs=tuple(observation.outputs.facts.values()),
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
    for counted in _all_layer_facts(model, observation):
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


def _require_shapes(model: nn.Module) -> None:
    """Refuse lazy modules: their first input would determine them, and here it is an example."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            msg = f"{name!r} has no shape yet: run the network once on an input of the right shape "
            msg += "before converting it"
            raise ConversionError(msg)


def _all_layer_facts(model: nn.Module, observation: Observation) -> Iterator[LayerFacts]:
    """Facts of every Conv and Linear layer and of all other weights in use, in network order."""
    matrices_of: dict[str, list[str]] = {}
    for path in {**observation.uses, **observation.hidden, **observation.readings}:
        if path in observation.parameters and not _is_of_module(path, observation):
            holder = observation.parameters[path].rpartition(".")[0]
            matrices_of.setdefault(holder, []).append(path)
    for path, module in model.named_modules():
        if isinstance(module, LAYER_TYPES) or path in observation.uses:
            yield _layer_facts(path, module, observation)
        for matrix in matrices_of.get(path, ()):
            yield _matrix_facts(matrix, model, observation)


def _is_of_module(path: str, observation: Observation) -> bool:
    """Whether a bare parameter is the weight of a module that makes its operand from it."""
    holder, _, name = observation.parameters[path].rpartition(".")
    return name == "weight" and holder in observation.uses and path not in observation.uses


def _layer_facts(path: str, layer: nn.Module, observation: Observation) -> LayerFacts:
    use, flow = _use(path, observation), observation.flow
    weight: Tensor = layer.weight  # type: ignore[assignment]
    # In a mixture of experts a product of the weight multiplies the input. That product has no
    # weights of its own: those are counted where the product is made.
    is_product = f"{path}.{MATRICES}.weight" in observation.uses
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
        groups=transposed_groups(layer),
        depthwise=getattr(layer, "groups", 1) > 1 and layer.groups == layer.in_channels,
        nonnegative=path in flow.nonnegative,
        first=path in flow.first,
        last=path in flow.last,
        constant=_is_constant(use),
        problem=_problem(path, weight, observation),
        reads=observation.outputs.reads.get(path),
    )


def _matrix_facts(path: str, model: nn.Module, observation: Observation) -> LayerFacts:
    """Facts of a bare parameter."""
    use = _use(path, observation)
    name = observation.parameters[path]
    parameter = model.get_parameter(name)
    axis, groups = None, 1
    if len(use.axes) == 1:
        (channels,) = use.axes
        if isinstance(channels, GroupedAxis):
            axis, groups = 1, channels.groups
        else:
            axis = channels
    return LayerFacts(
        path=path,
        calls=use.calls,
        macs=use.macs // observation.samples,
        weights=parameter.numel(),
        owner=_owner(name, use.modules),
        parameter=name,
        axis=axis,
        groups=groups,
        per_tensor=axis is None,
        first=path in observation.flow.first,
        last=path in observation.flow.last,
        constant=_is_constant(use),
        problem=_problem(path, parameter, observation),
        reads=observation.outputs.reads.get(path),
    )


def _use(path: str, observation: Observation) -> WeightUse:
    """What multiplied a weight by an input; calls and MACs also of what else read it."""
    use = observation.uses.get(path, WeightUse())
    reading = observation.readings.get(path)
    if reading is None:
        return use
    calls, macs = use.calls + reading.calls, use.macs + reading.macs
    # What else read it may depend on the input, too.
    return dataclasses.replace(use, calls=calls, macs=macs, varies=True)


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
    if path in observation.hidden:
        return f"{READ_BY}{observation.hidden[path]}, {HIDDEN}"
    if path in observation.uses:
        if weight.is_floating_point():
            return None
        return f"its weight is {weight.dtype}, and only real numbers are quantized"
    reading = observation.readings.get(path)
    functions = list(reading.functions) if reading else []
    if reading and path in observation.parameters:
        functions = functions or list(reading.views)
    if not functions:
        return "never used in an eval-mode forward pass"
    return f"{READ_BY}{', '.join(functions)}"

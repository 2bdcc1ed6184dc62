"""The facts of a network: what its layers and norms are, and how they are connected.

They come from one real forward pass of the eval-mode network (`observation.py`): in which operators
each weight multiplies an input, its MACs, whether it is used without calling its layer, what else
costs something; and where each value comes from (`flow.py`). Partial execution needs a graph as
well, so it is noted here whether there is one (`tracing.py`).

Nothing of the network is changed here. What becomes of its layers is decided in `anyprec.model`.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from anyprec.errors import ConversionError
from anyprec.network.facts import LayerFacts, NetworkFacts
from anyprec.network.observation import Observation, WeightUse, observe
from anyprec.network.tracing import trace
from anyprec.nn.operators import LAYER_TYPES, MATRICES
from anyprec.runtime.modes import evaluating


def analyze(model: nn.Module, example_input: Tensor) -> NetworkFacts:
    """Find the facts of `model`. It is left as it was, with all that its forward remembers.

    Args:
        model: Any float network.
        example_input: A batch of at least one sample, e.g. of shape `(1, 3, 224, 224)`, on the
            network's device.

    Raises:
        ConversionError: The network does not run on `example_input`, has parameters without a shape
            yet, or keeps what it computes where nothing can remove it.
    """
    _require_shapes(model)
    with evaluating(model):
        observation = observe(model, example_input)
        _, untraceable = trace(model)
    norms = {}
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            norms[path] = observation.flow.feeds.get(path)
    uncounted = {}
    for name, (calls, macs) in sorted(observation.uncounted.items()):
        uncounted[name] = calls, macs // observation.samples
    return NetworkFacts(
        layers={facts.path: facts for facts in _all_layer_facts(model, observation)},
        norms=norms,
        uncounted=uncounted,
        example_shape=tuple(example_input.shape),
        untraceable=untraceable,
    )


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
    for path in {**observation.uses, **observation.hidden}:
        if path in observation.parameters:
            holder = observation.parameters[path].rpartition(".")[0]
            matrices_of.setdefault(holder, []).append(path)
    for path, module in model.named_modules():
        if isinstance(module, LAYER_TYPES) or path in observation.uses:
            yield _layer_facts(path, module, observation)
        for matrix in matrices_of.get(path, ()):
            yield _matrix_facts(matrix, model, observation)


def _layer_facts(path: str, layer: nn.Module, observation: Observation) -> LayerFacts:
    use, flow = observation.uses.get(path, WeightUse()), observation.flow
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
        depthwise=getattr(layer, "groups", 1) > 1 and layer.groups == layer.in_channels,
        nonnegative=path in flow.nonnegative,
        first=path in flow.first,
        last=path in flow.last,
        constant=_is_constant(use),
        problem=_problem(path, observation),
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
        first=path in observation.flow.first,
        last=path in observation.flow.last,
        constant=_is_constant(use),
        problem=_problem(path, observation),
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


def _problem(path: str, observation: Observation) -> str | None:
    """Why a layer cannot be quantized."""
    if path in observation.hidden:
        return f"its weight is used inside {observation.hidden[path]}, which hides the operator"
    if path not in observation.uses:
        return "never used in an eval-mode forward pass"
    return None

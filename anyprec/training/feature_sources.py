"""Where in a network the feature of each layer is taken.

Method of RFQuant (Tang et al., CVPR 2024), section 3.4. Its published code hooks the output tensor
of each layer's norm, which in-place activations and residual sums then change: it compares the
features after them. Here that point is found in the torch.fx graph, so that it is the same whether
a network works in place or not.

The graph says which tensor it is; a network runs its own forward, where a tensor can only be seen
as the output or the first input of a module. The last tensor that is one of these is taken.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import fx, nn
from torch.nn.modules.dropout import _DropoutNd

from anyprec.model.converted import ConvertedModel
from anyprec.model.switching import outputs_in_float
from anyprec.network.activations import function_is_identity, is_activation
from anyprec.network.tracing import trace
from anyprec.nn.layers import QuantizedLayer
from anyprec.nn.norms import NORM_TYPES
from anyprec.nn.owners import FunctionalOwner
from anyprec.runtime.modes import evaluating

FeaturePoint = Literal["after-activation", "norm"]
"""Behind the activations and the residual sum that follow a layer's norm, or right behind it."""


@dataclass(frozen=True)
class FeatureSource:
    """What to watch for the feature of one layer.

    Attributes:
        module: Path of the module to watch.
        side: Its output, its first input, or what it observes by itself: a norm's output before
            any activation in the same module, a layer's output.
        relative: No norm brought the feature to a common scale.
    """

    module: str
    side: Literal["output", "input", "observed"]
    relative: bool


def feature_sources(model: ConvertedModel, point: FeaturePoint) -> dict[str, FeatureSource]:
    """The source of the feature of every quantized layer, by path.

    A layer has, whichever comes first, the feature of the BatchNorm that it feeds, that of another
    norm right behind it, the output of the activation right behind it, or its own output. Only
    norms have features behind an activation; where torch.fx cannot trace the network, none has.
    """
    record = model.anyprec_record
    norms = {layer: norm for norm, layer in record.norms.items() if layer is not None}
    sources: dict[str, FeatureSource] = {}
    of_norms: dict[str, str] = {}
    for path in model.quantized_layers:
        module = norms.get(path) or record.facts.layers[path].feature or path
        is_norm = isinstance(model.get_submodule(module), NORM_TYPES)
        sources[path] = FeatureSource(module, "observed", relative=not is_norm)
        if is_norm:
            of_norms[module] = path
    if point == "after-activation":
        sources |= _sources_after_activations(model, of_norms)
    return sources


def _sources_after_activations(
    model: ConvertedModel, of_norms: dict[str, str]
) -> dict[str, FeatureSource]:
    """Sources behind activations and sums.

    Args:
        model: A converted model.
        of_norms: Path of a norm to that of its layer.
    """
    with evaluating(model), outputs_in_float(model):
        graph, _ = trace(model, opaque=(QuantizedLayer, FunctionalOwner))
    if graph is None:
        return {}
    once = _modules_called_once(graph)
    starts: dict[fx.Node, str] = {}
    for node in graph.nodes:
        target = str(node.target)
        # The calls of a norm that runs several times may go on differently.
        if node.op == "call_module" and target in of_norms and target in once:
            starts[node] = of_norms[target]
    sources: dict[str, FeatureSource] = {}
    for path, chain in _chains(model, graph, starts).items():
        source = _last_source(chain, once)
        if source is not None:
            sources[path] = source
    return sources


def _chains(
    model: nn.Module, graph: fx.Graph, starts: dict[fx.Node, str]
) -> dict[str, list[fx.Node]]:
    """For each layer the tensors that its norm's output becomes, one after the other."""
    modules = dict(model.named_modules())
    layer_of: dict[fx.Node, str] = {}
    chains: dict[str, list[fx.Node]] = {path: [] for path in starts.values()}
    for node in graph.nodes:
        layer = starts.get(node)
        if layer is None:
            layer = next(_continued(node, modules, layer_of), None)
        if layer is not None:
            layer_of[node] = layer
            chains[layer].append(node)
    return chains


def _continued(
    node: fx.Node, modules: dict[str, nn.Module], layer_of: dict[fx.Node, str]
) -> Iterator[str]:
    """The layers whose chains this node continues; a sum belongs to its first operand's."""
    operands: tuple[object, ...] = ()
    if _is_elementwise(node, modules):
        operands = node.args[:1]
    elif _is_sum(node):
        operands = node.args[:2]
    for operand in operands:
        # What others read too is a feature of its own: in place it could not be changed.
        if isinstance(operand, fx.Node) and operand in layer_of and len(operand.users) == 1:
            yield layer_of[operand]


def _last_source(chain: list[fx.Node], once: set[str]) -> FeatureSource | None:
    """The source of the last tensor of a chain that can be seen."""
    for node in reversed(chain):
        source = _source_of(node, once)
        if source is not None:
            return source
    return None


def _source_of(node: fx.Node, once: set[str]) -> FeatureSource | None:
    """How to see this tensor in the network's own forward, or None."""
    for path in node.meta.get("output_of", ()):
        if path in once:
            return FeatureSource(path, "output", relative=False)
    for path in node.meta.get("input_of", ()):
        if path in once:
            return FeatureSource(path, "input", relative=False)
    return None


def _modules_called_once(graph: fx.Graph) -> set[str]:
    """Modules, containers too, that one forward pass calls once."""
    inputs: Counter[str] = Counter()
    outputs: Counter[str] = Counter()
    for node in graph.nodes:
        inputs.update(node.meta.get("input_of", ()))
        outputs.update(node.meta.get("output_of", ()))
    return {path for path, count in (inputs | outputs).items() if count == 1}


def _is_elementwise(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node is an activation, or passes its input on."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        return isinstance(module, (nn.Identity, _DropoutNd)) or is_activation(module)
    return function_is_identity(node) or _function_name(node) in _ACTIVATIONS


def _is_sum(node: fx.Node) -> bool:
    """Whether a node adds two tensors: a bias or a number is no residual."""
    both = all(isinstance(operand, fx.Node) for operand in node.args[:2])
    return _function_name(node) in _SUMS and len(node.args) > 1 and both


def _function_name(node: fx.Node) -> str:
    """Name of a function or method, without the underscores of its in-place form."""
    if node.op not in {"call_function", "call_method"}:
        return ""
    return str(getattr(node.target, "__name__", node.target)).strip("_")


_SUMS = {"add", "iadd"}
_ACTIVATIONS = {
    "relu", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardswish",
    "hardsigmoid", "hardtanh", "sigmoid", "tanh", "softplus", "clamp",
}  # fmt: skip

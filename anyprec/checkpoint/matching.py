"""Does a checkpoint fit a network? All is checked here, by name, before anything is changed."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from anyprec.bits import BitConfig, shorten
from anyprec.checkpoint.document import Document
from anyprec.errors import BitsError, CheckpointError
from anyprec.model.converted import ConvertedModel
from anyprec.model.costing import weight_name
from anyprec.model.intact import output_quantizers
from anyprec.model.placement import owners_of
from anyprec.model.selection import layer_candidates
from anyprec.network.facts import LayerFacts, NetworkFacts
from anyprec.nn.operators import LAYER_TYPES, matrix_path, transposed_groups
from anyprec.nn.outputs import output_prefix
from anyprec.nn.quantizers import InputQuantizer


def require_float_fit(
    network: nn.Module,
    document: Document,
    state: Mapping[str, Tensor],
    omitted: Collection[str] = (),
) -> None:
    """Check a float network: it has the file's layers, and the file's tensors but for added ones.

    Added ones are those of conversion; `omitted` names tensors that the file holds in another form.

    Raises:
        CheckpointError: It has not; the message names tensors or layers.
    """
    added = added_prefixes(network, document.facts)
    floats = {name: tensor for name, tensor in state.items() if not name.startswith(added)}
    _require_same_tensors(_without(network.state_dict(), omitted), floats)
    _require_modules(network, document.facts)


def require_converted_fit(model: ConvertedModel, document: Document) -> None:
    """Check a converted network: it was converted as the file's was.

    Raises:
        CheckpointError: Settings or candidates differ.
    """
    settings, stored = model.anyprec_record.settings, document.convert_settings
    if settings != stored:
        msg = f"the network was converted with {settings}, the checkpoint with {stored}: pass the "
        msg += "float network, or convert with the same arguments"
        raise CheckpointError(msg)
    for path, candidates in model.candidates.items():
        facts = document.facts.layers.get(path)
        if facts is None:
            continue  # then its step sizes are missing too, and the message about tensors says more
        try:
            expected = layer_candidates(facts, stored)
        except BitsError as error:
            msg = f"the checkpoint does not fit the network: {error}"
            raise CheckpointError(msg) from error
        if candidates != expected:
            msg = f"layer {path!r} of the network has {candidates}, in the checkpoint {expected}: "
            msg += "pass the float network"
            raise CheckpointError(msg)


def require_state_fit(
    model: ConvertedModel, state: Mapping[str, Tensor], omitted: Collection[str] = ()
) -> None:
    """Check the state of a converted network against a file's, besides `omitted` tensors.

    Raises:
        CheckpointError: Tensors, ties or zero points do not fit.
    """
    _require_same_tensors(_without(model.state_dict(), omitted), state)
    _require_same_ties(model, state)
    for path, layer in model.quantized_layers.items():
        zeros = state[f"{path}.input_quantizer.zero_point"].tolist()
        _require_zero_points(f"layer {path!r}", zeros, layer.input_quantizer)
    for path, output in output_quantizers(model).items():
        _require_zero_points(f"output {path!r}", state[f"{path}.zero_point"].tolist(), output)


def _require_zero_points(subject: str, zeros: list[int], quantizer: InputQuantizer) -> None:
    rule = quantizer.rule
    for zero, bits in zip(zeros, quantizer.own_candidates, strict=True):
        if not rule.permits(zero, bits):
            msg = f"the checkpoint gives {subject} the zero point {zero} at {bits} bits, "
            msg += f"expected {rule.permitted(bits)}"
            raise CheckpointError(msg)


def fitting_configs(model: ConvertedModel, document: Document) -> dict[str, BitConfig]:
    """The file's named configurations, in the network's order of layers.

    Raises:
        CheckpointError: A configuration names an unknown layer or precision, or leaves a layer out.
    """
    fitting = {}
    for name, config in document.configs.items():
        try:
            resolved = model.resolve_bits(config)
        except BitsError as error:
            msg = f"the checkpoint's configuration {name!r:.80} does not fit the network: {error}"
            raise CheckpointError(msg) from error
        if resolved is not None:
            fitting[name] = resolved
    return fitting


def _require_same_tensors(expected: Mapping[str, Any], stored: Mapping[str, Tensor]) -> None:
    """Compare names, shapes and dtypes of a network's tensors with those of a file.

    Raises:
        CheckpointError: They differ; the message names the tensors.
    """
    missing = [name for name in expected if name not in stored]
    unknown = [name for name in stored if name not in expected]
    different = []
    for name in expected:
        wanted = _describe(expected[name])
        if name in stored and _describe(stored[name]) != wanted:
            different.append(f"{name} {_describe(stored[name])} instead of {wanted}")
    problems = _list_problems(
        {
            "{} tensors are missing: ": missing,
            "{} are unknown to the network: ": unknown,
            "{} are of another shape or type: ": different,
        }
    )
    if problems:
        msg = f"the checkpoint does not match the network; {problems}"
        raise CheckpointError(msg)


def added_prefixes(network: nn.Module, facts: NetworkFacts) -> tuple[str, ...]:
    """Prefixes of the names of all tensors that conversion adds, or would add."""
    # Facts name a shared module by its first path.
    canonical = {id(module): path for path, module in network.named_modules()}
    matrices = _matrices(facts)
    holders = {output.holder for output in facts.outputs}
    prefixes: list[str] = []
    # With duplicates, since a shared layer has its state at every path.
    for path, module in network.named_modules(remove_duplicate=False):
        canonical_path = canonical[id(module)]
        if canonical_path in facts.layers:
            prefixes += (f"{path}.weight_quantizer.", f"{path}.input_quantizer.")
        elif canonical_path in facts.norms:
            prefixes.append(f"{path}.bank.")
        if canonical_path in holders:
            prefixes.append(output_prefix(path))
        for matrix in matrices.get(canonical_path, ()):
            prefixes.append(f"{path}.{matrix}." if path else f"{matrix}.")
    return tuple(prefixes)


def holds_layer(network: nn.Module, facts: LayerFacts) -> bool:
    """Whether a network has the layer that these facts are about, or what it can be made of."""
    holder, _, name = weight_name(facts).rpartition(".")
    try:
        module = network.get_submodule(holder)
    except AttributeError:
        return False
    parameter = dict(module.named_parameters(recurse=False)).get(name)
    shape = () if parameter is None else tuple(parameter.shape)
    axes = len(shape)
    if facts.parameter is not None:
        fits = axes > 1 and _axis_fits(facts, shape)
        return fits and facts.path == matrix_path(facts.parameter)
    if facts.groups not in (1, transposed_groups(module)):
        return False
    # An empty path would be the network itself, whose weight cannot be replaced.
    can_quantize = isinstance(module, LAYER_TYPES) or (axes > 1 and facts.per_tensor)
    return bool(holder) and can_quantize


def _axis_fits(facts: LayerFacts, shape: tuple[int, ...]) -> bool:
    """Whether a bare parameter of this shape can have output channels where `facts` say."""
    if facts.groups > 1:
        return facts.axis == 1 and shape[0] % facts.groups == 0
    return facts.axis is None or 0 <= facts.axis < len(shape)


def _matrices(facts: NetworkFacts) -> dict[str, list[str]]:
    """For each module with bare parameters: the paths, from there, of the layers of these."""
    matrices: dict[str, list[str]] = {}
    for layer in facts.layers.values():
        if layer.parameter is not None:
            holder = layer.parameter.rpartition(".")[0]
            relative = layer.path.removeprefix(f"{holder}.") if holder else layer.path
            matrices.setdefault(holder, []).append(relative)
    return matrices


def _require_modules(network: nn.Module, facts: NetworkFacts) -> None:
    """Layers have their weight, norms are BatchNorms, owners are modules around their layer."""
    modules = dict(network.named_modules())
    layers, owned, norms = [], [], []
    for path, layer in facts.layers.items():
        if not holds_layer(network, layer):
            layers.append(path)
        if not _has_owner(layer, modules):
            owned.append(path)
    for path in facts.norms:
        # The empty path is the network itself, which cannot be replaced.
        is_batch_norm = isinstance(modules.get(path), _BatchNorm)
        if not path or not is_batch_norm:
            norms.append(path)
    places = [*(output.holder for output in facts.outputs), *owners_of(facts)]
    problems = _list_problems(
        {
            "no layers ": layers,
            "no BatchNorms ": norms,
            "no owners of the layers ": owned,
            "no modules with outputs ": [path for path in places if path not in modules],
        }
    )
    if problems:
        network_class = type(network).__name__
        msg = f"the checkpoint does not match the network {network_class}, which has {problems}"
        raise CheckpointError(msg)


def _list_problems(names: Mapping[str, list[str]]) -> str:
    """Each problem that some name has, with their number in place of `{}` and the first of them."""
    problems = [
        problem.format(len(affected)) + shorten(affected, 4)
        for problem, affected in names.items()
        if affected
    ]
    return "; ".join(problems)


def _has_owner(layer: LayerFacts, modules: Mapping[str, nn.Module]) -> bool:
    owner = layer.owner
    return not owner or (layer.path.startswith(f"{owner}.") and owner in modules)


def _require_same_ties(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Parameters are shared where the file stores them once, and nowhere else.

    Values depend on it, and so does training.
    """
    in_network: dict[int, str] = {}
    in_file: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in state or not parameter.numel():
            continue
        # The first name of each tensor stands for it, so names that are tied have one in common.
        network_twin = in_network.setdefault(id(parameter), name)
        file_twin = in_file.setdefault(id(state[name]), name)
        if network_twin != file_twin:
            network_says, file_says = f"as one with {network_twin!r}", "apart"
            if network_twin == name:
                network_says, file_says = "apart", f"as one with {file_twin!r}"
            msg = f"the network holds {name!r} {network_says}, the checkpoint {file_says}: tie the "
            msg += "same parameters before loading"
            raise CheckpointError(msg)


def _without(state: Mapping[str, Any], omitted: Collection[str]) -> dict[str, Any]:
    return {name: tensor for name, tensor in state.items() if name not in omitted}


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype}"
    return type(value).__name__

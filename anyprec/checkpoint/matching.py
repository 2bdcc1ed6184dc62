"""Does a checkpoint fit a network? Everything is checked here, by name, before anything is changed or copied."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from anyprec.bits import BitConfig, shorten
from anyprec.checkpoint.document import Document
from anyprec.errors import BitsError, CheckpointError
from anyprec.model.converted import ConvertedModel
from anyprec.model.selection import layer_candidates
from anyprec.network.facts import LayerFacts, NetworkFacts
from anyprec.nn.operators import LAYER_TYPES, matrix_path


def require_float_fit(
    network: nn.Module,
    document: Document,
    state: Mapping[str, Tensor],
    omitted: Collection[str] = (),
) -> None:
    """Check a float network: its tensors are those of the file that conversion did not add, its layers those named.

    `omitted` names tensors of the network that the file holds in another form.

    Raises:
        CheckpointError: They are not; the message names tensors or layers.
    """
    ours = our_prefixes(network, document.facts)
    floats = {name: tensor for name, tensor in state.items() if not name.startswith(ours)}
    require_same_tensors(_without(network.state_dict(), omitted), floats)
    _require_modules(network, document.facts)


def require_converted_fit(model: ConvertedModel, document: Document) -> None:
    """Check a converted network: it was converted as the file's was.

    Raises:
        CheckpointError: Settings or candidates differ.
    """
    own, found = model.anyprec_record.settings, document.settings
    if own != found:
        msg = f"the network was converted with {own}, the checkpoint with {found}: pass the float network, or convert "
        msg += "with the same arguments"
        raise CheckpointError(msg)
    for path, candidates in model.candidates.items():
        facts = document.facts.layers.get(path)
        if facts is None:
            continue  # then its step sizes are missing too, and the message about tensors says more
        try:
            expected = layer_candidates(facts, found)
        except BitsError as error:
            msg = f"the checkpoint does not fit the network: {error}"
            raise CheckpointError(msg) from error
        if candidates != expected:
            msg = f"layer {path!r} of the network has {candidates}, in the checkpoint {expected}: pass the float network"
            raise CheckpointError(msg)


def require_state_fit(
    model: ConvertedModel, state: Mapping[str, Tensor], omitted: Collection[str] = ()
) -> None:
    """Check the whole state of a converted network against a file's, besides what it holds in another form.

    Raises:
        CheckpointError: Tensors, ties or zero points do not fit.
    """
    require_same_tensors(_without(model.state_dict(), omitted), state)
    _require_same_ties(model, state)
    for path, layer in model.quantized_layers.items():
        zeros = state[f"{path}.input_quantizer.zero_point"].tolist()
        for zero, bits in zip(zeros, layer.candidates.activation, strict=True):
            if not 0 <= zero < 2**bits:
                msg = f"the checkpoint gives layer {path!r} the zero point {zero} at {bits} bits, expected 0 to {2**bits - 1}"
                raise CheckpointError(msg)


def fitting_configs(model: ConvertedModel, document: Document) -> dict[str, BitConfig]:
    """The file's named configurations, in the network's order of layers.

    Raises:
        CheckpointError: One names an unknown layer or precision, or leaves a layer out.
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


def require_same_tensors(own: Mapping[str, Any], found: Mapping[str, Tensor]) -> None:
    """Compare names, shapes and kinds of number.

    Raises:
        CheckpointError: They differ; the message names the tensors.
    """
    missing = [name for name in own if name not in found]
    strange = [name for name in found if name not in own]
    other = [
        f"{name} {_kind(found[name])} instead of {_kind(own[name])}"
        for name in own
        if name in found and _kind(own[name]) != _kind(found[name])
    ]
    parts = [f"{len(missing)} tensors are missing: {shorten(missing, 4)}"] if missing else []
    parts += (
        [f"{len(strange)} are unknown to the network: {shorten(strange, 4)}"] if strange else []
    )
    parts += [f"{len(other)} are of another shape or type: {shorten(other, 4)}"] if other else []
    if parts:
        msg = f"the checkpoint does not match the network; {'; '.join(parts)}"
        raise CheckpointError(msg)


def our_prefixes(network: nn.Module, facts: NetworkFacts) -> tuple[str, ...]:
    """What the names of all tensors start with that conversion adds, or would add, to the float network's."""
    canonical = {id(module): path for path, module in network.named_modules()}
    matrices: dict[str, list[str]] = {}
    for facts_of_one in facts.layers.values():
        if facts_of_one.parameter is not None:
            holder = facts_of_one.parameter.rpartition(".")[0]
            relative = facts_of_one.path.removeprefix(f"{holder}.") if holder else facts_of_one.path
            matrices.setdefault(holder, []).append(relative)
    prefixes: list[str] = []
    for path, module in network.named_modules(
        remove_duplicate=False
    ):  # a shared layer has its state at every path
        if canonical[id(module)] in facts.layers:
            prefixes += (f"{path}.weight_quantizer.", f"{path}.input_quantizer.")
        elif canonical[id(module)] in facts.norms:
            prefixes.append(f"{path}.bank.")
        prefixes += (
            f"{path}.{matrix}." if path else f"{matrix}."
            for matrix in matrices.get(canonical[id(module)], ())
        )
    return tuple(prefixes)


def _require_modules(network: nn.Module, facts: NetworkFacts) -> None:
    """Every layer has its weight, every norm is a BatchNorm, every owner a module around its layer."""
    modules = dict(network.named_modules())
    layers = [path for path, layer in facts.layers.items() if not holds_layer(network, layer)]
    norms = [
        path for path in facts.norms if not (path and isinstance(modules.get(path), _BatchNorm))
    ]
    owned = [layer for layer in facts.layers.values() if layer.owner is not None]
    owners = [layer.path for layer in owned if not _is_around(layer.path, layer.owner, modules)]
    parts = [f"no layers {shorten(layers, 4)}"] if layers else []
    parts += [f"no BatchNorms {shorten(norms, 4)}"] if norms else []
    parts += [f"no owners of the layers {shorten(owners, 4)}"] if owners else []
    if parts:
        msg = f"the checkpoint does not match the network {type(network).__name__}, which has {'; '.join(parts)}"
        raise CheckpointError(msg)


def holds_layer(network: nn.Module, facts: LayerFacts) -> bool:
    """Whether a network has the layer that these facts are about, or what it can be made of."""
    holder, _, name = (facts.parameter or f"{facts.path}.weight").rpartition(".")
    try:
        module = network.get_submodule(holder)
    except AttributeError:
        return False
    if facts.parameter is None and isinstance(module, LAYER_TYPES):
        return bool(holder)
    parameter = dict(module.named_parameters(recurse=False)).get(name)
    axes = 0 if parameter is None else parameter.ndim
    if facts.parameter is None:
        return bool(holder) and axes > 1 and facts.per_tensor
    return (
        axes > 1
        and facts.path == matrix_path(facts.parameter)
        and (facts.axis is None or 0 <= facts.axis < axes)
    )


def _is_around(path: str, owner: str | None, modules: Mapping[str, nn.Module]) -> bool:
    return not owner or (path.startswith(f"{owner}.") and owner in modules)


def _require_same_ties(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Parameters are shared where the file stores them once, and nowhere else: values and training depend on it."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    groups: dict[int, str] = {}
    stored: dict[int, str] = {}
    for name, parameter in parameters.items():
        if name not in state or not parameter.numel():
            continue
        first, other = (
            groups.setdefault(id(parameter), name),
            stored.setdefault(id(state[name]), name),
        )
        if first != other:
            here, there = (
                ("apart", f"as one with {other!r}")
                if first == name
                else (f"as one with {first!r}", "apart")
            )
            msg = f"the network holds {name!r} {here}, the checkpoint {there}: tie the same parameters before loading"
            raise CheckpointError(msg)


def _without(state: Mapping[str, Any], omitted: Collection[str]) -> dict[str, Any]:
    return {name: tensor for name, tensor in state.items() if name not in omitted}


def _kind(tensor: Any) -> str:
    return (
        f"{tuple(tensor.shape)} {tensor.dtype}"
        if isinstance(tensor, Tensor)
        else type(tensor).__name__
    )

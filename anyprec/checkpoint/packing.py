"""Packing a network: which layers can be, their cells, and codes in the place of latent weights.

Layers whose codes are no function of stored numbers keep their latent weight, and the file says
why. The tensors that stand for a packed layer in a file are in `packed_tensors.py`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from anyprec.checkpoint.cells import cells_of, exceptions_of, points_of
from anyprec.checkpoint.document import TensorRecord
from anyprec.checkpoint.packed_tensors import LayerCells
from anyprec.errors import CheckpointError
from anyprec.model.converted import ConvertedModel
from anyprec.model.costing import weight_name
from anyprec.network.facts import LayerFacts
from anyprec.nn.channels import from_rows
from anyprec.nn.layers import QuantizedLayer, pack_layer
from anyprec.nn.operators import LAYER_TYPES
from anyprec.nn.packed import PackedOperand
from anyprec.nn.quantizers import WeightQuantizer
from anyprec.nn.weights import PackedCodes
from anyprec.runtime.modes import evaluating


def names_of_weights(
    network: nn.Module, facts: Mapping[str, LayerFacts], paths: Collection[str]
) -> set[str]:
    """Every name in the network's state of the latent weights of these layers."""
    parameters = dict(network.named_parameters(remove_duplicate=False))
    # By id, since a tied weight stands at the names of other modules, too.
    weights = {id(parameters.get(weight_name(facts[path]))) for path in paths}
    return {name for name, parameter in parameters.items() if id(parameter) in weights}


def split_layers(model: ConvertedModel) -> tuple[list[str], dict[str, str]]:
    """The layers that can be packed, and those that keep their latent weight with the reason."""
    facts, layers = model.anyprec_record.facts.layers, model.quantized_layers
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = _names_of_parameters(model)
    latent: dict[str, str] = {}
    for path, layer in layers.items():
        reason = _obstacle(layer, facts[path], parameters)
        if reason is not None:
            latent[path] = reason
    while True:
        packed = {weight_name(facts[path]): path for path in layers if path not in latent}
        shared = _shared_weights(packed, names, parameters)
        if not shared:
            break
        # A layer that keeps its weight makes those keep theirs that share it, so look again.
        latent.update(shared)
    # An expert layer's weight is packed after all, as the matrices that it mixes.
    reasons = {
        path: reason for path, reason in latent.items() if weight_name(facts[path]) not in packed
    }
    return list(packed.values()), reasons


def _shared_weights(
    packed: Mapping[str, str], names: Mapping[int, set[str]], parameters: Mapping[str, object]
) -> dict[str, str]:
    """The layers to be packed whose weight also stands where it is not packed, with the reason."""
    shared: dict[str, str] = {}
    for name, path in packed.items():
        unpacked = names[id(parameters[name])] - packed.keys()
        if unpacked:
            shared[path] = f"its weight is also {min(unpacked)!r}, which is not packed"
    return shared


def cells_of_layer(layer: QuantizedLayer, facts: LayerFacts) -> LayerCells:
    """The cells of a layer's weight operand, with every code compared.

    Raises:
        CheckpointError: The layer does not make its operand alone.
    """
    quantizer, source = layer.weight_quantizer, layer.weight_source
    with torch.no_grad():
        operand = layer.weight if isinstance(source, PackedCodes) else _operand(layer, facts)
        codes = []
        for index in range(len(quantizer.candidates)):
            operand_codes = layer.weight_codes(index, operand)
            codes.append(quantizer.per_channel(operand_codes).cpu())
        cells = cells_of(codes, quantizer.candidates)
        steps = quantizer.step.detach().cpu()
        exceptions = exceptions_of(cells, codes, steps, quantizer.candidates)
        moments = source.moments(operand)
    if moments is not None:
        moments = (moments[0].float().cpu(), moments[1].float().cpu())
    return LayerCells(cells, exceptions, moments)


def install(
    layer: QuantizedLayer,
    stored: LayerCells,
    record: TensorRecord,
    *,
    device: torch.device,
    derives: bool,
) -> None:
    """Make a layer a packed one, in place.

    Args:
        layer: A quantized layer that has the step sizes which the cells belong to.
        stored: Its cells.
        record: Dtype and shape of its latent weight.
        device: Where the codes go.
        derives: The layer makes its operand from the weight in every forward pass.
    """
    quantizer, axis = layer.weight_quantizer, layer.weight_source.corrected_axis
    steps = quantizer.step.detach().cpu()
    points = points_of(stored.cells, steps, quantizer.candidates, stored.exceptions)
    # Cells stand channel by channel, the operand in the weight's own order: where each cell goes.
    positions = torch.arange(math.prod(record.shape)).reshape(record.shape)
    order = quantizer.per_channel(positions).flatten()
    operand = PackedOperand(
        _as_operand(points.points, record.shape, quantizer),
        points.ratios,
        axis=quantizer.axis,
        listed=order[points.listed.places],
        listed_codes=points.listed.codes,
        moments=None if stored.moments is None or axis is None else (*stored.moments, axis),
    )
    pack_layer(layer, operand.to(device), dtype=record.dtype, derives=derives)


def pack(model: ConvertedModel) -> None:
    """Drop the latent weights of a converted model, in place, where its layers can be packed."""
    facts, layers = model.anyprec_record.facts.layers, model.quantized_layers
    # All cells first: layers may share a weight, which the first one would drop.
    cells = {path: cells_of_layer(layers[path], facts[path]) for path in split_layers(model)[0]}
    for path, stored in cells.items():
        weight = layers[path].weight
        record = TensorRecord(weight.dtype, tuple(weight.shape))
        install(layers[path], stored, record, device=weight.device, derives=facts[path].derived)


def _names_of_parameters(model: nn.Module) -> dict[int, set[str]]:
    """Where each parameter stands, by its id; a module that stands at two paths counts once."""
    names: dict[int, set[str]] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, parameter in module.named_parameters(recurse=False):
            names.setdefault(id(parameter), set()).add(f"{prefix}{name}")
    return names


def _as_operand(rows: Tensor, shape: tuple[int, ...], quantizer: WeightQuantizer) -> Tensor:
    """The inverse of `WeightQuantizer.per_channel`."""
    axis = quantizer.axis
    if axis is None:
        return rows.reshape(shape)
    return from_rows(rows, shape, axis)


def _obstacle(
    layer: QuantizedLayer, facts: LayerFacts, parameters: Mapping[str, object]
) -> str | None:
    """Why a layer cannot be packed, or None."""
    if isinstance(layer.weight_source, PackedCodes):
        return None
    if facts.dynamic or layer.weight_source.dynamic:
        return "its operand depends on the network's input"
    if weight_name(facts) not in parameters:
        return "its weight is no parameter, but computed"
    try:
        return _flaw(layer, _operand(layer, facts))
    except CheckpointError as error:
        return str(error)


def _flaw(layer: QuantizedLayer, operand: Tensor) -> str | None:
    """Why this float operand has no codes, or None."""
    if operand.shape != layer.weight.shape:
        return "its operand has another shape than its weight"
    steps = layer.weight_quantizer.step
    if not operand.numel() or not torch.isfinite(operand).all() or not torch.isfinite(steps).all():
        return "its weights or step sizes are none, or not finite"
    return None


class _OperandSeenError(Exception):
    """Ends a forward pass at the operand that it was run for."""

    def __init__(self, operand: Tensor) -> None:
        super().__init__()
        self.operand = operand


@torch.no_grad()
def _operand(layer: QuantizedLayer, facts: LayerFacts) -> Tensor:
    """The float weight operand.

    Raises:
        CheckpointError: The layer makes it from the weight, but not alone.
    """
    if not facts.derived:
        return layer.weight.detach()
    if not isinstance(layer, LAYER_TYPES):
        msg = "it makes its operand from its weight, and no input of a "
        msg += f"{type(layer).__name__} is known"
        raise CheckpointError(msg)

    def end(_input: Tensor, weight: Tensor) -> None:
        raise _OperandSeenError(weight)

    # Only the layer's own forward pass knows how it makes the operand: run it up to there.
    try:
        with evaluating(layer), layer.operand_observers.including(end):
            layer(_smallest_input(layer))
    except _OperandSeenError as seen:
        return seen.operand.detach()
    except (RuntimeError, ValueError, TypeError) as error:
        msg = f"its operand could not be made without its network ({type(error).__name__})"
        raise CheckpointError(msg) from error
    msg = "its operand multiplies no input when the layer is called alone"
    raise CheckpointError(msg)


def _smallest_input(layer: nn.Module) -> Tensor:
    """Zeros of the smallest shape that a Conv or Linear layer takes."""
    weight: Any = layer.weight
    if isinstance(layer, nn.Linear):
        shape: list[Any] = [1, layer.in_features]
    else:
        sizes: Any = zip(layer.kernel_size, layer.dilation, strict=True)  # type: ignore[arg-type]
        shape = [1, layer.in_channels, *(dilation * (size - 1) + 1 for size, dilation in sizes)]
    return torch.zeros(shape, dtype=weight.dtype, device=weight.device)

"""The packed form: between the quantized layers of a network and the tensors that stand for them in a file.

A packed layer at PATH has the tensors `anyprec.packed.PATH.PART`: `cells`, `low` (see `coding.py`), `places` and `codes` of
exceptions (see `cells.py`), `mean` and `spread` of the latent weight's channels if the layer corrects them. Layers whose
codes are no function of stored numbers keep their latent weight, and the file says why.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from anyprec.checkpoint.cells import Exceptions, cell_count, cells_of, exceptions_of, points_of
from anyprec.checkpoint.coding import (
    bits_needed,
    compress,
    decompress,
    fixed_size,
    from_fixed,
    to_fixed,
)
from anyprec.checkpoint.document import Coding, TensorRecord
from anyprec.errors import CheckpointError
from anyprec.model.converted import ConvertedModel
from anyprec.network.facts import LayerFacts
from anyprec.nn.layers import QuantizedLayer, pack_layer
from anyprec.nn.operators import LAYER_TYPES
from anyprec.nn.packed import PackedOperand
from anyprec.nn.quantizers import WeightQuantizer
from anyprec.nn.weights import PackedCodes
from anyprec.runtime.modes import evaluating

PREFIX = "anyprec.packed."


@dataclass(frozen=True)
class LayerCells:
    """A layer's weight operand in the form that a file holds.

    Attributes:
        cells: The cell of every weight, int16, a row for each step size; on the CPU.
        exceptions: Weights whose codes the cells do not tell.
        moments: Mean and spread of each channel of the latent weight, float32, if the layer corrects them.
    """

    cells: Tensor
    exceptions: Exceptions
    moments: tuple[Tensor, Tensor] | None


def weight_name(facts: LayerFacts) -> str:
    """Name of the parameter that is the layer's latent weight."""
    return facts.parameter or f"{facts.path}.weight"


def names_of_weights(
    network: nn.Module, facts: Mapping[str, LayerFacts], paths: Mapping[str, object]
) -> set[str]:
    """Every name in the network's state under which the latent weight of one of these layers stands."""
    parameters = dict(network.named_parameters(remove_duplicate=False))
    wanted = {
        id(parameters[name])
        for name in (weight_name(facts[path]) for path in paths)
        if name in parameters
    }
    return {name for name, parameter in parameters.items() if id(parameter) in wanted}


def split_layers(model: ConvertedModel) -> tuple[list[str], dict[str, str]]:
    """The layers that can be packed, and those that keep their latent weight with the reason."""
    facts, layers = model.anyprec_record.facts.layers, model.quantized_layers
    kept = {
        path: reason
        for path, layer in layers.items()
        if (reason := _obstacle(model, facts[path], layer))
    }
    holders: dict[int, set[str]] = {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            holders.setdefault(id(parameter), set()).add(f"{path}.{name}" if path else name)
    while True:
        packed = {weight_name(facts[path]): path for path in layers if path not in kept}
        shared = {
            path: sorted(others)[0]
            for name, path in packed.items()
            if (others := holders[id(parameters[name])] - packed.keys())
        }
        if not shared:
            # An expert layer's weight is packed as the matrices that it mixes.
            return list(packed.values()), {
                path: kept[path] for path in kept if weight_name(facts[path]) not in packed
            }
        kept.update(
            {
                path: f"its weight is also {other!r}, which is not packed"
                for path, other in shared.items()
            }
        )


def cells_of_layer(layer: QuantizedLayer, facts: LayerFacts) -> LayerCells:
    """The cells of a layer's weight operand, with every code compared.

    Raises:
        CheckpointError: The layer does not make its operand alone.
    """
    quantizer, source = layer.weight_quantizer, layer.weight_source
    with torch.no_grad():
        operand = layer.weight if isinstance(source, PackedCodes) else _operand(layer, facts)
        found = source.moments(operand)
        candidates = quantizer.candidates
        codes = [
            quantizer.per_channel(layer.weight_codes(index, operand)).cpu()
            for index in range(len(candidates))
        ]
        cells = cells_of(codes, candidates)
        exceptions = exceptions_of(cells, codes, quantizer.step.detach().cpu(), candidates)
    kept = None if found is None else (found[0].float().cpu(), found[1].float().cpu())
    return LayerCells(cells, exceptions, kept)


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
        record: Type and shape of its latent weight.
        device: Where the codes go.
        derives: The layer makes its operand from the weight in every forward pass.
    """
    quantizer = layer.weight_quantizer
    found = points_of(
        stored.cells, quantizer.step.detach().cpu(), quantizer.candidates, stored.exceptions
    )
    order = quantizer.per_channel(
        torch.arange(math.prod(record.shape)).reshape(record.shape)
    ).flatten()
    axis = layer.weight_source.corrected_axis
    operand = PackedOperand(
        _as_operand(found.points, record.shape, quantizer),
        found.ratios,
        axis=quantizer.axis,
        listed=order[found.listed.places],
        listed_codes=found.listed.codes,
        moments=None if stored.moments is None or axis is None else (*stored.moments, axis),
    )
    pack_layer(layer, operand.to(device), dtype=record.dtype, derives=derives)


def pack(model: ConvertedModel) -> None:
    """Drop the latent weights of a converted model, in place, as far as its layers can be packed."""
    facts, layers = model.anyprec_record.facts.layers, model.quantized_layers
    found = {path: cells_of_layer(layers[path], facts[path]) for path in split_layers(model)[0]}
    for path, stored in found.items():
        weight = layers[path].weight
        record = TensorRecord(weight.dtype, tuple(weight.shape))
        install(layers[path], stored, record, device=weight.device, derives=facts[path].derived)


def to_tensors(
    stored: LayerCells, candidates: tuple[int, ...], coding: Coding
) -> dict[str, Tensor]:
    """The parts of a packed layer, by their names."""
    width = bits_needed(cell_count(candidates))
    parts: dict[str, Tensor] = {}
    if coding == "fixed":
        parts["cells"] = to_fixed(stored.cells, width)
    else:
        low = max(0, width - 8)
        high = (stored.cells >> low).to(torch.uint8).flatten()
        frame = compress(high.numpy().tobytes())
        parts["cells"] = high if frame is None else frame
        if low:
            parts["low"] = to_fixed(stored.cells & (2**low - 1), low)
    if stored.exceptions.places.numel():
        parts.update(places=stored.exceptions.places, codes=stored.exceptions.codes)
    if stored.moments is not None:
        parts.update(mean=stored.moments[0], spread=stored.moments[1])
    return parts


def from_tensors(
    parts: Mapping[str, Tensor],
    layer: QuantizedLayer,
    steps: Tensor,
    record: TensorRecord,
    coding: Coding,
    path: str,
) -> LayerCells:
    """The cells of a layer, from parts that nothing is known of.

    Args:
        parts: The layer's parts, by name.
        layer: The layer, which may be without values.
        steps: Its step sizes.
        record: Type and shape of its latent weight, which are those of the network.
        coding: How the cells are stored.
        path: The layer's path, for messages.

    Raises:
        CheckpointError: A part is missing, of another size or type, or holds a number out of range.
    """
    quantizer = layer.weight_quantizer
    candidates, count = quantizer.candidates, math.prod(record.shape)
    axis = layer.weight_source.corrected_axis
    moved = ("mean", "spread") if axis is not None else ()
    exceptional = ("places", "codes") if "places" in parts else ()
    low = ("low",) if coding == "zstd" and cell_count(candidates) > 256 else ()
    _require(
        parts.keys() == {"cells", *low, *moved, *exceptional},
        path,
        f"its parts are {sorted(parts)}",
    )
    _require(bool(torch.isfinite(steps).all()), path, "a step size is not finite")
    cells = _read_cells(parts, candidates, count, coding, path).reshape(steps.shape[1], -1)
    exceptions = Exceptions(
        torch.empty(0, dtype=torch.int64), torch.empty((len(candidates), 0), dtype=torch.int8)
    )
    if exceptional:
        exceptions = _read_exceptions(parts, quantizer, count, path)
    if axis is None:
        return LayerCells(cells, exceptions, None)
    for name in moved:
        right = parts[name].dtype == torch.float32 and tuple(parts[name].shape) == (
            record.shape[axis],
        )
        _require(
            right and bool(torch.isfinite(parts[name]).all()),
            path,
            f"{name} holds no numbers of its channels",
        )
    return LayerCells(cells, exceptions, (parts["mean"], parts["spread"]))


def _read_cells(
    parts: Mapping[str, Tensor], candidates: tuple[int, ...], count: int, coding: Coding, path: str
) -> Tensor:
    width = bits_needed(cell_count(candidates))
    stored = parts["cells"]
    _require(stored.dtype == torch.uint8 and stored.ndim == 1, path, "its cells are no bytes")
    if coding == "fixed":
        _require(
            stored.numel() == fixed_size(count, width),
            path,
            f"it has {stored.numel()} bytes for {count} weights",
        )
        cells = from_fixed(stored, count, width)
    else:
        if stored.numel() != count:
            raw = decompress(stored, count, f"the checkpoint's layer {path!r:.80}")
            stored = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        cells = stored.to(torch.int16)
        if width > 8:
            bits = parts["low"]
            right = bits.dtype == torch.uint8 and bits.shape == (fixed_size(count, width - 8),)
            _require(right, path, f"it has {bits.numel()} bytes of low bits for {count} weights")
            cells = (cells << (width - 8)) | from_fixed(bits, count, width - 8)
    _require(int(cells.max()) < cell_count(candidates), path, "a cell is out of range")
    return cells


def _read_exceptions(
    parts: Mapping[str, Tensor], quantizer: WeightQuantizer, count: int, path: str
) -> Exceptions:
    places, codes = parts["places"], parts["codes"]
    right = places.dtype == torch.int64 and places.ndim == 1 and codes.dtype == torch.int8
    right = (
        right
        and codes.shape == (len(quantizer.candidates), len(places))
        and bool((places.diff() > 0).all())
    )
    right = right and len(places) > 0 and int(places[0]) >= 0 and int(places[-1]) < count
    for index in range(len(quantizer.candidates) if right else 0):
        qmin, qmax = quantizer.limits(index)
        right = right and qmin <= int(codes[index].min()) and int(codes[index].max()) <= qmax
    _require(right, path, "its exceptions are out of range")
    return Exceptions(places, codes)


def _require(fits: bool, path: str, problem: str) -> None:  # noqa: FBT001 (a condition, as in assert)
    if not fits:
        msg = f"the checkpoint's layer {path!r:.80} cannot be unpacked: {problem}"
        raise CheckpointError(msg)


def _as_operand(rows: Tensor, shape: tuple[int, ...], quantizer: WeightQuantizer) -> Tensor:
    """The inverse of `WeightQuantizer.per_channel`."""
    axis = quantizer.axis
    if axis is None:
        return rows.reshape(shape)
    moved = (shape[axis], *shape[:axis], *shape[axis + 1 :])
    return rows.reshape(moved).movedim(0, axis).contiguous()


def _obstacle(model: ConvertedModel, facts: LayerFacts, layer: QuantizedLayer) -> str | None:
    """Why a layer cannot be packed, or None."""
    if isinstance(layer.weight_source, PackedCodes):
        return None
    if facts.dynamic or layer.weight_source.dynamic:
        return "its operand depends on the network's input"
    if weight_name(facts) not in dict(model.named_parameters(remove_duplicate=False)):
        return "its weight is no parameter, but computed"
    try:
        return _flaw(_operand(layer, facts), layer)
    except CheckpointError as error:
        return str(error)


def _flaw(operand: Tensor, layer: QuantizedLayer) -> str | None:
    """Why these float operand and step sizes have no codes, or None."""
    if operand.shape != layer.weight.shape:
        return "its operand has another shape than its weight"
    if (
        not operand.numel()
        or not torch.isfinite(operand).all()
        or not torch.isfinite(layer.weight_quantizer.step).all()
    ):
        return "its weights or step sizes are none, or not finite"
    return None


class _SeenError(Exception):
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
        msg = f"it makes its operand from its weight, and no input of a {type(layer).__name__} is known"
        raise CheckpointError(msg)

    def end(_input: Tensor, weight: Tensor) -> None:
        raise _SeenError(weight)

    try:
        with evaluating(layer), layer.operand_observers.including(end):
            layer(_smallest_input(layer))
    except _SeenError as seen:
        return seen.operand.detach()
    except (RuntimeError, ValueError, TypeError) as error:
        msg = f"its operand could not be made without its network ({type(error).__name__})"
        raise CheckpointError(msg) from error
    msg = "its operand meets no input when the layer is called alone"
    raise CheckpointError(msg)


def _smallest_input(layer: nn.Module) -> Tensor:
    """Zeros of the smallest shape that a Conv or Linear layer takes."""
    weight: Any = layer.weight
    shape: list[Any] = [1, layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels]
    if not isinstance(layer, nn.Linear):
        sizes: Any = zip(layer.kernel_size, layer.dilation, strict=True)  # type: ignore[arg-type]
        shape += [dilation * (size - 1) + 1 for size, dilation in sizes]
    return torch.zeros(shape, dtype=weight.dtype, device=weight.device)

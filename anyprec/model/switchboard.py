"""What `set_bits` knows of the layers and norms of a network, so that it is asked only once.

Training and search call `set_bits` many times a second. So candidates, rows of norms,
configurations that were resolved and the memory of all indices are remembered, as long as the
network has the very same layers, norms and quantizers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from anyprec.bits import BitConfig, Bits, BitsLike, LayerCandidates
from anyprec.model.intact import Parts, parts_of
from anyprec.model.requests import resolve_request
from anyprec.nn.chosen import Chosen, ChosenTable
from anyprec.nn.layers import QuantizedLayer, write_precision
from anyprec.nn.norm_bank import NormBank, Statistics
from anyprec.nn.norms import NormSelection, SwitchableNorm, select
from anyprec.nn.quantizers import InputQuantizer

if TYPE_CHECKING:
    from anyprec.model.converted import ConvertedModel

_Request = BitsLike | Mapping[str, BitsLike]

_REMEMBERED = 256
"""Requests whose configuration is remembered."""

_LAYER_CHILDREN = ("weight_quantizer", "input_quantizer", "chosen")
_NORM_CHILDREN = ("bank", "chosen")


@dataclass(frozen=True, eq=False)
class _LayerSwitch:
    """A quantized layer.

    Attributes:
        path: Its path.
        attributes: What is written when it is switched.
        weight: Index of each bit-width of its weight.
        input: The same of its input.
    """

    path: str
    attributes: dict[str, Any]
    weight: dict[int, int]
    input: dict[int, int]


@dataclass(frozen=True, eq=False)
class _NormSwitch:
    """A switchable norm.

    Attributes:
        path: Its path.
        norm: The norm.
        bank: Its copies; None if it is shared.
        setter: Number of the layer that sets its row; None for a single row.
        pairs: Of that layer: how many candidates its input has.
        rows: Number of copies.
        selections: What was selected before, by row and uniform bit-width.
    """

    path: str
    norm: SwitchableNorm
    bank: NormBank | None
    setter: int | None
    pairs: int
    rows: int
    selections: dict[tuple[int | None, int | None], NormSelection] = field(default_factory=dict)

    def uniform(self, width: int | None) -> int | None:
        """Index of this uniform bit-width among those that there are statistics of, if it is."""
        bank = self.bank
        if bank is None or not bank.has_uniform or width not in bank.widths:
            return None
        return bank.widths.index(width)

    def selection(self, row: int | None, uniform: int | None) -> NormSelection:
        """What the norm uses then; it never changes, so that it is made only once."""
        selection = self.selections.get((row, uniform))
        if selection is None:
            selection = self.selections[row, uniform] = NormSelection(row, uniform)
        return selection


class Switchboard:
    """The switches of one network.

    Args:
        model: The network.
        parts: Its layers and norms.

    Attributes:
        candidates: The bit-widths that each layer may take, by path. Not to be changed.
    """

    def __init__(self, model: ConvertedModel, parts: Parts) -> None:
        self.candidates: dict[str, LayerCandidates] = {}
        self._parts = parts
        self._children: list[tuple[dict[str, Any], str, Any]] = []
        self._resolved: dict[Any, BitConfig] = {}
        self._uniform: dict[int, dict[str, Bits]] = {}
        chosen: list[Chosen] = []
        self._layers: list[_LayerSwitch] = []
        for path, layer in parts.layers.items():
            self.candidates[path] = layer.candidates
            self._layers.append(_layer_switch(path, layer))
            self._note_children(layer, _LAYER_CHILDREN)
            chosen.append(layer.chosen)
        self._norms: list[_NormSwitch] = []
        numbers = {path: number for number, path in enumerate(parts.layers)}
        for path, norm in parts.norms.items():
            setter = numbers.get(model.anyprec_record.norms[path] or "")
            pairs = 1 if setter is None else len(self._layers[setter].input)
            self._norms.append(_norm_switch(path, norm, setter, pairs))
            self._note_children(norm, _NORM_CHILDREN)
            if norm.chosen is not None:
                chosen.append(norm.chosen)
        inputs = [layer.input_quantizer for layer in parts.layers.values()]
        self._inputs: list[InputQuantizer] = [*inputs, *parts.outputs.values()]
        self._table = ChosenTable(chosen)

    def is_that_of(self, parts: Parts) -> bool:
        """Whether these parts, and their quantizers and copies, are those that it knows."""
        if self._parts is not parts:
            return False
        for children, name, module in self._children:  # noqa: SIM110 (`all` takes twice as long)
            if children.get(name) is not module:
                return False
        return True

    @property
    def is_calibrated(self) -> bool:
        """Whether all activation step sizes are set."""
        return all(quantizer.calibrated for quantizer in self._inputs)

    def resolve(self, request: _Request, configs: Mapping[str, BitConfig]) -> BitConfig:
        """The configuration that a request stands for, as `resolve_request` has it."""
        if isinstance(request, str) and request in configs:  # which may mean another one each time
            request = configs[request]
        if isinstance(request, BitConfig) and self._fits(request):
            return request
        # Mappings may change.
        if not _is_constant(request):
            return resolve_request(request, self.candidates, configs)
        key: Any = request
        config = self._resolved.get(key)
        if config is None:
            config = resolve_request(request, self.candidates, configs)
            if len(self._resolved) >= _REMEMBERED:
                self._resolved.clear()
            self._resolved[key] = config
        return config

    def _fits(self, config: BitConfig) -> bool:
        """Whether a configuration names every layer, in network order, with a candidate of it."""
        if list(config) != list(self.candidates):
            return False
        layers = self.candidates.values()
        return all(bits in layer for bits, layer in zip(config.values(), layers, strict=True))

    def switch(
        self, bits: Mapping[str, Bits | None], statistics: Mapping[str, Statistics]
    ) -> dict[str, Bits]:
        """Make `bits` the precision of all layers and norms.

        Args:
            bits: A candidate of each layer, or None for floating point.
            statistics: Those that the configuration has of its own, by path of the norm.

        Returns:
            Bits of the layers that have some.
        """
        active: dict[str, Bits] = {}
        indices: list[int] = []
        # A BitConfig answers by a call in Python, a dictionary does not.
        chosen = dict(bits.items())
        for layer in self._layers:
            bits_of_layer, attributes = chosen[layer.path], layer.attributes
            pair = attributes["_weight_index"], attributes["_input_index"]
            if bits_of_layer is not None:
                active[layer.path] = bits_of_layer
                pair = layer.weight[bits_of_layer.weight], layer.input[bits_of_layer.activation]
            write_precision(attributes, bits_of_layer, *pair)
            indices += pair
        if active:
            self._switch_norms(active, indices, statistics)
            self._table.write(indices)
        else:
            # Compiled networks in floating point read no index.
            for norm in self._norms:
                select(norm.norm, norm.selection(None, None))
        return active

    def _switch_norms(
        self, active: Mapping[str, Bits], indices: list[int], statistics: Mapping[str, Statistics]
    ) -> None:
        """Give every norm the copy that belongs to its layer, and add its indices to those."""
        width = self._uniform_width(active) if self._has_uniform else None
        for switch in self._norms:
            row = self._row(switch, active, indices)
            uniform = switch.uniform(width)
            if row is not None:
                indices += (row, row if uniform is None else switch.rows + uniform)
            selection = switch.selection(row, uniform)
            if switch.path in statistics:
                mean, variance = statistics[switch.path]
                like = switch.norm.running_mean
                selection = NormSelection(row, uniform, (mean.to(like), variance.to(like)))
            select(switch.norm, selection)

    def _row(
        self, switch: _NormSwitch, active: Mapping[str, Bits], indices: list[int]
    ) -> int | None:
        """The copy that belongs to the precision of the layer before a norm."""
        if switch.bank is None:
            return None
        setter = switch.setter
        if setter is None or self._layers[setter].path not in active:
            return 0
        # Rows stand in the order of pairs (weight, activation), the activation changing fastest.
        return indices[2 * setter] * switch.pairs + indices[2 * setter + 1]

    @property
    def _has_uniform(self) -> bool:
        """Whether statistics of uniform precisions are there."""
        return any(switch.bank is not None and switch.bank.has_uniform for switch in self._norms)

    def _uniform_width(self, active: Mapping[str, Bits]) -> int | None:
        """The bit-width of a uniform configuration, or None.

        In a uniform configuration every layer has that bit-width, as far as its candidates allow.
        """
        width = min(bits.weight for bits in active.values())
        if width != min(bits.activation for bits in active.values()):
            return None
        if width not in self._uniform:
            uniform = Bits(width, width)
            self._uniform[width] = {
                path: candidates.at_least(uniform) for path, candidates in self.candidates.items()
            }
        expected = self._uniform[width]
        if len(active) < len(expected):  # some layers are in floating point
            expected = {path: expected[path] for path in active}
        return width if active == expected else None

    def _note_children(self, module: nn.Module, names: tuple[str, ...]) -> None:
        children: Any = module._modules  # noqa: SLF001 (past a `__getattr__` of its own)
        self._children += [(children, name, children[name]) for name in names]


def switchboard_of(model: ConvertedModel) -> Switchboard:
    """The switches of a network, made anew where it has changed.

    Raises:
        ConversionError: as `parts_of`.
    """
    parts = parts_of(model)
    structure = model.anyprec_structure
    board = structure.switchboard
    if not isinstance(board, Switchboard) or not board.is_that_of(parts):
        board = structure.switchboard = Switchboard(model, parts)
    return board


def _layer_switch(path: str, layer: QuantizedLayer) -> _LayerSwitch:
    candidates = layer.candidates
    return _LayerSwitch(
        path,
        vars(layer),
        {bits: index for index, bits in enumerate(candidates.weight)},
        {bits: index for index, bits in enumerate(candidates.activation)},
    )


def _norm_switch(path: str, norm: SwitchableNorm, setter: int | None, pairs: int) -> _NormSwitch:
    rows = 0 if norm.bank is None else norm.bank.rows
    return _NormSwitch(path, norm, norm.bank, setter, pairs, rows)


def _is_constant(request: object) -> bool:
    """Whether a request means the same each time, and can be looked up.

    By exact types, since 4 == 4.0, which is refused.
    """
    if type(request) is tuple:
        return all(type(bits) is int for bits in request)
    return type(request) in (int, str, Bits)

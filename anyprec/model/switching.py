"""Switching the layers and norms of a converted network, which are already in place.

`set_bits` may be called between any two batches, so nothing is copied here, and modules are found
without a walk through the network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from anyprec.bits import BitConfig, Bits
from anyprec.model.intact import parts_of, switchable_norms
from anyprec.model.norm_copies import norm_row
from anyprec.nn.layers import QuantizedLayer
from anyprec.nn.norm_bank import Statistics

if TYPE_CHECKING:
    from anyprec.model.converted import ConvertedModel


def switch(
    model: ConvertedModel,
    layers: Mapping[str, QuantizedLayer],
    bits: Mapping[str, Bits | None],
) -> None:
    """Make `bits` the precision of the network.

    Args:
        model: A converted network.
        layers: Its quantized layers, by path.
        bits: A candidate of each of them, or None for floating point.
    """
    active: dict[str, Bits] = {}
    for path, layer in layers.items():
        chosen = bits[path]
        layer.switch(chosen)
        if chosen is not None:
            active[path] = chosen
    for owner in parts_of(model).owners.values():
        owner.switch_outputs(active=bool(active))
    if active:
        _switch_norms(model, layers, active)
    else:
        for _, norm in switchable_norms(model):
            norm.switch(None, None)
    model.anyprec_precision.changed(model, bits)


def switch_to_float(model: ConvertedModel, layers: Mapping[str, QuantizedLayer]) -> None:
    """Let the network run in floating point."""
    switch(model, layers, dict.fromkeys(layers))


@contextmanager
def outputs_in_float(model: ConvertedModel) -> Iterator[None]:
    """In the block no output is quantized, so that tracers see what happens between layers."""
    owners = list(parts_of(model).owners.values())
    active = [owner.quantizes_outputs for owner in owners]
    for owner in owners:
        owner.switch_outputs(active=False)
    try:
        yield
    finally:
        for owner, was_active in zip(owners, active, strict=True):
            owner.switch_outputs(active=was_active)


@dataclass(frozen=True, eq=False)
class NormSources:
    """What the statistics that norms use at a precision are chosen from.

    Attributes:
        statistics: Those of the configuration itself, if there are any.
        has_uniform: Of each norm, whether those of uniform precisions are estimated.
    """

    statistics: Mapping[str, Statistics] | None
    has_uniform: tuple[bool, ...]

    def are_those_of(self, earlier: NormSources) -> bool:
        """Whether norms would choose the same as from the `earlier` ones."""
        # By identity, since statistics that are estimated anew are another dictionary.
        is_same = self.statistics is earlier.statistics
        return is_same and self.has_uniform == earlier.has_uniform


def norm_sources(model: ConvertedModel, bits: Mapping[str, Bits | None]) -> NormSources:
    """What norms would choose their statistics from now, at this precision."""
    record = model.anyprec_record
    active = {path: chosen for path, chosen in bits.items() if chosen is not None}
    statistics = record.statistics.get(BitConfig(active)) if record.statistics else None
    banks = [norm.bank for _, norm in switchable_norms(model)]
    has_uniform = tuple(bank is not None and bank.has_uniform for bank in banks)
    return NormSources(statistics, has_uniform)


def forget_statistics(model: ConvertedModel) -> None:
    """Drop norm statistics of configurations and uniform precisions: they are of old weights."""
    model.anyprec_record.statistics.clear()
    for _, norm in switchable_norms(model):
        if norm.bank is not None:
            norm.bank.forget_uniform()


def _switch_norms(
    model: ConvertedModel, layers: Mapping[str, QuantizedLayer], active: Mapping[str, Bits]
) -> None:
    """Give every norm the copy that belongs to its layer's precision, and the right statistics."""
    record = model.anyprec_record
    # To make a BitConfig takes time, and without statistics there is nothing to find by it.
    statistics = record.statistics.get(BitConfig(active), {}) if record.statistics else {}
    width = _uniform_width(active, layers)
    for path, norm in switchable_norms(model):
        row = norm_row(layers.get(record.norms[path] or ""), record.settings.norm)
        override = None
        if path in statistics:
            mean, variance = statistics[path]
            override = mean.to(norm.running_mean), variance.to(norm.running_var)
        has_uniform = norm.bank is not None and norm.bank.has_uniform
        norm.switch(row, override, width=width if has_uniform else None)


def _uniform_width(active: Mapping[str, Bits], layers: Mapping[str, QuantizedLayer]) -> int | None:
    """The bit-width of a uniform configuration, or None.

    In a uniform configuration every layer has that bit-width, as far as its candidates allow.
    """
    width = min(bits.weight for bits in active.values())
    if width != min(bits.activation for bits in active.values()):
        return None
    uniform = Bits(width, width)
    for path, bits in active.items():
        if bits != layers[path].candidates.at_least(uniform):
            return None
    return width

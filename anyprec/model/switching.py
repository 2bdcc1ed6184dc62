"""Switching the layers and norms of a converted network, which are already in place.

`set_bits` may be called between any two batches, so no weight is copied here, and modules are found
without a walk through the network (`switchboard.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from anyprec.bits import BitConfig, Bits
from anyprec.model.intact import parts_of, switchable_norms
from anyprec.model.switchboard import switchboard_of
from anyprec.nn.norm_bank import Statistics

if TYPE_CHECKING:
    from anyprec.model.converted import ConvertedModel


def switch(model: ConvertedModel, bits: Mapping[str, Bits | None]) -> None:
    """Make `bits` the precision of the network.

    Args:
        model: A converted network.
        bits: A candidate of each of its quantized layers, by path, or None for floating point.
    """
    active = switchboard_of(model).switch(bits, _statistics_of(model, bits))
    for owner in parts_of(model).owners.values():
        owner.switch_outputs(active=bool(active))
    model.anyprec_precision.changed(model, bits)


def switch_to_float(model: ConvertedModel) -> None:
    """Let the network run in floating point."""
    switch(model, dict.fromkeys(parts_of(model).layers))


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
    statistics = record.statistics.get(_active_config(bits)) if record.statistics else None
    banks = [norm.bank for _, norm in switchable_norms(model)]
    has_uniform = tuple(bank is not None and bank.has_uniform for bank in banks)
    return NormSources(statistics, has_uniform)


def forget_statistics(model: ConvertedModel) -> None:
    """Drop norm statistics of configurations and uniform precisions: they are of old weights."""
    model.anyprec_record.statistics.clear()
    for _, norm in switchable_norms(model):
        if norm.bank is not None:
            norm.bank.forget_uniform()


def _statistics_of(
    model: ConvertedModel, bits: Mapping[str, Bits | None]
) -> Mapping[str, Statistics]:
    """The norm statistics that a configuration has of its own."""
    statistics = model.anyprec_record.statistics
    # To make a BitConfig takes time, and without statistics there is nothing to find by it.
    return statistics.get(_active_config(bits), {}) if statistics else {}


def _active_config(bits: Mapping[str, Bits | None]) -> BitConfig:
    """The configuration of the layers that are not in floating point."""
    if isinstance(bits, BitConfig):
        return bits
    return BitConfig({path: chosen for path, chosen in bits.items() if chosen is not None})

"""What a checkpoint's document says of settings, layers and outputs: entries, made and read.

How a document is read safely is in `document.py`.
"""

from __future__ import annotations

import re
import reprlib
from typing import Annotated, Any

from msgspec import Meta, Struct
from msgspec.structs import asdict

from anyprec.bits import MAX_BITS, MIN_BITS, BitConfig, Bits
from anyprec.model.pairs import LayerPairs
from anyprec.model.placement import Placement
from anyprec.model.record import ConvertSettings
from anyprec.network.facts import LayerFacts, LayerKind, NetworkFacts, OutputFacts
from anyprec.nn.grids import ActivationGrid, ActivationScale
from anyprec.nn.norms import NormSharing
from anyprec.nn.outputs import OUTPUTS

MAX_INTEGER = 2**63 - 1
"""Of any number in a document."""

_DEFAULT_TEXTS = {
    "norm": "per-pair",
    "activation_grid": "affine",
    "activation_scale": "any",
    "placement": "layers",
}
"""Settings that are left out where they have this value."""

Count = Annotated[int, Meta(ge=0, le=MAX_INTEGER)]
Length = Annotated[int, Meta(ge=1, le=MAX_INTEGER)]
_BitWidth = Annotated[int, Meta(ge=MIN_BITS, le=MAX_BITS)]
_BitWidths = Annotated[tuple[_BitWidth, ...], Meta(min_length=1)]

_Precision = Annotated[str, Meta(pattern=r"^W[2-8]A[2-8]$")]


class Entry(Struct, frozen=True, forbid_unknown_fields=True):
    """A JSON object with exactly the fields of its class."""


class PairsEntry(Entry, frozen=True):
    """The fields of `LayerPairs`."""

    convolution: tuple[_Precision, ...]
    depthwise: tuple[_Precision, ...]
    linear: tuple[_Precision, ...]
    other: tuple[_Precision, ...]


class SettingsEntry(Entry, frozen=True, kw_only=True, omit_defaults=True):
    """The fields of `ConvertSettings`."""

    bits: _BitWidths
    activation_bits: _BitWidths
    first_last_bits: _BitWidth | None
    depthwise_min_bits: _BitWidth
    per_channel: bool
    include: tuple[str, ...] | None
    exclude: tuple[str, ...]
    norm: NormSharing = "per-pair"
    only: BitConfig | None = None
    activation_grid: ActivationGrid = "affine"
    activation_scale: ActivationScale = "any"
    hardware: str | None = None
    pairs: PairsEntry | None = None
    placement: Placement = "layers"

    def __post_init__(self) -> None:
        for name, widths in (("bits", self.bits), ("activation_bits", self.activation_bits)):
            if list(widths) != sorted(set(widths)):
                msg = f"{name} is {reprlib.repr(widths)}, expected ascending bit-widths"
                raise ValueError(msg)


class LayerEntry(Entry, frozen=True, kw_only=True, omit_defaults=True):
    """The fields of `LayerFacts`; those with a default are left out where they have it."""

    path: str
    calls: Count
    macs: Count
    weights: Count
    owner: str | None
    parameter: str | None = None
    axis: int | None = None
    groups: Length = 1
    per_tensor: bool = False
    dynamic: bool = False
    derived: bool = False
    feature: str | None = None
    depthwise: bool
    nonnegative: bool
    first: bool
    last: bool
    constant: bool
    problem: str | None
    kind: LayerKind | None = None
    reads: str | None = None


class OutputEntry(Entry, frozen=True, kw_only=True, omit_defaults=True):
    """The fields of `OutputFacts`; those with a default are left out where they have it."""

    path: str
    source: str
    owner: str
    function: str
    index: Count
    counts: Annotated[tuple[Count, ...], Meta(min_length=1)]
    nonnegative: bool = False
    layers: tuple[str, ...] = ()
    other_readers: bool = False
    output: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(rf"(.+\.)?{OUTPUTS}\.[0-9]+", self.path, re.ASCII):
            msg = f"output {self.path!r:.80} is no path of an output quantizer"
            raise ValueError(msg)
        if self.owner and not self.path.startswith(f"{self.owner}."):
            msg = f"output {self.path!r:.80} is not inside its owner {self.owner!r:.80}"
            raise ValueError(msg)
        if self.index >= max(self.counts):
            msg = f"output {self.path!r:.80} has index {self.index} of {max(self.counts)} calls"
            raise ValueError(msg)


def settings_entry(settings: ConvertSettings) -> SettingsEntry:
    """The entry of these settings."""
    fields = dict(vars(settings))
    if settings.pairs is not None:
        pairs = vars(settings.pairs)
        fields["pairs"] = PairsEntry(**{kind: tuple(map(str, pairs[kind])) for kind in pairs})
    return SettingsEntry(**fields)


def settings_of(entry: SettingsEntry) -> ConvertSettings:
    """The settings of an entry."""
    fields = asdict(entry)
    if entry.pairs is not None:
        pairs = asdict(entry.pairs)
        fields["pairs"] = LayerPairs(
            **{kind: tuple(map(Bits.parse, pairs[kind])) for kind in pairs}
        )
    return ConvertSettings(**fields)


def layer_entries(facts: NetworkFacts) -> tuple[LayerEntry, ...]:
    """The entries of all layers."""
    return tuple(LayerEntry(**vars(layer)) for layer in facts.layers.values())


def layer_facts(entry: LayerEntry) -> LayerFacts:
    """The facts of an entry."""
    return LayerFacts(**asdict(entry))


def output_entries(facts: NetworkFacts) -> tuple[OutputEntry, ...]:
    """The entries of all values between layers that have a quantizer."""
    return tuple(OutputEntry(**vars(output)) for output in facts.outputs)


def output_facts(entry: OutputEntry) -> OutputFacts:
    """The facts of an entry."""
    return OutputFacts(**asdict(entry))


def drop_default_texts(settings: dict[str, Any]) -> None:
    """Leave out, in place, what settings in JSON have by default.

    msgspec leaves out a default string only if it is the very object of the class.
    """
    for name, default in _DEFAULT_TEXTS.items():
        if settings.get(name) == default:
            del settings[name]

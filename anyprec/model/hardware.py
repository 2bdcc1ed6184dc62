"""The table of hardware, `hardware.toml`: what each target can run, read and checked.

What the table means for a network is in `presets.py` (conversion) and `fitting.py` (search and
export). This file knows no torch.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from types import MappingProxyType
from typing import Annotated, Literal, get_args

import msgspec

from anyprec.bits import MAX_BITS, MIN_BITS, Bits
from anyprec.errors import HardwareError
from anyprec.model.pairs import LayerPairs
from anyprec.model.placement import Placement
from anyprec.network.facts import LayerKind
from anyprec.nn.grids import ActivationGrid, ActivationScale

WeightGranularity = Literal["per-channel", "per-tensor", "either"]
"""Whether each output channel of a weight has a step size."""

Evidence = Literal["run here", "accepted by a tool here", "from documents"]
"""How an entry of the table of hardware is known."""

ExportTarget = Literal["", "onnx", "qonnx", "openvino", "executorch", "encodings"]
"""What `export` writes for a target; empty is nothing."""

KINDS: tuple[LayerKind, ...] = get_args(LayerKind)
"""The kinds of layers, as the table names them."""

_WIDTHS = r"\d{1,2}(?:/\d{1,2})*"
_PAIRS = re.compile(rf"W({_WIDTHS}) A({_WIDTHS})")
_Text = Annotated[str, msgspec.Meta(min_length=1)]


@dataclass(frozen=True)
class HardwareSource:
    """A document that an entry of the table was read off."""

    title: str
    url: str


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What one target can run.

    Attributes:
        name: Its name in `convert(hardware=...)` and elsewhere.
        title: Its full name.
        pairs: The precisions of each kind of layer, as far as anyprec has their bit-widths; a kind
            without any stays in floating point.
        unavailable: Precisions that the target has and anyprec has not (beyond 2 to 8 bits), by
            kind, such as `"W8A16"`.
        weights: How many weights share a step size.
        grid: The loosest grid of inputs that it takes; see `convert(activation_grid=...)`.
        scale: Step sizes of inputs that it takes.
        placement: The recommended placement of quantizers.
        first_last: The bit-width that layers have which read the image or make the output; None if
            they are free.
        export: Target of `anyprec.export` that makes its file; empty if there is none.
        route: How a network gets there.
        evidence: How the entry is known.
        sources: Documents that it was read off.
        unchecked: What no document says that was found; empty if nothing.
        notes: What else one should know.
    """

    name: str
    title: str
    pairs: LayerPairs
    unavailable: Mapping[LayerKind, tuple[str, ...]]
    weights: WeightGranularity
    grid: ActivationGrid
    scale: ActivationScale
    placement: Placement
    first_last: int | None
    export: ExportTarget
    route: str
    evidence: Evidence
    sources: tuple[HardwareSource, ...]
    unchecked: str
    notes: str


def hardware(name: str) -> Hardware:
    """What a target can run.

    Args:
        name: Of the target, e.g. `"litert"`; see `hardware_names`.

    Raises:
        HardwareError: The table has no target of this name.

    Example:
        >>> target = hardware("litert")
        >>> print(*target.pairs.convolution)
        W4A8 W8A8
        >>> target.unavailable["depthwise"]
        ('W8A16',)
    """
    table = _table()
    if name in table:
        return table[name]
    msg = f"no hardware {name!r:.80} is known"
    close = difflib.get_close_matches(str(name).lower(), table, n=1)
    if close:
        msg += f", did you mean {close[0]!r}?"
    msg += f" There are {', '.join(table)}"
    raise HardwareError(msg)


def hardware_names() -> tuple[str, ...]:
    """The names of all targets in the table, in its order."""
    return tuple(_table())


def read_table(text: str) -> dict[str, Hardware]:
    """Read a table of hardware in TOML; `hardware.toml` describes its form.

    Raises:
        HardwareError: It is no TOML, a field is missing, unknown or not of its type, or a precision
            cannot be read.
    """
    try:
        entries = msgspec.convert(tomllib.loads(text), dict[_Text, _Entry])
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        msg = f"the table of hardware is not as expected: {error}"
        raise HardwareError(msg) from error
    return {name: _hardware(name, entry) for name, entry in entries.items()}


@functools.cache
def _table() -> Mapping[str, Hardware]:
    file = resources.files("anyprec.model").joinpath("hardware.toml")
    return MappingProxyType(read_table(file.read_text(encoding="utf-8")))


class _Pairs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    convolution: tuple[str, ...]
    depthwise: tuple[str, ...]
    linear: tuple[str, ...]
    other: tuple[str, ...]


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A target as the file has it."""

    title: _Text
    pairs: _Pairs
    weights: WeightGranularity
    grid: ActivationGrid
    scale: ActivationScale
    placement: Placement
    first_last: Annotated[int, msgspec.Meta(ge=MIN_BITS, le=MAX_BITS)] | None = None
    export: ExportTarget
    route: _Text
    evidence: Evidence
    sources: Annotated[tuple[HardwareSource, ...], msgspec.Meta(min_length=1)]
    unchecked: str = ""
    notes: str = ""


def _hardware(name: str, entry: _Entry) -> Hardware:
    fields = msgspec.structs.asdict(entry)
    available: dict[str, tuple[Bits, ...]] = {}
    unavailable: dict[LayerKind, tuple[str, ...]] = {}
    for kind in KINDS:
        listed = _read_pairs(getattr(entry.pairs, kind), where=f"{name}.pairs.{kind}")
        available[kind] = tuple(Bits(*pair) for pair in listed if _is_available(pair))
        beyond = [pair for pair in listed if not _is_available(pair)]
        unavailable[kind] = tuple(f"W{weight}A{activation}" for weight, activation in beyond)
    fields["pairs"] = LayerPairs(**available)
    return Hardware(name=name, unavailable=MappingProxyType(unavailable), **fields)


def _is_available(pair: tuple[int, int]) -> bool:
    return all(MIN_BITS <= width <= MAX_BITS for width in pair)


def _read_pairs(texts: tuple[str, ...], *, where: str) -> list[tuple[int, int]]:
    """The pairs that a list such as `["W2/4 A8", "W8 A8/16"]` names, ascending.

    Raises:
        HardwareError: A text is of another form, or a pair stands twice.
    """
    pairs: list[tuple[int, int]] = []
    for text in texts:
        match = _PAIRS.fullmatch(text)
        if match is None:
            msg = f"{where} has {text!r:.40}: write precisions as 'W2/4/8 A8'"
            raise HardwareError(msg)
        weights, activations = (map(int, widths.split("/")) for widths in match.groups())
        pairs.extend(itertools.product(weights, activations))
    for pair in pairs:
        if pairs.count(pair) > 1:
            msg = f"{where} names W{pair[0]}A{pair[1]} twice"
            raise HardwareError(msg)
    return sorted(pairs)

"""The vocabulary of precision: `Bits`, `BitConfig` and candidate bit-widths.

These are plain values without torch. A layer is named by its path in the network
(`layer1.0.conv1`), everywhere. Reading what a user may pass to `set_bits` (numbers, pairs,
patterns) against a network's candidates is here too: it is arithmetic on names and numbers only.
"""

from __future__ import annotations

import re
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

from anyprec.errors import BitsError

MIN_BITS = 2
MAX_BITS = 8

_NOTATION = re.compile(r"[wW](\d{1,3})[aA](\d{1,3})")
_WILDCARD = re.compile(r"[*?\[]")


@dataclass(frozen=True, order=True)
class Bits:
    """The precision of one layer: bit-width of its weight and of its input activation.

    Attributes:
        weight: Bits of one weight code.
        activation: Bits of one activation code.

    Example:
        >>> str(Bits(4, 6))
        'W4A6'
        >>> Bits.parse("W4A6") == Bits(weight=4, activation=6)
        True
    """

    weight: int
    activation: int

    def __post_init__(self) -> None:
        for operand in ("weight", "activation"):
            check_bit_width(getattr(self, operand), what=f"{operand} bit-width")

    def __str__(self) -> str:
        return f"W{self.weight}A{self.activation}"

    @classmethod
    def parse(cls, text: str) -> Bits:
        """Read the notation `W4A6`.

        Raises:
            BitsError: `text` is not of that form, or a bit-width is out of range.
        """
        match = _NOTATION.fullmatch(text.strip())
        if match is None:
            msg = f"cannot read {text[:60]!r} as a precision: write it as 'W4A6' (weight bits, "
            msg += "activation bits)"
            raise BitsError(msg)
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def of(cls, value: BitsLike) -> Bits:
        """Make `Bits` of an int (both operands), a pair (weight, activation), `W4A6`, or `Bits`.

        Raises:
            BitsError: `value` is none of these, or a bit-width is out of range.
        """
        if isinstance(value, Bits):
            return value
        if isinstance(value, str):
            return cls.parse(value)
        if isinstance(value, int) and not isinstance(value, bool):
            return cls(value, value)
        if isinstance(value, (tuple, list)) and len(value) == 2:
            return cls(value[0], value[1])
        msg = f"cannot read {value!r} as a precision: pass an int, a pair (weight, activation), "
        msg += "'W4A6' or Bits"
        raise BitsError(msg)


BitsLike = Bits | int | str | tuple[int, int] | list[int]
"""What a user may write for the precision of a layer."""


@dataclass(frozen=True)
class LayerCandidates:
    """The bit-widths that one layer may take, each ascending."""

    weight: tuple[int, ...]
    activation: tuple[int, ...]

    @property
    def lowest(self) -> Bits:
        """The cheapest precision of the layer."""
        return Bits(self.weight[0], self.activation[0])

    @property
    def highest(self) -> Bits:
        """The most precise one."""
        return Bits(self.weight[-1], self.activation[-1])

    def __contains__(self, bits: Bits) -> bool:
        return bits.weight in self.weight and bits.activation in self.activation

    def at_least(self, bits: Bits) -> Bits:
        """`bits`, each rounded up to the nearest candidate (to the highest where none is above)."""
        if bits in self:
            return bits
        return Bits(
            _round_up(bits.weight, self.weight), _round_up(bits.activation, self.activation)
        )

    def above(self, lowest: Bits) -> LayerCandidates:
        """The candidates from `lowest` upwards; there may be none."""
        return LayerCandidates(
            _from_upwards(lowest.weight, self.weight),
            _from_upwards(lowest.activation, self.activation),
        )


Candidates = Mapping[str, LayerCandidates]
"""Layer path to the bit-widths that the layer may take."""


class BitConfig(Mapping[str, Bits]):
    """A precision for every layer, by path. Immutable and hashable.

    Example:
        >>> config = BitConfig({"conv": (4, 6), "fc": 8})
        >>> config["fc"]
        Bits(weight=8, activation=8)
        >>> config.replace({"conv": 2})["conv"]
        Bits(weight=2, activation=2)
    """

    __slots__ = ("_bits", "_hash")

    def __init__(self, bits: Mapping[str, BitsLike]) -> None:
        self._bits = MappingProxyType({path: Bits.of(value) for path, value in bits.items()})
        self._hash = hash(frozenset(self._bits.items()))

    def __getitem__(self, path: str) -> Bits:
        return self._bits[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._bits)

    def __len__(self) -> int:
        return len(self._bits)

    # The three below answer as `Mapping` has them, which takes a call for each layer.

    def keys(self) -> KeysView[str]:
        """The paths."""
        return self._bits.keys()

    def values(self) -> ValuesView[Bits]:
        """The precision of each layer."""
        return self._bits.values()

    def items(self) -> ItemsView[str, Bits]:
        """Paths and precisions."""
        return self._bits.items()

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if isinstance(other, BitConfig):
            return self._bits == other._bits
        return NotImplemented

    def __repr__(self) -> str:
        return f"BitConfig({{{', '.join(f'{path!r}: {bits}' for path, bits in self.items())}}})"

    def __reduce__(self) -> tuple[Any, ...]:
        return BitConfig, (dict(self._bits),)

    def replace(self, changes: Mapping[str, BitsLike]) -> BitConfig:
        """A new configuration with some layers changed.

        Raises:
            BitsError: a path of `changes` is not in this configuration.
        """
        for path in changes:
            if path not in self._bits:
                msg = f"no layer {path!r} in this configuration; it has {shorten(self)}"
                raise BitsError(msg)
        return BitConfig({**self._bits, **changes})

    def to_json(self) -> dict[str, str]:
        """Layer path to notation, e.g. `{"conv1": "W4A6"}`."""
        return {path: str(bits) for path, bits in self.items()}


def check_bit_width(value: object, *, what: str = "bit-width") -> int:
    """Return `value` if it is an int that anyprec supports as a bit-width.

    Raises:
        BitsError: it is not an int from `MIN_BITS` to `MAX_BITS`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not MIN_BITS <= value <= MAX_BITS:
        msg = f"{what} {value!r} is not supported: use an int from {MIN_BITS} to {MAX_BITS}"
        raise BitsError(msg)
    return value


def check_candidates(values: Iterable[int] | int, *, what: str = "bits") -> tuple[int, ...]:
    """Candidate bit-widths as an ascending tuple.

    Raises:
        BitsError: there is none, one is out of range, or one stands twice.
    """
    listed = [values] if isinstance(values, int) else list(values)
    if not listed:
        msg = f"{what} is empty: give at least one candidate bit-width, e.g. "
        msg += f"{what}=(2, 3, 4, 5, 6, 8)"
        raise BitsError(msg)
    for value in listed:
        check_bit_width(value, what=f"{what}: bit-width")
    if len(set(listed)) != len(listed):
        msg = f"{what}={tuple(listed)} names a bit-width twice"
        raise BitsError(msg)
    return tuple(sorted(listed))


def highest_config(candidates: Candidates) -> BitConfig:
    """Every layer at its highest bit-widths."""
    return BitConfig({path: layer.highest for path, layer in candidates.items()})


def lowest_config(candidates: Candidates) -> BitConfig:
    """Every layer at its lowest bit-widths."""
    return BitConfig({path: layer.lowest for path, layer in candidates.items()})


def uniform_widths(layers: Iterable[LayerCandidates]) -> tuple[int, ...]:
    """The bit-widths that some layer may take for its weight and its input alike, ascending."""
    widths: set[int] = set()
    for layer in layers:
        widths.update(set(layer.weight) & set(layer.activation))
    return tuple(sorted(widths))


def uniform(bits: BitsLike, candidates: Candidates) -> BitConfig:
    """The configuration in which every layer has `bits`, as far as its candidates allow.

    A layer without that candidate takes the next higher one, or its highest: with `bits=2`, a
    depthwise convolution whose lowest candidate is 3 takes 3, and a first layer fixed at 8 bits
    keeps 8.

    Raises:
        BitsError: no layer at all has that bit-width among its candidates.
    """
    return resolve({"*": bits}, candidates, partial=False)


def resolve(
    request: Mapping[str, BitsLike],
    candidates: Candidates,
    *,
    partial: bool = True,
) -> BitConfig:
    """Read a mapping of paths or patterns to bits against the candidates of a network.

    An exact path must name a layer and a precision among its candidates. A pattern (with `*`, `?`
    or `[`) must match a layer; its bit-widths must be candidates of a matched layer, and are
    rounded up for the others (see `uniform`). Later entries overrule earlier ones; exact paths
    overrule patterns.

    Args:
        request: Path or pattern to bits.
        candidates: Candidates of every layer of the network.
        partial: Whether `request` may leave layers unnamed; these take their highest bits.

    Raises:
        BitsError: unknown path, pattern without a match, or a bit-width that is not a candidate.
    """
    chosen: dict[str, Bits] = {}
    for pattern, value in request.items():
        if pattern not in candidates:
            chosen.update(_resolve_pattern(pattern, Bits.of(value), candidates))
    # Exact paths come after all patterns, since they overrule them.
    for path, value in request.items():
        if path in candidates:
            chosen[path] = _resolve_path(path, Bits.of(value), candidates[path])
    missing: list[str] = []
    for path, layer in candidates.items():
        if path not in chosen:
            missing.append(path)
            chosen[path] = layer.highest
    if missing and not partial:
        msg = f"the configuration leaves {len(missing)} layers unnamed: {shorten(missing)}"
        raise BitsError(msg)
    # In network order, whatever the order of the request.
    return BitConfig({path: chosen[path] for path in candidates})


def match_paths(pattern: str, paths: Iterable[str]) -> list[str]:
    """Paths that match a shell-style pattern.

    Raises:
        BitsError: none does.
    """
    paths = list(paths)
    matched = [path for path in paths if fnmatchcase(path, pattern)]
    if not matched:
        kind = "pattern" if _WILDCARD.search(pattern) else "path"
        msg = f"{kind} {pattern!r} matches no layer; layers are {shorten(paths)}"
        raise BitsError(msg)
    return matched


def shorten(names: Iterable[str], limit: int = 6) -> str:
    """The first few names, and how many more there are, for an error message."""
    listed = list(map(repr, names))
    if not listed:
        return "(none)"
    more = f", ... ({len(listed) - limit} more)" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def _resolve_pattern(pattern: str, bits: Bits, candidates: Candidates) -> dict[str, Bits]:
    """Bits of the layers that match, rounded up for those that lack a bit-width."""
    matched = match_paths(pattern, candidates)
    offered_weight: set[int] = set()
    offered_activation: set[int] = set()
    resolved: dict[str, Bits] = {}
    for path in matched:
        layer = candidates[path]
        offered_weight.update(layer.weight)
        offered_activation.update(layer.activation)
        resolved[path] = layer.at_least(bits)
    _check_offered("weight", bits.weight, offered_weight, pattern)
    _check_offered("activation", bits.activation, offered_activation, pattern)
    return resolved


def _check_offered(operand: str, width: int, offered: set[int], pattern: str) -> None:
    if width not in offered:
        layers = "the network" if pattern == "*" else f"the layers that match {pattern!r}"
        msg = f"{operand} bit-width {width} is not a candidate of {layers}: choose from "
        msg += f"{tuple(sorted(offered))}"
        raise BitsError(msg)


def _resolve_path(path: str, bits: Bits, layer: LayerCandidates) -> Bits:
    if bits not in layer:
        msg = f"{bits} is not a candidate of layer {path!r}: weight bits {layer.weight}, "
        msg += f"activation bits {layer.activation}"
        raise BitsError(msg)
    return bits


def _from_upwards(lowest: int, widths: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(width for width in widths if width >= lowest)


def _round_up(wanted: int, widths: tuple[int, ...]) -> int:
    """The lowest of the ascending `widths` that is not below `wanted`, or else the highest."""
    for width in widths:
        if width >= wanted:
            return width
    return widths[-1]

"""The vocabulary of precision: `Bits`, `BitConfig` and candidate bit-widths.

Plain values without torch. A layer is named by its path in the network (`layer1.0.conv1`), everywhere.
Reading what a user may pass to `set_bits` (numbers, pairs, patterns) against a network's candidates is here
too, since it is arithmetic on names and numbers only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any

from anyprec.errors import BitsError

MIN_BITS = 2
MAX_BITS = 8

_NOTATION = re.compile(r"[wW](\d{1,3})[aA](\d{1,3})")


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
            msg = f"cannot read {text[:60]!r} as a precision: write it as 'W4A6' (weight bits, activation bits)"
            raise BitsError(msg)
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def of(cls, value: BitsLike) -> Bits:
        """Make `Bits` of an int (both operands), a pair (weight, activation), the notation, or `Bits`.

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
        msg = f"cannot read {value!r} as a precision: pass an int, a pair (weight, activation), 'W4A6' or Bits"
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

    @property
    def searchable(self) -> bool:
        """Whether there is anything to choose."""
        return len(self.weight) > 1 or len(self.activation) > 1

    def __contains__(self, bits: Bits) -> bool:
        return bits.weight in self.weight and bits.activation in self.activation

    def at_least(self, bits: Bits) -> Bits:
        """`bits`, each rounded up to the nearest candidate (to the highest where none is above)."""
        if bits in self:
            return bits
        return Bits(
            _round_up(bits.weight, self.weight), _round_up(bits.activation, self.activation)
        )

    def above(self, floor: Bits) -> LayerCandidates:
        """Those that are not below `floor`, which must be among them."""
        return LayerCandidates(
            tuple(width for width in self.weight if width >= floor.weight),
            tuple(width for width in self.activation if width >= floor.activation),
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
        msg = f"{what} is empty: give at least one candidate bit-width, e.g. {what}=(2, 3, 4, 5, 6, 8)"
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
    return tuple(
        sorted({width for layer in layers for width in set(layer.weight) & set(layer.activation)})
    )


def uniform(bits: BitsLike, candidates: Candidates) -> BitConfig:
    """The configuration in which every layer has `bits`, as far as its candidates allow.

    A layer without that candidate takes the next higher one, or its highest: with `bits=2`, a depthwise
    convolution whose lowest candidate is 3 takes 3, and a first layer fixed at 8 bits keeps 8.

    Raises:
        BitsError: no layer at all has that bit-width among its candidates.
    """
    return resolve({"*": bits}, candidates, partial=False)


def resolve(
    request: Mapping[str, BitsLike],
    candidates: Candidates,
    *,
    base: BitConfig | None = None,
    partial: bool = True,
) -> BitConfig:
    """Read a mapping of paths or patterns to bits against the candidates of a network.

    An exact path must name a layer and a precision among its candidates. A pattern (with `*`, `?` or `[`) must
    match a layer; its bit-widths must be candidates of a matched layer, and are rounded up for the others (see
    `uniform`). Later entries overrule earlier ones; exact paths overrule patterns.

    Args:
        request: Path or pattern to bits.
        candidates: Candidates of every layer of the network.
        base: Values of layers that `request` does not name.
        partial: Whether `request` may leave layers unnamed; without `base` these take their highest bits.

    Raises:
        BitsError: unknown path, pattern without a match, or a bit-width that is not a candidate.
    """
    chosen: dict[str, Bits] = {path: layer.highest for path, layer in candidates.items()}
    if base is not None:
        chosen.update(base)
    exact = {key: value for key, value in request.items() if key in candidates}
    patterns = {key: value for key, value in request.items() if key not in candidates}
    named = set(exact)
    for pattern, value in patterns.items():
        bits = Bits.of(value)
        matched = match_paths(pattern, candidates)
        _check_offered(bits, pattern, [candidates[path] for path in matched])
        named.update(matched)
        chosen.update({path: candidates[path].at_least(bits) for path in matched})
    for path, value in exact.items():
        bits = Bits.of(value)
        if bits not in candidates[path]:
            layer = candidates[path]
            msg = f"{bits} is not a candidate of layer {path!r}: weight bits {layer.weight}, activation bits {layer.activation}"
            raise BitsError(msg)
        chosen[path] = bits
    if not partial and len(named) < len(candidates):
        missing = [path for path in candidates if path not in named]
        msg = f"the configuration leaves {len(missing)} layers unnamed: {shorten(missing)}"
        raise BitsError(msg)
    return BitConfig(chosen)


def match_paths(pattern: str, paths: Iterable[str]) -> list[str]:
    """Paths that match a shell-style pattern.

    Raises:
        BitsError: none does.
    """
    known = list(paths)
    matched = [path for path in known if fnmatchcase(path, pattern)]
    if not matched:
        kind = "pattern" if any(character in pattern for character in "*?[") else "path"
        msg = f"{kind} {pattern!r} matches no layer; layers are {shorten(known)}"
        raise BitsError(msg)
    return matched


def shorten(names: Iterable[str], limit: int = 6) -> str:
    """The first few names, and how many more there are, for an error message."""
    listed = [repr(name) for name in names]
    if not listed:
        return "(none)"
    more = f", ... ({len(listed) - limit} more)" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def _check_offered(bits: Bits, pattern: str, layers: list[LayerCandidates]) -> None:
    for operand in ("weight", "activation"):
        value = getattr(bits, operand)
        offered = sorted({width for layer in layers for width in getattr(layer, operand)})
        if value not in offered:
            where = "the network" if pattern == "*" else f"the layers that match {pattern!r}"
            msg = f"{operand} bit-width {value} is not a candidate of {where}: choose from {tuple(offered)}"
            raise BitsError(msg)


def _round_up(value: int, candidates: tuple[int, ...]) -> int:
    return min((width for width in candidates if width >= value), default=candidates[-1])

"""What a search may choose: one option for each layer, or for each group of layers that are tied to one choice.

A point of the space says for every choice which of its options is taken; algorithms work on points, which are tuples of
numbers, and everything outside speaks of configurations. Options of a choice are ordered by precision: one is below
another if neither of its bit-widths is higher. That order need not be a full product: a choice may offer W4A4 and W8A8 only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from anyprec.bits import BitConfig, Bits, Candidates, check_bit_width, match_paths, shorten
from anyprec.errors import BitsError

Point = tuple[int, ...]
"""For each choice the index of the option that is taken."""

Operand = Literal["weight", "activation"]
OPERANDS: tuple[Operand, Operand] = ("weight", "activation")

Allowed = int | str | Bits | Sequence["int | str | Bits | tuple[int, int]"]
"""Bit-widths (for both operands) or precisions that a layer may take; see `make_space`."""


@dataclass(frozen=True)
class Choice:
    """One decision: layers that take the same precision, and what they may take.

    Attributes:
        paths: The layers.
        options: Their precisions, ascending by (weight, activation).
    """

    paths: tuple[str, ...]
    options: tuple[Bits, ...]

    @cached_property
    def below(self) -> tuple[tuple[int, ...], ...]:
        """For each option the next lower ones: below it, with nothing in between."""
        return tuple(self._neighbours(index, down=True) for index in range(len(self.options)))

    @cached_property
    def above(self) -> tuple[tuple[int, ...], ...]:
        """For each option the next higher ones."""
        return tuple(self._neighbours(index, down=False) for index in range(len(self.options)))

    def at_least(self, bits: Bits) -> int:
        """The lowest option with at least these bit-widths; where a bit-width has none, its highest counts."""
        wanted = Bits(
            *(min(getattr(bits, operand), self.widths[operand][-1]) for operand in OPERANDS)
        )
        enough = [index for index, option in enumerate(self.options) if dominates(option, wanted)]
        if not enough:  # no single option has both: the nearest to it
            return max(
                range(len(self.options)),
                key=lambda i: (self.options[i].weight + self.options[i].activation, i),
            )
        return min(
            enough,
            key=lambda index: (self.options[index].weight + self.options[index].activation, index),
        )

    @cached_property
    def widths(self) -> dict[Operand, list[int]]:
        """The bit-widths that occur, ascending."""
        return {
            operand: sorted({getattr(bits, operand) for bits in self.options})
            for operand in OPERANDS
        }

    def distance(self, one: int, other: int) -> int:
        """Bit-widths between two options, of the operand that differs more."""
        ranks = self._ranks
        return max(abs(a - b) for a, b in zip(ranks[one], ranks[other], strict=True))

    @cached_property
    def _ranks(self) -> list[tuple[int, ...]]:
        return [
            tuple(self.widths[name].index(getattr(bits, name)) for name in OPERANDS)
            for bits in self.options
        ]

    def _neighbours(self, index: int, *, down: bool) -> tuple[int, ...]:
        here = self.options[index]

        def beyond(one: Bits, other: Bits) -> bool:
            return one != other and (dominates(one, other) if down else dominates(other, one))

        further = [option for option in self.options if beyond(here, option)]
        nearest = [
            option for option in further if not any(beyond(between, option) for between in further)
        ]
        return tuple(map(self.options.index, nearest))


@dataclass(frozen=True)
class Space:
    """All configurations that a search may return.

    Attributes:
        choices: The decisions, in network order.
    """

    choices: tuple[Choice, ...]

    @cached_property
    def options(self) -> tuple[tuple[Bits, ...], ...]:
        """The options of each choice."""
        return tuple(choice.options for choice in self.choices)

    @property
    def size(self) -> int:
        """Number of configurations."""
        total = 1
        for choice in self.choices:
            total *= len(choice.options)
        return total

    def config(self, point: Point) -> BitConfig:
        """The configuration of a point."""
        bits = {
            path: choice.options[index]
            for choice, index in zip(self.choices, point, strict=True)
            for path in choice.paths
        }
        return BitConfig(bits)

    def point(self, config: BitConfig) -> Point | None:
        """The point of a configuration; None if the space does not have it."""
        indices = []
        for choice in self.choices:
            found = {config[path] for path in choice.paths}
            if len(found) != 1 or (bits := found.pop()) not in choice.options:
                return None
            indices.append(choice.options.index(bits))
        return tuple(indices)

    def at_least(self, bits: Bits) -> Point:
        """The point in which every choice has `bits`, rounded up to what it offers."""
        return tuple(choice.at_least(bits) for choice in self.choices)

    def lift(self, config: BitConfig) -> Point:
        """The nearest point that is nowhere below `config`, as far as the options go."""
        return tuple(
            choice.at_least(
                Bits(
                    max(config[path].weight for path in choice.paths),
                    max(config[path].activation for path in choice.paths),
                )
            )
            for choice in self.choices
        )

    @property
    def lowest(self) -> Point:
        """The point of lowest bit-widths."""
        return self.at_least(Bits(*(widths[0] for widths in self._widths)))

    @property
    def highest(self) -> Point:
        """The point of highest bit-widths."""
        return self.at_least(Bits(*(widths[-1] for widths in self._widths)))

    @cached_property
    def uniform(self) -> tuple[BitConfig, ...]:
        """Configurations with one precision everywhere, as far as choices allow: equal bit-widths first, descending."""
        weights, activations = self._widths
        pairs = sorted((Bits(w, a) for w in weights for a in activations if w != a), reverse=True)
        mixed = (self.config(self.at_least(bits)) for bits in pairs)
        return tuple(dict.fromkeys((*self.equal_widths, *mixed)))

    @cached_property
    def equal_widths(self) -> tuple[BitConfig, ...]:
        """Those of `uniform` whose two bit-widths are the same."""
        return tuple(self.config(point) for point in reversed(self.equal_points))

    @cached_property
    def equal_points(self) -> tuple[Point, ...]:
        """The points with one bit-width for both operands everywhere, as far as choices allow, ascending."""
        widths = sorted({*self._widths[0], *self._widths[1]})
        return tuple(dict.fromkeys(self.at_least(Bits(width, width)) for width in widths))

    @cached_property
    def _widths(self) -> list[list[int]]:
        """The bit-widths of each operand that occur, ascending."""
        return [
            sorted({w for choice in self.choices for w in choice.widths[operand]})
            for operand in OPERANDS
        ]


def dominates(one: Bits, other: Bits) -> bool:
    """Whether neither bit-width of `one` is lower."""
    return one.weight >= other.weight and one.activation >= other.activation


def make_space(
    candidates: Candidates,
    *,
    allowed: Allowed | Mapping[str, Allowed] | None = None,
    tied: Iterable[Sequence[str]] = (),
) -> Space:
    """The space of a network's candidates under constraints.

    Args:
        candidates: What each layer may take.
        allowed: What hardware can run: `(4, 8)` allows these bit-widths for both operands; `("W4A4", "W8A8")` only these
            precisions; a mapping from paths or patterns to either gives layers their own. A layer whose candidates have
            none of them (a first layer fixed at 8 bits under `4`) raises.
        tied: Groups of paths or patterns; the layers of a group take the same precision. Groups that overlap are one.

    Raises:
        BitsError: A path or pattern matches nothing, a bit-width is out of range, or nothing is left for a layer.
    """
    options = {
        path: [
            Bits(weight, activation) for weight in layer.weight for activation in layer.activation
        ]
        for path, layer in candidates.items()
    }
    rules = allowed if isinstance(allowed, Mapping) else {} if allowed is None else {"*": allowed}
    for pattern, rule in rules.items():
        permits = _rule(rule)
        for path in _matching(pattern, candidates):
            left = [bits for bits in options[path] if permits(bits)]
            if not left:
                msg = f"allowed={rule!r} leaves nothing for layer {path!r}, whose candidates are weight bits "
                msg += (
                    f"{candidates[path].weight} and activation bits {candidates[path].activation}"
                )
                raise BitsError(msg)
            options[path] = left
    choices = []
    for paths in _groups(candidates, tied):
        common = [
            bits for bits in options[paths[0]] if all(bits in options[path] for path in paths)
        ]
        if not common:
            msg = f"the tied layers {shorten(paths)} have no precision in common: tie others, or allow more"
            raise BitsError(msg)
        choices.append(Choice(paths, tuple(common)))
    return Space(tuple(choices))


def _rule(rule: Allowed) -> _Rule:
    entries = [rule] if isinstance(rule, (int, str, Bits)) else list(rule)
    if not entries:
        msg = "allowed=() leaves nothing: name bit-widths such as (4, 8), or precisions such as ('W4A4', 'W8A8')"
        raise BitsError(msg)
    widths: set[int] = set()
    precisions: set[Bits] = set()
    for entry in entries:
        if isinstance(entry, int):
            check_bit_width(entry, what="allowed bit-width")
            widths.add(entry)
        else:
            precisions.add(Bits.of(entry))
    return _Rule(frozenset(widths), frozenset(precisions))


@dataclass(frozen=True)
class _Rule:
    widths: frozenset[int]
    precisions: frozenset[Bits]

    def __call__(self, bits: Bits) -> bool:
        return bits in self.precisions or (
            bits.weight in self.widths and bits.activation in self.widths
        )


def _groups(candidates: Candidates, tied: Iterable[Sequence[str]]) -> list[tuple[str, ...]]:
    """Layers by choice, in network order."""
    group_of = {path: index for index, path in enumerate(candidates)}
    for group in tied:
        if isinstance(group, str):
            msg = f"tied={group!r} is not a list of groups: write tied=[[{group!r}, ...]]"
            raise BitsError(msg)
        paths = [path for pattern in group for path in _matching(pattern, candidates)]
        numbers = {group_of[path] for path in paths}
        group_of = {
            path: min(numbers) if number in numbers else number for path, number in group_of.items()
        }
    groups: dict[int, list[str]] = {}
    for path, number in group_of.items():
        groups.setdefault(number, []).append(path)
    return [tuple(paths) for paths in groups.values()]


def _matching(pattern: str, candidates: Candidates) -> list[str]:
    return [pattern] if pattern in candidates else match_paths(pattern, candidates)

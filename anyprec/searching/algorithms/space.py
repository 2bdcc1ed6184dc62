"""What a search may choose: one option for each layer, or for each group of layers tied together.

A point of the space says for every choice which of its options is taken. Algorithms work on points,
which are tuples of numbers; everything outside speaks of configurations. Options of a choice are
ordered by precision: one is below another if neither of its bit-widths is higher. That order need
not be a full product: a choice may offer W4A4 and W8A8 only. User constraints are read in
`constraints.py`.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from anyprec.bits import BitConfig, Bits

Point = tuple[int, ...]
"""For each choice the index of the option that is taken."""

Operand = Literal["weight", "activation"]
OPERANDS: tuple[Operand, Operand] = ("weight", "activation")


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
        below = []
        for upper in self.options:
            indices = [i for i, lower in enumerate(self.options) if self._is_next(lower, upper)]
            below.append(tuple(indices))
        return tuple(below)

    @cached_property
    def above(self) -> tuple[tuple[int, ...], ...]:
        """For each option the next higher ones."""
        above = []
        for lower in self.options:
            indices = [i for i, upper in enumerate(self.options) if self._is_next(lower, upper)]
            above.append(tuple(indices))
        return tuple(above)

    def at_least(self, bits: Bits) -> int:
        """The lowest option with at least these bit-widths; if too high, the highest counts."""
        wanted = Bits(
            min(bits.weight, self.widths["weight"][-1]),
            min(bits.activation, self.widths["activation"][-1]),
        )
        sums = [option.weight + option.activation for option in self.options]
        enough = [index for index, option in enumerate(self.options) if dominates(option, wanted)]
        if enough:
            return min(enough, key=lambda index: (sums[index], index))
        # No single option has both bit-widths: the highest comes nearest.
        return max(range(len(sums)), key=lambda index: (sums[index], index))

    @cached_property
    def widths(self) -> dict[Operand, list[int]]:
        """The bit-widths that occur, ascending."""
        weights = {bits.weight for bits in self.options}
        activations = {bits.activation for bits in self.options}
        return {"weight": sorted(weights), "activation": sorted(activations)}

    def distance(self, first: int, second: int) -> int:
        """Bit-widths between two options, of the operand that differs more."""
        weight, activation = self._ranks[first]
        second_weight, second_activation = self._ranks[second]
        return max(abs(weight - second_weight), abs(activation - second_activation))

    @cached_property
    def _ranks(self) -> list[tuple[int, int]]:
        weights, activations = self.widths["weight"], self.widths["activation"]
        return [
            (weights.index(bits.weight), activations.index(bits.activation))
            for bits in self.options
        ]

    def _is_next(self, lower: Bits, upper: Bits) -> bool:
        """Whether one is above the other, with nothing in between."""
        if not is_above(upper, lower):
            return False
        return not any(is_above(upper, bits) and is_above(bits, lower) for bits in self.options)


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
        return math.prod(len(choice.options) for choice in self.choices)

    def config(self, point: Point) -> BitConfig:
        """The configuration of a point."""
        bits = {}
        for choice, option in zip(self.choices, point, strict=True):
            for path in choice.paths:
                bits[path] = choice.options[option]
        return BitConfig(bits)

    def point(self, config: BitConfig) -> Point | None:
        """The point of a configuration; None if the space does not have it."""
        point = []
        for choice in self.choices:
            bits = config[choice.paths[0]]
            if bits not in choice.options or any(config[path] != bits for path in choice.paths):
                return None
            point.append(choice.options.index(bits))
        return tuple(point)

    def at_least(self, bits: Bits) -> Point:
        """The point in which every choice has `bits`, rounded up to what it offers."""
        return tuple(choice.at_least(bits) for choice in self.choices)

    def lift(self, config: BitConfig) -> Point:
        """The nearest point that is nowhere below `config`, as far as the options go."""
        point = []
        for choice in self.choices:
            weight = max(config[path].weight for path in choice.paths)
            activation = max(config[path].activation for path in choice.paths)
            point.append(choice.at_least(Bits(weight, activation)))
        return tuple(point)

    @property
    def lowest(self) -> Point:
        """The point of lowest bit-widths."""
        return self.at_least(Bits(self._widths("weight")[0], self._widths("activation")[0]))

    @property
    def highest(self) -> Point:
        """The point of highest bit-widths."""
        return self.at_least(Bits(self._widths("weight")[-1], self._widths("activation")[-1]))

    @cached_property
    def uniform(self) -> tuple[BitConfig, ...]:
        """Configurations with one precision everywhere, as far as choices allow.

        Equal bit-widths come first; each part is in descending order.
        """
        pairs = itertools.product(self._widths("weight"), self._widths("activation"))
        mixed = sorted((Bits(*pair) for pair in pairs if pair[0] != pair[1]), reverse=True)
        configs = [self.config(self.at_least(bits)) for bits in mixed]
        return tuple(dict.fromkeys([*self.equal_widths, *configs]))

    @cached_property
    def equal_widths(self) -> tuple[BitConfig, ...]:
        """Those of `uniform` whose two bit-widths are the same."""
        return tuple(self.config(point) for point in reversed(self.equal_points))

    @cached_property
    def equal_points(self) -> tuple[Point, ...]:
        """The points with one bit-width everywhere, as far as choices allow, ascending."""
        widths = sorted({*self._widths("weight"), *self._widths("activation")})
        return tuple(dict.fromkeys(self.at_least(Bits(width, width)) for width in widths))

    def _widths(self, operand: Operand) -> list[int]:
        """The bit-widths of an operand that occur, ascending."""
        widths: set[int] = set()
        for choice in self.choices:
            widths.update(choice.widths[operand])
        return sorted(widths)


def dominates(bits: Bits, lower: Bits) -> bool:
    """Whether neither bit-width of `bits` is lower than that of `lower`."""
    return bits.weight >= lower.weight and bits.activation >= lower.activation


def is_above(bits: Bits, lower: Bits) -> bool:
    """Whether `bits` dominates `lower` and is not the same."""
    return bits != lower and dominates(bits, lower)

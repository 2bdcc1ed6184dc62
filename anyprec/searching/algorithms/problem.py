"""One question of a search, in plain numbers: a space, what its options cost, and limits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property

from anyprec.bits import BitConfig, Bits
from anyprec.errors import BudgetError
from anyprec.searching.algorithms.program import allocate
from anyprec.searching.algorithms.space import Choice, Point, Space, dominates
from anyprec.searching.budget.budgets import Budget, Costs, unreachable, utilisation


class Problem:
    """Find a point of low loss within a budget.

    Options that cannot pay are left out: those for which another one is nowhere lower and costs no more of anything
    that the budget limits. So each step down saves something, whatever the costs, and what is free stays high.

    Args:
        everything: The space before any option is left out.
        budget: The limits.
        costs: What options cost.

    Attributes:
        everything: As given; uniform configurations are taken from it.
        space: The options that can pay.
        budget: As given.
    """

    def __init__(self, everything: Space, budget: Budget, costs: Costs) -> None:
        self.everything = everything
        self.budget = budget
        self._costs = costs
        self._limits = budget.limits
        self._utilisations: dict[
            BitConfig, float
        ] = {}  # the best of all evaluations is asked for after each
        self.space = Space(tuple(self._worthwhile(choice) for choice in everything.choices))
        if not self.fits(self.cheapest):
            raise unreachable(budget, {name: self._range(name) for name in self._limits})

    @cached_property
    def shares(self) -> tuple[tuple[tuple[float, ...], ...], ...]:
        """Share of each limit that each option of each choice uses: `shares[limit][choice][option]`."""
        return tuple(
            tuple(
                tuple(self._share(name, choice, bits) for bits in choice.options)
                for choice in self.space.choices
            )
            for name in self._limits
        )

    @cached_property
    def cheapest(self) -> BitConfig:
        """The configuration of least cost; under several limits, one that fits if any does."""
        shares = list(zip(*self.shares, strict=True))  # by choice, limit, option
        chosen = tuple(
            min(range(len(tables[0])), key=lambda o: max(t[o] for t in tables)) for tables in shares
        )
        if len(self._limits) > 1 and not self.fits(self.space.config(chosen)):
            free = [[0.0] * len(choice.options) for choice in self.space.choices]
            chosen = allocate(free, self.shares) or chosen
        return self.space.config(chosen)

    @cached_property
    def fitting_uniform(self) -> tuple[BitConfig, ...]:
        """The uniform configurations that fit, those of equal bit-widths first."""
        return tuple(config for config in self.everything.uniform if self.fits(config))

    @cached_property
    def start(self) -> Point | None:
        """The cheapest point of equal bit-widths that does not fit; None if all fit."""
        return next(
            (point for point in self.space.equal_points if not self.fits(self.space.config(point))),
            None,
        )

    def utilisation(self, config: BitConfig) -> float:
        """Share of the budget that a configuration uses: it fits if at most 1."""
        if config not in self._utilisations:
            self._utilisations[config] = utilisation(config, self.budget, self._costs)
        return self._utilisations[config]

    def fits(self, config: BitConfig) -> bool:
        """Whether a configuration is within the budget."""
        return self.utilisation(config) <= 1

    def saving(self, point: Point, choice: int, option: int) -> float:
        """Fall of the utilisation when one choice changes; computed from totals, so several limits count as they bind."""
        return self._utilisation_of(point) - self._utilisation_of(
            (*point[:choice], option, *point[choice + 1 :])
        )

    def _utilisation_of(self, point: Point) -> float:
        return max(math.fsum(map(tuple.__getitem__, table, point)) for table in self.shares)

    def _range(self, name: str) -> tuple[float, float]:
        """The lowest and the highest total of a cost."""
        ends = []
        for end in (min, max):
            bits = [
                end(choice.options, key=lambda o: self._share(name, choice, o))
                for choice in self.space.choices
            ]
            ends.append(
                {
                    path: b
                    for choice, b in zip(self.space.choices, bits, strict=True)
                    for path in choice.paths
                }
            )
        return self._costs.total(name, BitConfig(ends[0])), self._costs.total(
            name, BitConfig(ends[1])
        )

    def _share(self, name: str, choice: Choice, bits: Bits) -> float:
        total = math.fsum(self._costs.of_layer(name, path, bits) for path in choice.paths)
        return total / self._costs.divisor(name) / self._limits[name]

    def _worthwhile(self, choice: Choice) -> Choice:
        costs = {
            bits: [self._share(name, choice, bits) for name in self._limits]
            for bits in choice.options
        }
        finite = [bits for bits in choice.options if all(map(math.isfinite, costs[bits]))]
        if not finite:
            names = " and ".join(self._limits)
            msg = f"the cost table for {names} has no precision that layers {choice.paths} may take"
            raise BudgetError(msg)
        kept = [bits for bits in finite if not any(_pays(other, bits, costs) for other in finite)]
        return Choice(choice.paths, tuple(kept))


def _pays(other: Bits, bits: Bits, costs: Mapping[Bits, list[float]]) -> bool:
    """Whether `other` is nowhere lower than `bits` and costs no more."""
    return (
        other != bits
        and dominates(other, bits)
        and all(map(float.__le__, costs[other], costs[bits]))
    )

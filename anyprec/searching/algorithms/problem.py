"""One budget of a search, in plain numbers: a space, what its options cost, and limits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cached_property

from anyprec.bits import BitConfig, Bits
from anyprec.errors import BudgetError
from anyprec.model.cost import CostModel
from anyprec.searching.algorithms.program import allocate
from anyprec.searching.algorithms.space import Choice, Point, Space, is_above
from anyprec.searching.budget.budgets import Budget, unreachable, utilisation


class Problem:
    """Find a point of low loss within a budget.

    Options that cannot pay are left out: those for which another one is nowhere lower and costs no
    more of anything that the budget limits. So each step down saves something, whatever the costs,
    and what is free stays high.

    Args:
        full_space: The space before any option is left out.
        budget: The limits.
        costs: What options cost.

    Attributes:
        full_space: As given; uniform configurations are taken from it.
        space: The options that can pay.
        budget: As given.

    Raises:
        BudgetError: Nothing fits the budget.
    """

    def __init__(self, full_space: Space, budget: Budget, costs: CostModel) -> None:
        self.full_space = full_space
        self.budget = budget
        self._costs = costs
        self._limits = budget.limits
        # Kept, since the best of all evaluations is asked for again and again.
        self._utilisations: dict[BitConfig, float] = {}
        self.space = Space(tuple(self._worthwhile(choice) for choice in full_space.choices))
        if not self.fits(self.cheapest):
            raise unreachable(budget, {name: self._range(name) for name in self._limits})

    @cached_property
    def shares(self) -> list[list[list[float]]]:
        """Share of each limit that each option uses: `shares[limit][choice][option]`."""
        return [self._shares_of_limit(name) for name in self._limits]

    def _shares_of_limit(self, name: str) -> list[list[float]]:
        return [self._shares_of_choice(name, choice) for choice in self.space.choices]

    def _shares_of_choice(self, name: str, choice: Choice) -> list[float]:
        return [self._share(name, choice, bits) for bits in choice.options]

    @cached_property
    def cheapest(self) -> BitConfig:
        """The configuration of least cost; under several limits, one that fits if any does."""
        point = self._cheapest_of_each_choice()
        if len(self._limits) > 1 and not self.fits(self.space.config(point)):
            # What is cheapest for each layer need not be so together: ask for anything that fits.
            no_losses = [[0.0] * len(choice.options) for choice in self.space.choices]
            point = allocate(no_losses, self.shares) or point
        return self.space.config(point)

    def _cheapest_of_each_choice(self) -> Point:
        point = []
        for number, choice in enumerate(self.space.choices):
            rows = [table[number] for table in self.shares]
            largest_shares = [max(shares) for shares in zip(*rows, strict=True)]
            point.append(min(range(len(choice.options)), key=largest_shares.__getitem__))
        return tuple(point)

    @cached_property
    def fitting_uniform(self) -> tuple[BitConfig, ...]:
        """The uniform configurations that fit, those of equal bit-widths first."""
        return tuple(config for config in self.full_space.uniform if self.fits(config))

    @cached_property
    def start(self) -> Point | None:
        """The cheapest point of equal bit-widths that does not fit; None if all fit."""
        for point in self.space.equal_points:
            if not self.fits(self.space.config(point)):
                return point
        return None

    def utilisation(self, config: BitConfig) -> float:
        """Share of the budget that a configuration uses: it fits if at most 1."""
        if config not in self._utilisations:
            self._utilisations[config] = utilisation(config, self.budget, self._costs)
        return self._utilisations[config]

    def fits(self, config: BitConfig) -> bool:
        """Whether a configuration is within the budget."""
        return self.utilisation(config) <= 1

    def saving(self, point: Point, choice: int, option: int) -> float:
        """Fall of the utilisation when one choice changes.

        It is computed from totals, so that of several limits the one that binds counts.
        """
        changed = (*point[:choice], option, *point[choice + 1 :])
        return self._utilisation_of(point) - self._utilisation_of(changed)

    def _utilisation_of(self, point: Point) -> float:
        return max(math.fsum(map(list.__getitem__, table, point)) for table in self.shares)

    def _range(self, name: str) -> tuple[float, float]:
        """The lowest and the highest total of a cost."""
        return self._extreme(name, min), self._extreme(name, max)

    def _extreme(self, name: str, end: Callable[[list[float]], float]) -> float:
        bits = {}
        for choice in self.space.choices:
            shares = self._shares_of_choice(name, choice)
            option = choice.options[shares.index(end(shares))]
            bits.update(dict.fromkeys(choice.paths, option))
        return self._costs.total(name, BitConfig(bits))

    def _share(self, name: str, choice: Choice, bits: Bits) -> float:
        total = math.fsum(self._costs.of_layer(name, path, bits) for path in choice.paths)
        return total / self._costs.divisor(name) / self._limits[name]

    def _worthwhile(self, choice: Choice) -> Choice:
        """The choice without the options that cannot pay, or that a layer cannot have."""
        shares: dict[Bits, list[float]] = {}
        for bits in choice.options:
            row = [self._share(name, choice, bits) for name in self._limits]
            if all(map(math.isfinite, row)):
                shares[bits] = row
        if not shares:
            names = " and ".join(self._limits)
            msg = f"the cost table for {names} has no precision that layers {choice.paths} may take"
            raise BudgetError(msg)
        worthwhile = tuple(bits for bits in shares if not _is_beaten(bits, shares))
        return Choice(choice.paths, worthwhile)


def _is_beaten(bits: Bits, shares: Mapping[Bits, list[float]]) -> bool:
    """Whether another option is nowhere lower than `bits` and costs no more of anything."""
    for rival, row in shares.items():
        if is_above(rival, bits) and all(map(float.__le__, row, shares[bits])):
            return True
    return False

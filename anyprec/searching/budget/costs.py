"""What options cost: the network's own costs, and tables or functions of the user's."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from anyprec.bits import BitConfig, Bits, BitsLike, Candidates, shorten
from anyprec.errors import BudgetError
from anyprec.model.cost import COST_NAMES, CostModel

UserCost = Mapping[str, Mapping[BitsLike, float]] | Callable[[str, Bits], float]
"""A cost per layer and bits: a table `{path: {"W4A8": 0.0012, ...}}`, or a function of path and `Bits`. Costs add up over
layers. A precision that a table does not have cannot be chosen."""


@dataclass(frozen=True)
class SearchCosts:
    """Costs of a network by name.

    Attributes:
        model: MACs and weights of every layer.
        own: For each cost of the user's: layer path to bits to cost.
    """

    model: CostModel
    own: Mapping[str, Mapping[str, Mapping[Bits, float]]] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """The costs that are known."""
        return (*COST_NAMES, *self.own)

    @property
    def candidates(self) -> Candidates:
        """Candidates of every quantized layer, by path."""
        return self.model.candidates

    def total(self, name: str, config: BitConfig) -> float:
        """The cost `name` of a configuration."""
        if name not in self.own:
            return self.model.total(name, config)
        return math.fsum(self.of_layer(name, path, bits) for path, bits in config.items())

    def of_layer(self, name: str, path: str, bits: Bits) -> float:
        """What one layer adds to the sum; infinite if it cannot have `bits`."""
        return (
            self.own[name][path].get(bits, math.inf)
            if name in self.own
            else self.model.of_layer(name, path, bits)
        )

    def divisor(self, name: str) -> float:
        """What the sum is divided by."""
        return 1 if name in self.own else self.model.divisor(name)


def search_costs(model: CostModel, own: Mapping[str, UserCost] | None = None) -> SearchCosts:
    """The costs of a network, with those of the user.

    Raises:
        BudgetError: A name is taken, a layer is missing or unknown, or a cost is negative or no number.
    """
    return SearchCosts(
        model, {name: _table(name, cost, model.candidates) for name, cost in (own or {}).items()}
    )


def _table(name: str, cost: UserCost, candidates: Candidates) -> dict[str, dict[Bits, float]]:
    if name in COST_NAMES:
        msg = f"costs={{{name!r}: ...}} would replace a cost that every network has: choose another name"
        raise BudgetError(msg)
    options = {
        path: [Bits(w, a) for w in c.weight for a in c.activation] for path, c in candidates.items()
    }
    if callable(cost):
        table = {
            path: {bits: cost(path, bits) for bits in every} for path, every in options.items()
        }
    else:
        if different := set(cost) ^ set(candidates):
            what = (
                "lacks" if different & set(candidates) else "has a layer that the network does not:"
            )
            msg = f"the cost table {name!r} {what} {shorten(sorted(different))}"
            raise BudgetError(msg)
        given = {
            path: {Bits.of(bits): value for bits, value in row.items()}
            for path, row in cost.items()
        }
        table = {
            path: {bits: row[bits] for bits in options[path] if bits in row}
            for path, row in given.items()
        }
    for path, row in table.items():
        for bits, value in row.items():
            if (
                isinstance(value, bool)
                or not isinstance(value, (int, float))
                or not 0 <= value < math.inf
            ):
                msg = f"the cost {name!r} of layer {path!r} at {bits} is {value!r}: use a number that is not negative"
                raise BudgetError(msg)
    return table

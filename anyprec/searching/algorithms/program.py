"""Choosing one option per choice under several limits, when losses add up.

This is the multiple-choice knapsack problem, solved exactly by HiGHS through `scipy.optimize.milp`,
as HAWQ-v3 (Yao et al. 2021) and LIMPQ (Tang et al. 2022) do with sensitivities of layers. Losses of
layers do not quite add up in a network, so our search uses it to propose what to measure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from anyprec.searching.algorithms.space import Point

_GAP = 1e-6
_NODES = 20_000


def allocate(
    losses: Sequence[Sequence[float]],
    shares: Sequence[Sequence[Sequence[float]]],
    *,
    limit: float = 1.0,
    near: tuple[Point, int] | None = None,
    excluded: Iterable[Point] = (),
) -> Point | None:
    """The point of least total loss within limits.

    Args:
        losses: Loss of each option of each choice; infinite rules an option out.
        shares: For each limit the share of it that each option of each choice uses.
        limit: Largest sum of shares, of each limit.
        near: A point, and how many choices may differ from it at most.
        excluded: Points that are not wanted.

    Returns:
        The point, or None if there is none.

    Example:
        >>> allocate([[0.0, 1.0], [0.0, 5.0]], [[[0.8, 0.4], [0.8, 0.4]]], limit=1.2)
        (1, 0)
    """
    program = _Program(losses)
    program.require_one_option_each()
    for table in shares:
        program.limit_shares(table, limit)
    for point in excluded:
        program.exclude(point)
    if near is not None:
        program.stay_near(*near)
    return program.solve()


class _Program:
    """A binary program: one variable for each option that is not ruled out, 1 if it is taken."""

    def __init__(self, losses: Sequence[Sequence[float]]) -> None:
        self._choices = len(losses)
        self._variables: dict[tuple[int, int], int] = {}
        self._rows: list[np.ndarray] = []
        self._lower: list[float] = []
        self._upper: list[float] = []
        objective: list[float] = []
        for choice, options in enumerate(losses):
            for option, loss in enumerate(options):
                if math.isfinite(loss):
                    self._variables[choice, option] = len(objective)
                    objective.append(loss)
        self._objective = np.array(objective)

    def require_one_option_each(self) -> None:
        """Of each choice exactly one option is taken."""
        variables: list[list[int]] = [[] for _ in range(self._choices)]
        for (choice, _), variable in self._variables.items():
            variables[choice].append(variable)
        for variables_of_choice in variables:
            self._constrain(self._sum_of(variables_of_choice), 1.0, 1.0)

    def limit_shares(self, table: Sequence[Sequence[float]], limit: float) -> None:
        """What the options use together is at most `limit`."""
        row = np.array([table[choice][option] for choice, option in self._variables])
        self._constrain(row, -math.inf, limit)

    def exclude(self, point: Point) -> None:
        """At least one choice differs from `point`."""
        variables = self._variables_of(point)
        if len(variables) == self._choices:  # otherwise an option of it is ruled out already
            self._constrain(self._sum_of(variables), -math.inf, self._choices - 1.0)

    def stay_near(self, point: Point, changes: int) -> None:
        """At most so many choices differ from `point`."""
        unchanged = self._sum_of(self._variables_of(point))
        self._constrain(unchanged, float(self._choices - changes), math.inf)

    def solve(self) -> Point | None:
        largest = np.abs(self._objective).max(initial=0.0)
        solution = milp(
            # The solver's tolerances are absolute.
            self._objective / (largest or 1.0),
            integrality=np.ones(len(self._variables)),
            bounds=Bounds(0, 1),
            constraints=LinearConstraint(
                csr_matrix(np.stack(self._rows)), self._lower, self._upper
            ),
            # Presolving saves no time on programs of this size.
            options={"mip_rel_gap": _GAP, "node_limit": _NODES, "presolve": False},
        )
        if solution.x is None:
            return None
        # Variables are 0 or 1 up to a tolerance: the largest of a choice is the one that is taken.
        largest_values = [-math.inf] * self._choices
        point = [0] * self._choices
        for (choice, option), variable in self._variables.items():
            if solution.x[variable] > largest_values[choice]:
                largest_values[choice] = solution.x[variable]
                point[choice] = option
        return tuple(point)

    def _variables_of(self, point: Point) -> list[int]:
        """The variables of a point's options, as far as they are not ruled out."""
        return [self._variables[key] for key in enumerate(point) if key in self._variables]

    def _sum_of(self, variables: list[int]) -> np.ndarray:
        row = np.zeros(len(self._variables))
        row[variables] = 1
        return row

    def _constrain(self, row: np.ndarray, lower: float, upper: float) -> None:
        self._rows.append(row)
        self._lower.append(lower)
        self._upper.append(upper)

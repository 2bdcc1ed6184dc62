"""Single moves of a search: one choice, one option down or up.

What moves cost, what they are known to do, and the `Walk` that all algorithms go by. Every move
that is measured teaches the predictor.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from anyprec.searching.algorithms.evaluations import Evaluations
from anyprec.searching.algorithms.predictor import Predictor
from anyprec.searching.algorithms.problem import Problem
from anyprec.searching.algorithms.program import allocate
from anyprec.searching.algorithms.space import Point

_LIMITS = (1.0, 1 - 1e-7, 1 - 1e-5)
"""The solver's tolerance may exceed a limit by a little; then it is asked for a little less."""


@dataclass(frozen=True)
class Move:
    """A change of one choice.

    Attributes:
        choice: Which one.
        before: Option that it has.
        after: Option that it gets.
        lowers: Whether that is below.
    """

    choice: int
    before: int
    after: int
    lowers: bool

    def apply(self, point: Point) -> Point:
        """The point after the move."""
        return (*point[: self.choice], self.after, *point[self.choice + 1 :])


class Walk:
    """What algorithms that go from point to point share: losses, moves and predictions.

    Args:
        problem: What is searched.
        evaluations: Measures and remembers.
        predictor: Learns from every single move that is measured.

    Attributes:
        moves_asked: Moves that `measure` was asked for, those with a known loss included: what a
            search without a memory would evaluate.
    """

    def __init__(self, problem: Problem, evaluations: Evaluations, predictor: Predictor) -> None:
        self.problem = problem
        self.evaluations = evaluations
        self.predictor = predictor
        self.moves_asked = 0
        self._measured: dict[Point, float] = {}
        self._evaluations_read = 0

    @property
    def measured(self) -> Mapping[Point, float]:
        """The losses of all points of the space that were measured so far."""
        # The record speaks of configurations, and others add to it too: walks of other budgets,
        # uniform configurations. Only what is new since the last call is translated.
        if self._evaluations_read < len(self.evaluations):
            new = itertools.islice(self.evaluations.losses.items(), self._evaluations_read, None)
            for config, loss in new:
                point = self.problem.space.point(config)
                if point is not None:
                    self._measured[point] = loss
            self._evaluations_read = len(self.evaluations)
        return self._measured

    def loss(self, point: Point) -> float:
        """The loss of a point, measured if it is not known."""
        loss = self.measured.get(point)
        if loss is None:
            return self.evaluations(self.problem.space.config(point))
        return loss

    def knows(self, point: Point) -> bool:
        """Whether a point was measured."""
        return point in self.measured

    def fits(self, point: Point) -> bool:
        """Whether a point is within the budget."""
        return self.problem.fits(self.problem.space.config(point))

    def utilisation(self, point: Point) -> float:
        """Share of the budget that a point uses."""
        return self.problem.utilisation(self.problem.space.config(point))

    def allocate(
        self,
        losses: Sequence[Sequence[float]],
        *,
        near: tuple[Point, int] | None = None,
        excluded: Collection[Point] = (),
    ) -> Point | None:
        """The point of least total loss that fits; see `program.allocate`."""
        for limit in _LIMITS:
            target = allocate(
                losses, self.problem.shares, limit=limit, near=near, excluded=excluded
            )
            if target is None or self.fits(target):
                return target
        return None

    def set_anchor(self, point: Point) -> None:
        """Say that changes of this point come next."""
        self.evaluations.set_anchor(self.problem.space.config(point))

    def downs(self, point: Point) -> list[Move]:
        """Every single move down."""
        moves = []
        for number, choice in enumerate(self.problem.space.choices):
            before = point[number]
            moves += [Move(number, before, after, lowers=True) for after in choice.below[before]]
        return moves

    def ups(self, point: Point) -> list[Move]:
        """Every single move up."""
        moves = []
        for number, choice in enumerate(self.problem.space.choices):
            before = point[number]
            moves += [Move(number, before, after, lowers=False) for after in choice.above[before]]
        return moves

    def saving(self, point: Point, move: Move) -> float:
        """Share of the budget that a move sets free; negative for what it costs."""
        return self.problem.saving(point, move.choice, move.after)

    def measure(self, point: Point, moves: Iterable[Move]) -> None:
        """Measure moves from `point`, whose loss is measured too."""
        before = self.loss(point)
        for move in moves:
            self.moves_asked += 1
            increase = difference(self.loss(move.apply(point)), before)
            # An infinite loss says nothing about how large the increase is elsewhere.
            if math.isfinite(increase):
                options = self.problem.space.options[move.choice]
                self.predictor.note(
                    move.choice, options[move.before], options[move.after], increase
                )

    def increase(self, point: Point, move: Move) -> float | None:
        """The loss increase of a move: measured, or predicted; None if nothing is known."""
        target = move.apply(point)
        if self.knows(target) and self.knows(point):
            return difference(self.loss(target), self.loss(point))
        options = self.problem.space.options[move.choice]
        return self.predictor.increase(move.choice, options[move.before], options[move.after])


def difference(after: float, before: float) -> float:
    """Two infinite losses do not differ."""
    return 0.0 if after == before else after - before

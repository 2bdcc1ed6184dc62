"""The descent: bidirectional greedy search from above the budget until it is met.

The search of "Retraining-free Model Quantization via One-Shot Weight-Coupling Learning" (Tang et
al., CVPR 2024, arXiv:2401.01543, section 3.5). A round considers, for every choice, each option
just below and, where the choice was lowered before, each just above. It takes the move with the
lowest

    score = alpha * normalised loss increase - normalised cost saving

each normalised over the round's minimum and maximum, until the configuration fits.

The lazy form (Minoux 1978; Leskovec et al. 2007, "CELF") does not measure every move in every
round. Gains of earlier rounds serve as predictions. The move that looks best is measured anew, and
taken if it stays the best.

Departures from the paper: weights and activations share one pool of moves (weights first was worse
in every synthetic test); the minimum is subtracted in the normalisation; ups are held to a rule
that prevents cycles.

Termination. A down lowers the sum of all options' ranks, so between two ups there are finitely many
downs. An up is taken only into a point whose loss is strictly lower than that of every point passed
so far of at most its cost. A point already passed is itself one of these, and its loss is not lower
than itself: an up never returns to one. There are finitely many points, so finitely many ups, and
the descent ends, at the latest with every choice at its lowest. Where that does not fit (several
limits, costs that do not fall with bits), it ends at the cheapest configuration, which does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from anyprec.searching.algorithms.moves import Move, Walk
from anyprec.searching.algorithms.space import Point, dominates


def descend(walk: Walk, start: Point, *, lazy: bool, alpha: float = 1.5) -> Point:
    """Go down from `start` until the budget is met.

    Deterministic; ties go to the earlier choice.

    Args:
        walk: Measures.
        start: Where to start; it need not fit.
        lazy: Measure only the moves that look best.
        alpha: Weight of the loss against the cost in the score.

    Returns:
        A point that fits.
    """
    descent = _Descent(walk, start, lazy=lazy, alpha=alpha)
    while not walk.fits(descent.current):
        descent.go_on()
    walk.loss(descent.current)
    return descent.current


class _Descent:
    """The points passed so far, and what each uses of the budget."""

    def __init__(self, walk: Walk, start: Point, *, lazy: bool, alpha: float) -> None:
        self._walk = walk
        self._passed = {start: walk.utilisation(start)}
        self._start = self.current = start
        self._lazy = lazy
        self._alpha = alpha
        walk.loss(start)
        walk.set_anchor(start)
        if lazy:
            walk.measure(start, walk.downs(start))

    def go_on(self) -> None:
        """Take the round's best move."""
        self._walk.set_anchor(self.current)
        downs, ups = self._useful_downs(), self._undoing_ups()
        savings = {move: self._walk.saving(self.current, move) for move in (*downs, *ups)}
        if not self._lazy:
            self._walk.measure(self.current, [*downs, *ups])
        while True:
            # Once more after each measurement: an up may have lost its permission by it.
            moves = [*downs, *filter(self._is_permitted, ups)]
            if not moves:
                # The lowest options of arbitrary costs need not fit together.
                self._arrive(self._cheapest())
                return
            increases = [self._increase(move) for move in moves]
            scores = scored(increases, [savings[move] for move in moves], alpha=self._alpha)
            best = moves[scores.index(min(scores))]
            # Only a measured move is taken. Lazily, its prediction put it first, and the
            # measurement may show that another one is better.
            if self._walk.knows(best.apply(self.current)):
                self._arrive(best.apply(self.current))
                return
            self._walk.measure(self.current, [best])

    def _arrive(self, point: Point) -> None:
        self._passed[point] = self._walk.utilisation(point)
        self.current = point

    def _cheapest(self) -> Point:
        problem = self._walk.problem
        return problem.space.point(problem.cheapest) or self.current

    def _increase(self, move: Move) -> float:
        increase = self._walk.increase(self.current, move)
        # What nothing is known of is measured first.
        return -math.inf if increase is None else increase

    def _useful_downs(self) -> list[Move]:
        downs = self._walk.downs(self.current)
        # Under several limits a down may save nothing of the one that binds. Such downs are of use
        # only if there are no others.
        saving = [move for move in downs if self._walk.saving(self.current, move) > 0] or downs
        # After an up, the way back down is no use either.
        return [move for move in saving if move.apply(self.current) not in self._passed] or saving

    def _undoing_ups(self) -> list[Move]:
        """Ups of what was lowered since the start."""
        ups = []
        for move in self._walk.ups(self.current):
            options = self._walk.problem.space.options[move.choice]
            if dominates(options[self._start[move.choice]], options[move.after]):
                ups.append(move)
        return ups

    def _is_permitted(self, up: Move) -> bool:
        """Whether an up leads, or is predicted to lead, to a new lowest loss at its cost."""
        target = up.apply(self.current)
        cost = self._walk.utilisation(target)
        bound = math.inf
        for point, utilisation in self._passed.items():
            if utilisation <= cost:
                bound = min(bound, self._walk.loss(point))
        if self._walk.knows(target):
            # Not the sum below: by its rounding a point could come back, against the proof.
            return self._walk.loss(target) < bound
        return self._walk.loss(self.current) + self._increase(up) < bound


def scored(increases: Sequence[float], savings: Sequence[float], *, alpha: float) -> list[float]:
    """The trade of each move, lower is better."""
    pairs = zip(normalised(increases), normalised(savings), strict=True)
    return [alpha * increase - saving for increase, saving in pairs]


def normalised(values: Sequence[float]) -> list[float]:
    """Finite values between their minimum (0) and maximum (1); infinite ones stay."""
    # Halves, since the range of two large floats may overflow.
    halves = [value / 2 for value in values]
    finite = [half for half in halves if math.isfinite(half)]
    lowest = min(finite, default=0.0)
    width = max(finite, default=0.0) - lowest
    scaled = []
    for half in halves:
        if math.isinf(half):
            scaled.append(half)
        elif width > 0:
            scaled.append((half - lowest) / width)
        else:
            scaled.append(0.0)
    return scaled

"""The descent: bidirectional greedy search from above the budget until it is met.

The search of "Retraining-free Model Quantization via One-Shot Weight-Coupling Learning" (Tang et al., CVPR 2024,
arXiv:2401.01543, section 3.5). A round considers, for every choice, each option just below and, where the choice was
lowered before, each just above; it takes the move with the lowest

    score = alpha * normalised loss increase - normalised cost saving

each normalised over the round's minimum and maximum, until the configuration fits.

The lazy form (Minoux 1978; Leskovec et al. 2007, "CELF") does not measure every move in every round. Gains of earlier
rounds serve as predictions, the move that looks best is measured anew, and taken if it stays the best.

Departures from the paper: weights and activations share one pool of moves (weights first was worse in every synthetic
test); the minimum is subtracted in the normalisation; ups are held to a rule that prevents cycles.

Termination. A down lowers the sum of all options' ranks, so between two ups there are finitely many downs. An up is
taken only into a point whose loss is strictly lower than that of every point on the way so far of at most its cost. A
point already on the way is itself one of these, and its loss is not lower than itself: an up never returns to one. There
are finitely many points, so finitely many ups, and the descent ends, at the latest with every choice at its lowest. Where
that does not fit (several limits, costs that do not fall with bits), it ends at the cheapest configuration, which does.
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
    while not walk.fits(descent.way[-1]):
        descent.go_on()
    walk.loss(descent.way[-1])
    return descent.way[-1]


class _Descent:
    def __init__(self, walk: Walk, start: Point, *, lazy: bool, alpha: float) -> None:
        self.walk = walk
        self.way = [start]
        self._spent = [walk.utilisation(start)]
        self._lazy = lazy
        self._alpha = alpha
        walk.loss(start)
        walk.set_anchor(start)
        if lazy:
            walk.measure(start, walk.downs(start))

    def go_on(self) -> None:
        """Take the round's best move."""
        here = self.way[-1]
        self.walk.set_anchor(here)
        downs, ups = self._downs(here), self._undos(here)
        savings = {move: self.walk.saving(here, move) for move in (*downs, *ups)}
        if not self._lazy:
            self.walk.measure(here, [*downs, *ups])
        while True:
            moves = [*downs, *(move for move in ups if self._permitted(here, move))]
            if not moves:  # the lowest options of arbitrary costs need not fit together
                self._arrive(self.walk.problem.space.point(self.walk.problem.cheapest) or here)
                return
            increases = [self._increase(here, move) for move in moves]
            scores = scored(increases, [savings[move] for move in moves], alpha=self._alpha)
            best = moves[scores.index(min(scores))]
            if self.walk.knows(best.apply(here)):
                self._arrive(best.apply(here))
                return
            self.walk.measure(here, [best])

    def _arrive(self, point: Point) -> None:
        self.way.append(point)
        self._spent.append(self.walk.utilisation(point))

    def _increase(self, here: Point, move: Move) -> float:
        increase = self.walk.increase(here, move)
        # What nothing is known of is measured first.
        return -math.inf if increase is None else increase

    def _downs(self, here: Point) -> list[Move]:
        downs = self.walk.downs(here)
        # Under several limits a down may save nothing of the one that binds: no use, as long as another does.
        downs = [move for move in downs if self.walk.saving(here, move) > 0] or downs
        # After an up, the way back down is no use either.
        return [move for move in downs if move.apply(here) not in self.way] or downs

    def _undos(self, here: Point) -> list[Move]:
        """Ups of what was lowered since the start."""
        options, start = self.walk.problem.space.options, self.way[0]
        return [
            move
            for move in self.walk.ups(here)
            if dominates(options[move.choice][start[move.choice]], options[move.choice][move.after])
        ]

    def _permitted(self, here: Point, move: Move) -> bool:
        """Whether an up leads, or is predicted to lead, to a loss lower than any on the way at no more cost."""
        target = move.apply(here)
        cost = self.walk.utilisation(target)
        passed = zip(self.way, self._spent, strict=True)
        bound = min(
            (self.walk.loss(point) for point, spent in passed if spent <= cost), default=math.inf
        )
        if self.walk.knows(target):
            # Not the sum below: its rounding could let a point come back, against the proof of termination.
            return self.walk.loss(target) < bound
        return self.walk.loss(here) + self._increase(here, move) < bound


def scored(increases: Sequence[float], savings: Sequence[float], *, alpha: float) -> list[float]:
    """The trade of each move, lower is better."""
    pairs = zip(normalised(increases), normalised(savings), strict=True)
    return [alpha * increase - saving for increase, saving in pairs]


def normalised(values: Sequence[float]) -> list[float]:
    """Finite values between their minimum (0) and maximum (1); infinite ones stay."""
    # Halves, since the range of two large floats may overflow.
    halves = [value / 2 for value in values]
    finite = [half for half in halves if math.isfinite(half)]
    lowest, width = (min(finite), max(finite) - min(finite)) if finite else (0.0, 0.0)
    return [
        half if math.isinf(half) else (half - lowest) / width if width > 0 else 0.0
        for half in halves
    ]

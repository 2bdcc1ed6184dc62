"""Ours: integer programs on measurements in context, and improvement of what they propose.

*Leap*. At the cheapest uniform point that does not fit, every single move down is measured. If
losses added up, the best point of any budget would follow. The integer program proposes one near
the uniform points and one anywhere, since predictions get worse the further they reach.

*Improvement*, from a point that fits. An integer program over predicted changes of a few choices at
once, some up and some down, proposes the point of largest predicted gain that was not measured yet.
If its loss is lower, the search goes on from there; if not, the changes that it combined are
measured one by one, which corrects the predictions. It ends when nothing is predicted to gain and
all that could matter was measured, or after some turns without a gain.
"""

from __future__ import annotations

import itertools
import math
import operator
from typing import NamedTuple

from anyprec.searching.algorithms.moves import Move, Walk
from anyprec.searching.algorithms.space import Point

_REACHES = (1, 2, math.inf)
"""How many options of an operand a leap may go from the best uniform point."""

_CHANGES = 4
"""Most choices that change in one turn of the improvement."""

_POOL = 40
"""Most changes that cost, and as many that save, of which a turn combines some."""

_STEPS = 2
"""Most options that one choice may pass in one turn, up or down."""


def leap(walk: Walk, start: Point) -> None:
    """Measure single moves from `start`, and what the integer program makes of them."""
    walk.set_anchor(start)
    walk.measure(start, walk.downs(start))
    best = best_point(walk)
    for reach in _REACHES:
        target = _propose(walk, start, best, reach=reach)
        if target is not None:
            walk.loss(target)


def sketch(walk: Walk, start: Point) -> None:
    """Measure what the integer program proposes on what is known, from changes of `start`."""
    for config in walk.problem.full_space.equal_widths:
        walk.evaluations(config)
    if walk.evaluations.best(walk.problem.fits) is None:
        return
    target = _propose(walk, start, best_point(walk), reach=math.inf)
    if target is not None:
        walk.loss(target)


def improve(
    walk: Walk, start: Point | None = None, *, lazy: bool = True, patience: int = 24
) -> None:
    """Improve a point that fits, as far as predictions lead.

    Args:
        walk: Measures; at least one configuration that fits was measured before.
        start: Where to begin; None is the best point that fits.
        lazy: Measure single moves only where a prediction failed; otherwise all of them at every
            point.
        patience: Turns without a gain after which it ends.
    """
    current = best_point(walk) if start is None else start
    tried: set[Point] = set()
    turns, arrived = 0, True
    while turns < patience:
        if arrived:
            current, tried = _settle(walk, current)
            turns = 0
        evaluations_before = len(walk.evaluations)
        moves = [*walk.downs(current), *walk.ups(current)]
        if not lazy:
            walk.measure(current, moves)
        target = _exchange(walk, current, tried)
        turns += 1
        if target is not None:
            tried.add(target)
            _try_exchange(walk, current, target)
        else:
            move = _most_promising(walk, current, moves)
            if move is None:
                return
            walk.measure(current, [move])
        # Single moves count too: one that fits and gains is as good as an exchange.
        arrived = _has_gained(walk, current, evaluations_before)


def _try_exchange(walk: Walk, current: Point, target: Point) -> None:
    """Measure an exchange, and if it does not gain, what it is made of."""
    if walk.loss(target) >= walk.loss(current):
        moves = _single_moves(walk, current, target)
        walk.measure(current, [move for move in moves if not walk.knows(move.apply(current))])


def _has_gained(walk: Walk, current: Point, evaluations_before: int) -> bool:
    """Whether something that fits and is better than `current` was measured since."""
    for config, loss in itertools.islice(walk.evaluations.losses.items(), evaluations_before, None):
        if loss < walk.loss(current) and walk.problem.fits(config):
            return True
    return False


def best_point(walk: Walk) -> Point:
    """The best measured configuration that fits, as a point.

    A uniform configuration may hold options that cannot pay; what it becomes without them costs no
    more, and is measured.
    """
    problem = walk.problem
    best = walk.evaluations.best(problem.fits)
    if best is None:
        msg = "no configuration that fits was measured"
        raise AssertionError(msg)
    point = problem.space.point(best)
    if point is not None:
        return point
    lifted = problem.space.lift(best)
    if walk.fits(lifted):
        walk.loss(lifted)
        return lifted
    return problem.space.point(problem.cheapest) or problem.space.lowest


def _propose(walk: Walk, start: Point, middle: Point, *, reach: float) -> Point | None:
    """The best point that fits if changes from `start` added up, near `middle`."""
    table = []
    for number, choice in enumerate(walk.problem.space.choices):
        losses = [math.inf] * len(choice.options)
        for option in range(len(choice.options)):
            within_reach = choice.distance(middle[number], option) <= reach
            if within_reach or option == start[number]:
                losses[option] = _predicted_increase(walk, number, start[number], option)
        table.append(losses)
    return walk.allocate(table)


def _exchange(walk: Walk, current: Point, tried: set[Point]) -> Point | None:
    """The point of largest predicted gain over `current`; None if nothing is predicted to gain."""
    losses = []
    for number, choice in enumerate(walk.problem.space.choices):
        losses.append([math.inf] * len(choice.options))
        losses[number][current[number]] = 0.0
    for change in _promising_changes(walk, current):
        losses[change.choice][change.option] = change.increase
    target = walk.allocate(losses, near=(current, _CHANGES), excluded=tried)
    if target is None:
        return None
    increase = math.fsum(losses[number][option] for number, option in enumerate(target))
    return target if increase < 0 else None


class _Change(NamedTuple):
    choice: int
    option: int
    increase: float
    saving: float


def _promising_changes(walk: Walk, current: Point) -> list[_Change]:
    """The changes of one choice that are best at a common price of loss per cost.

    The program is small because of them: of all changes, only those can be part of a good exchange
    whose loss is low for what they save, or whose gain is high for what they cost.
    """
    changes = _possible_changes(walk, current)
    # The best gain per cost that is paid, and the least loss per cost that is saved. Between these
    # two prices an exchange pays.
    gains = [-change.increase / -change.saving for change in changes if change.saving < 0]
    losses = [change.increase / change.saving for change in changes if change.saving > 0]
    price = (max(gains, default=0.0) + min(losses, default=0.0)) / 2
    changes.sort(key=lambda change: change.increase - price * change.saving)
    costly = [change for change in changes if change.saving < 0]
    saving = [change for change in changes if change.saving >= 0]
    return costly[:_POOL] + saving[:_POOL]


def _possible_changes(walk: Walk, current: Point) -> list[_Change]:
    """Changes of one choice by a few options of which something is known."""
    changes = []
    for number, choice in enumerate(walk.problem.space.choices):
        for option in range(len(choice.options)):
            if option == current[number] or choice.distance(current[number], option) > _STEPS:
                continue
            increase = _predicted_increase(walk, number, current[number], option)
            if math.isfinite(increase):
                saving = walk.problem.saving(current, number, option)
                changes.append(_Change(number, option, increase, saving))
    return changes


def _settle(walk: Walk, point: Point) -> tuple[Point, set[Point]]:
    """Go to the measured point of lowest loss around `point`, from there again, and stay.

    Returns:
        The point, and the measured points that differ from it in a few choices: what an integer
        program need not propose.
    """
    while True:
        around = {
            measured
            for measured in walk.measured
            if sum(map(operator.ne, measured, point)) <= _CHANGES
        }
        better = min(filter(walk.fits, around), key=walk.loss, default=point)
        if walk.loss(better) >= walk.loss(point):
            walk.set_anchor(point)
            return point, around
        point = better


def _predicted_increase(walk: Walk, choice: int, before: int, after: int) -> float:
    """Predicted loss increase of a change; infinite where nothing is known."""
    if before == after:
        return 0.0
    options = walk.problem.space.options[choice]
    increase = walk.predictor.increase(choice, options[before], options[after])
    return math.inf if increase is None else increase


def _single_moves(walk: Walk, current: Point, target: Point) -> list[Move]:
    """The changes between two points, each by itself, also if it passes several options."""
    moves = []
    for number, choice in enumerate(walk.problem.space.choices):
        before, after = current[number], target[number]
        if before != after:
            moves.append(Move(number, before, after, lowers=after in choice.below[before]))
    return moves


def _most_promising(walk: Walk, current: Point, moves: list[Move]) -> Move | None:
    """The move to measure next: one of which nothing is known, or that is predicted to trade best.

    None if every move that could be part of an exchange was measured here.
    """
    downs: list[tuple[float, Move]] = []
    ups: list[tuple[float, Move]] = []
    for move in moves:
        if walk.knows(move.apply(current)):
            continue
        saving = walk.saving(current, move)
        # A down must save something to pay for an up.
        if move.lowers and saving <= 0:
            continue
        increase = walk.increase(current, move)
        if increase is None:
            return move
        if move.lowers:
            downs.append((increase / saving, move))
        elif saving < 0:  # an up that costs nothing fits alone, and was proposed before
            ups.append((increase / -saving, move))
    # The cheapest down and the most gainful up decide whether an exchange pays.
    for rated in (downs, ups):
        if rated:
            return min(rated, key=operator.itemgetter(0))[1]
    return None

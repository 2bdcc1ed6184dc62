"""Ours: integer programs on measurements in context, and improvement of what they propose.

*Leap*. At the cheapest uniform point that does not fit, every single move down is measured. If losses added up, the best
point of any budget would follow; the integer program proposes one near the uniform points and one anywhere, since
predictions get worse the further they reach.

*Improvement*, from a point that fits. An integer program over predicted changes of a few choices at once, some up and
some down, proposes the point of largest predicted gain that was not measured yet. If its loss is lower, the search goes
on from there; if not, the changes that it combined are measured one by one, which corrects the predictions. It ends when
nothing is predicted to gain and all that could matter was measured, or after some turns without a gain.
"""

from __future__ import annotations

import itertools
import math
import operator

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
        target = _program(walk, start, best, reach=reach)
        if target is not None:
            walk.loss(target)


def sketch(walk: Walk, start: Point) -> None:
    """Measure what the integer program proposes on what is known already, from changes of `start`."""
    for config in walk.problem.everything.equal_widths:
        walk.evaluations(config)
    if walk.evaluations.best(walk.problem.fits) is None:
        return
    target = _program(walk, start, best_point(walk), reach=math.inf)
    if target is not None:
        walk.loss(target)


def improve(
    walk: Walk, start: Point | None = None, *, lazy: bool = True, patience: int = 24
) -> None:
    """Improve a point that fits, as far as predictions lead.

    Args:
        walk: Measures; at least one configuration that fits was measured before.
        start: Where to begin; None is the best point that fits.
        lazy: Measure single moves only where a prediction failed; otherwise all of them at every point.
        patience: Turns without a gain after which it ends.
    """
    here, turns, tried = best_point(walk) if start is None else start, 0, set[Point]()
    arrived = True
    while turns < patience:
        if arrived:
            here, tried = _best_around(walk, here)
            walk.set_anchor(here)
            turns = 0
        before = len(walk.evaluations)
        moves = [*walk.downs(here), *walk.ups(here)]
        if not lazy:
            walk.measure(here, moves)
        target = _exchange(walk, here, tried)
        turns += 1
        if target is None:
            unknown = _most_promising(walk, here, moves)
            if unknown is None:
                return
            walk.measure(here, [unknown])
        else:
            tried.add(target)
            if walk.loss(target) >= walk.loss(here):
                walk.measure(
                    here,
                    [
                        move
                        for move in _single_moves(walk, here, target)
                        if not walk.knows(move.apply(here))
                    ],
                )
        new = itertools.islice(walk.evaluations.losses.items(), before, None)
        arrived = any(loss < walk.loss(here) and walk.problem.fits(config) for config, loss in new)


def best_point(walk: Walk) -> Point:
    """The best measured configuration that fits, as a point.

    A uniform configuration may hold options that cannot pay; what it becomes without them costs no more, and is measured.
    """
    problem = walk.problem
    best = walk.evaluations.best(problem.fits)
    if best is None:
        msg = "no configuration that fits was measured"
        raise AssertionError(msg)
    found = problem.space.point(best)
    if found is not None:
        return found
    lifted = problem.space.lift(best)
    if walk.fits(lifted):
        walk.loss(lifted)
        return lifted
    return problem.space.point(problem.cheapest) or problem.space.lowest


def _program(walk: Walk, start: Point, middle: Point, *, reach: float) -> Point | None:
    """The best point that fits if changes from `start` added up, near `middle`."""
    losses = [
        [
            _change(walk, number, start[number], option)
            if choice.distance(middle[number], option) <= reach or option == start[number]
            else math.inf
            for option in range(len(choice.options))
        ]
        for number, choice in enumerate(walk.problem.space.choices)
    ]
    return walk.allocate(losses)


def _exchange(walk: Walk, here: Point, tried: set[Point]) -> Point | None:
    """The point with the largest predicted gain over `here`; None if nothing is predicted to gain."""
    losses = [
        [0.0 if option == here[number] else math.inf for option in range(len(choice.options))]
        for number, choice in enumerate(walk.problem.space.choices)
    ]
    for number, option, increase in _promising(walk, here):
        losses[number][option] = increase
    target = walk.allocate(losses, near=(here, _CHANGES), excluded=tried)
    if (
        target is None
        or math.fsum(losses[number][option] for number, option in enumerate(target)) >= 0
    ):
        return None
    return target


def _promising(walk: Walk, here: Point) -> list[tuple[int, int, float]]:
    """The changes of one choice that are best at a common price of loss per cost: as (choice, option, increase)."""
    changes = []
    for number, choice in enumerate(walk.problem.space.choices):
        for option in range(len(choice.options)):
            if option != here[number] and choice.distance(here[number], option) <= _STEPS:
                increase = _change(walk, number, here[number], option)
                if math.isfinite(increase):
                    changes.append(
                        (number, option, increase, walk.problem.saving(here, number, option))
                    )
    gain = max((-increase / -saving for *_, increase, saving in changes if saving < 0), default=0.0)
    pain = min((increase / saving for *_, increase, saving in changes if saving > 0), default=0.0)
    price = (gain + pain) / 2
    changes.sort(key=lambda change: change[2] - price * change[3])
    costly = [change[:3] for change in changes if change[3] < 0]
    saving = [change[:3] for change in changes if change[3] >= 0]
    return costly[:_POOL] + saving[:_POOL]


def _best_around(walk: Walk, here: Point) -> tuple[Point, set[Point]]:
    """The measured point of lowest loss that fits, among those that differ in a few choices; from there again.

    With the measured points that differ from it in a few choices.
    """
    while True:
        around = _known_around(walk, here)
        better = min(filter(walk.fits, around), key=walk.loss, default=here)
        if walk.loss(better) >= walk.loss(here):
            return here, around
        here = better


def _known_around(walk: Walk, here: Point) -> set[Point]:
    """Measured points that the integer program could propose."""
    return {p for p in walk.measured if sum(map(operator.ne, p, here)) <= _CHANGES}


def _change(walk: Walk, choice: int, before: int, after: int) -> float:
    """Predicted loss increase; infinite where nothing is known."""
    if before == after:
        return 0.0
    options = walk.problem.space.options[choice]
    increase = walk.predictor.increase(choice, options[before], options[after])
    return math.inf if increase is None else increase


def _single_moves(walk: Walk, here: Point, target: Point) -> list[Move]:
    """The changes between two points, each by itself; those of both operands, or of several options, as they are."""
    return [
        Move(
            number, before, after, lowers=after in walk.problem.space.choices[number].below[before]
        )
        for number, (before, after) in enumerate(zip(here, target, strict=True))
        if before != after
    ]


def _most_promising(walk: Walk, here: Point, moves: list[Move]) -> Move | None:
    """The move that was not measured here and is predicted to be the best trade, or of which nothing is known."""
    open_moves = [move for move in moves if not walk.knows(move.apply(here))]
    # An up alone that fits was proposed before; a down must save something to pay for an up.
    open_moves = [move for move in open_moves if not move.lowers or walk.saving(here, move) > 0]
    known = [(walk.increase(here, move), move) for move in open_moves]
    unknown = [move for increase, move in known if increase is None]
    if unknown:
        return unknown[0]
    rated = [
        (increase, move, walk.saving(here, move))
        for increase, move in known
        if increase is not None
    ]
    downs = [(increase / saving, move) for increase, move, saving in rated if move.lowers]
    ups = [
        (increase / -saving, move)
        for increase, move, saving in rated
        if not move.lowers and saving < 0
    ]
    # The cheapest down and the most gainful up decide whether an exchange pays.
    best = [min(group, key=lambda entry: entry[0]) for group in (downs, ups) if group]
    return best[0][1] if best else None

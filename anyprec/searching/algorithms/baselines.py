"""What a search is compared with: random search, an evolutionary algorithm, and an integer program on one sensitivity table."""

from __future__ import annotations

import math
import random

from anyprec.searching.algorithms.moves import Walk
from anyprec.searching.algorithms.space import Point

_POPULATION = 24
_PARENTS = 8
_TOURNAMENT = 3
_MUTATION = 0.1
"""Share of choices that a mutation changes."""


def search_randomly(walk: Walk, *, seed: int, evaluations: int) -> None:
    """Measure random points close below the budget."""
    draw = random.Random(seed)
    for _ in range(evaluations):
        walk.loss(_random_point(walk, draw))


def evolve(walk: Walk, *, seed: int, evaluations: int) -> None:
    """An evolutionary algorithm with tournaments, uniform crossover and mutation, as in "Single Path One-Shot" (Guo 2020).

    It starts from random points and the uniform configurations that were measured before.
    """
    draw = random.Random(seed)
    space = walk.problem.space
    uniform = [
        point
        for config in walk.problem.fitting_uniform
        if (point := space.point(config)) is not None
    ]
    population = [*uniform[:_PARENTS]]
    while len(population) < _POPULATION:
        population.append(_random_point(walk, draw))
    asked = len(walk.evaluations) + evaluations
    attempts = 0
    for point in population:
        walk.loss(point)
    while len(walk.evaluations) < asked and attempts < 20 * evaluations:
        attempts += 1
        population = sorted(dict.fromkeys(population), key=walk.loss)[:_POPULATION]
        mother, father = (_tournament(walk, population, draw) for _ in range(2))
        child = tuple(draw.choice(genes) for genes in zip(mother, father, strict=True))
        child = _toward_budget(walk, _mutated(walk, child, draw), draw)
        if not walk.knows(child):
            walk.loss(child)
            population.append(child)


def program_on_sensitivities(walk: Walk) -> None:
    """Measure every option of every choice with all others at their highest, and solve the integer program once."""
    space = walk.problem.space
    highest = space.highest
    walk.set_anchor(highest)
    base = walk.loss(highest)
    losses = [
        [
            0.0
            if option == highest[number]
            else walk.loss((*highest[:number], option, *highest[number + 1 :])) - base
            for option in range(len(choice.options))
        ]
        for number, choice in enumerate(space.choices)
    ]
    target = walk.allocate(losses)
    if target is not None:
        walk.loss(target)


def _random_point(walk: Walk, draw: random.Random) -> Point:
    point = tuple(draw.randrange(len(choice.options)) for choice in walk.problem.space.choices)
    return _toward_budget(walk, point, draw)


def _toward_budget(walk: Walk, point: Point, draw: random.Random) -> Point:
    """Random downs until the point fits, or random ups as long as it does."""
    while not walk.fits(point):
        downs = walk.downs(point)
        if not downs:
            break
        point = draw.choice(downs).apply(point)
    for _ in range(2 * len(point)):
        ups = walk.ups(point)
        if not ups:
            break
        raised = draw.choice(ups).apply(point)
        point = raised if walk.fits(raised) else point
    return point


def _mutated(walk: Walk, point: Point, draw: random.Random) -> Point:
    choices = walk.problem.space.choices
    count = max(1, math.ceil(_MUTATION * len(point)))
    changed = dict.fromkeys(draw.sample(range(len(point)), count))
    return tuple(
        draw.randrange(len(choices[number].options)) if number in changed else option
        for number, option in enumerate(point)
    )


def _tournament(walk: Walk, population: list[Point], draw: random.Random) -> Point:
    return min(draw.sample(population, min(_TOURNAMENT, len(population))), key=walk.loss)

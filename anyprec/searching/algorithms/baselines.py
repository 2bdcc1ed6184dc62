"""What a search is compared with.

Random search, an evolutionary algorithm, and an integer program on one sensitivity table.
"""

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
    """An evolutionary algorithm with tournaments, uniform crossover and mutation.

    As in "Single Path One-Shot" (Guo et al., ECCV 2020). It starts from random points and the
    uniform configurations that were measured before.
    """
    draw = random.Random(seed)
    population = _first_generation(walk, draw)
    last = len(walk.evaluations) + evaluations
    for point in population:
        walk.loss(point)
    # A small space is soon exhausted: then no child is new, however many are drawn.
    for _ in range(20 * evaluations):
        if len(walk.evaluations) >= last:
            break
        population = sorted(dict.fromkeys(population), key=walk.loss)[:_POPULATION]
        child = _child(walk, population, draw)
        if not walk.knows(child):
            walk.loss(child)
            population.append(child)


def _first_generation(walk: Walk, draw: random.Random) -> list[Point]:
    population: list[Point] = []
    for config in walk.problem.fitting_uniform:
        point = walk.problem.space.point(config)
        if point is not None and len(population) < _PARENTS:
            population.append(point)
    while len(population) < _POPULATION:
        population.append(_random_point(walk, draw))
    return population


def _child(walk: Walk, population: list[Point], draw: random.Random) -> Point:
    mother = _tournament(walk, population, draw)
    father = _tournament(walk, population, draw)
    child = tuple(draw.choice(genes) for genes in zip(mother, father, strict=True))
    return _toward_budget(walk, _mutated(walk, child, draw), draw)


def program_on_sensitivities(walk: Walk) -> None:
    """Measure every option of every choice, all others highest, and solve the program once."""
    space = walk.problem.space
    highest = space.highest
    walk.set_anchor(highest)
    base = walk.loss(highest)
    table = []
    for number, choice in enumerate(space.choices):
        losses = [0.0] * len(choice.options)
        for option in range(len(choice.options)):
            if option != highest[number]:
                changed = (*highest[:number], option, *highest[number + 1 :])
                losses[option] = walk.loss(changed) - base
        table.append(losses)
    target = walk.allocate(table)
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
        if walk.fits(raised):
            point = raised
    return point


def _mutated(walk: Walk, point: Point, draw: random.Random) -> Point:
    count = max(1, math.ceil(_MUTATION * len(point)))
    mutated = list(point)
    for number in sorted(draw.sample(range(len(point)), count)):
        mutated[number] = draw.randrange(len(walk.problem.space.choices[number].options))
    return tuple(mutated)


def _tournament(walk: Walk, population: list[Point], draw: random.Random) -> Point:
    return min(draw.sample(population, min(_TOURNAMENT, len(population))), key=walk.loss)

"""The algorithms by name, each for one budget. They share a record of evaluations, and a predictor.

Searches of several budgets are in `question.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from anyprec.errors import SearchError
from anyprec.searching.algorithms.baselines import evolve, program_on_sensitivities, search_randomly
from anyprec.searching.algorithms.greedy import descend
from anyprec.searching.algorithms.improvement import improve, leap
from anyprec.searching.algorithms.moves import Walk
from anyprec.searching.algorithms.space import Point


@dataclass(frozen=True)
class Settings:
    """What an algorithm may be told.

    Attributes:
        alpha: Weight of the loss against the cost in the score of a greedy move.
        seed: Of random search and evolution.
        evaluations: Evaluations of random search and evolution, for each budget.
        patience: Turns of improvement without a gain.
    """

    alpha: float = 1.5
    seed: int = 0
    evaluations: int = 500
    patience: int = 24


def run_algorithm(name: str, walk: Walk, settings: Settings) -> None:
    """Search below one budget. What is measured stands in the walk's evaluations.

    Uniform configurations that fit are measured first, so that the result is never worse.

    Raises:
        SearchError: There is no such algorithm.
        Stopped: The evaluations or the time are used up.
    """
    require_algorithm(name)
    for config in walk.problem.fitting_uniform:
        walk.evaluations(config)
    if not walk.problem.fitting_uniform:
        # Costs of any table: something that fits is known from the beginning.
        walk.evaluations(walk.problem.cheapest)
    start = walk.problem.start
    if start is None:
        walk.loss(walk.problem.space.highest)
    else:
        _ALGORITHMS[name](walk, start, settings)


def require_algorithm(name: str) -> None:
    """Refuse a name that no algorithm has.

    Raises:
        SearchError: There is no such algorithm.
    """
    if name not in _ALGORITHMS:
        msg = f"algorithm {name!r} is unknown: use one of {ALGORITHMS}"
        raise SearchError(msg)


def _combined(walk: Walk, start: Point, settings: Settings) -> None:
    leap(walk, start)
    _lazy(walk, start, settings)


def _lazy(walk: Walk, start: Point, settings: Settings) -> None:
    end = descend(walk, start, lazy=True, alpha=settings.alpha)
    _improve_both(walk, end, settings)


def _greedy(walk: Walk, start: Point, settings: Settings) -> None:
    end = descend(walk, start, lazy=False, alpha=settings.alpha)
    _improve_both(walk, end, settings, lazy=False)


def _improve_both(walk: Walk, end: Point, settings: Settings, *, lazy: bool = True) -> None:
    """Improve where a descent ended, and then the best.

    Uniform configurations may be better than the end of a descent, and are harder to leave.
    """
    improve(walk, end, lazy=lazy, patience=settings.patience)
    improve(walk, lazy=lazy, patience=settings.patience)


def _program(walk: Walk, _start: Point, _settings: Settings) -> None:
    program_on_sensitivities(walk)


def _evolution(walk: Walk, _start: Point, settings: Settings) -> None:
    evolve(walk, seed=settings.seed, evaluations=settings.evaluations)


def _random(walk: Walk, _start: Point, settings: Settings) -> None:
    search_randomly(walk, seed=settings.seed, evaluations=settings.evaluations)


_ALGORITHMS: dict[str, Callable[[Walk, Point, Settings], None]] = {
    "combined": _combined,
    "lazy": _lazy,
    "greedy": _greedy,
    "program": _program,
    "evolution": _evolution,
    "random": _random,
}

ALGORITHMS = tuple(_ALGORITHMS)
"""Names of the algorithms, the default first."""

"""The algorithms by name, each for one budget. They share a record of evaluations, and a predictor.

Searches of several budgets are in `question.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from anyprec.bits import BitConfig, shorten
from anyprec.errors import SearchError
from anyprec.searching.algorithms.baselines import evolve, program_on_sensitivities, search_randomly
from anyprec.searching.algorithms.evaluations import Evaluations
from anyprec.searching.algorithms.greedy import descend
from anyprec.searching.algorithms.improvement import improve, leap
from anyprec.searching.algorithms.moves import Walk
from anyprec.searching.algorithms.problem import Problem
from anyprec.searching.algorithms.space import Point


@dataclass(frozen=True)
class Settings:
    """What an algorithm may be told.

    Attributes:
        alpha: Weight of the loss against the cost in the score of a greedy move.
        seed: Of random search and evolution.
        evaluations: Evaluations of random search and evolution, for each budget.
        patience: Turns of improvement without a gain.

    Raises:
        SearchError: `alpha` is not positive, or not finite.
    """

    alpha: float = 1.5
    seed: int = 0
    evaluations: int = 500
    patience: int = 24

    def __post_init__(self) -> None:
        if not 0 < self.alpha < math.inf:
            msg = f"alpha={self.alpha!r} is not a weight of the loss: "
            msg += "use a positive finite number, e.g. 1.5"
            raise SearchError(msg)


def run_algorithm(name: str, walk: Walk, settings: Settings) -> None:
    """Search below one budget. What is measured stands in the walk's evaluations.

    Uniform configurations that fit are measured first, so that the result is never worse.

    Raises:
        Stopped: The evaluations or the time are used up.
        SearchError: Nothing has a finite loss, not even the highest precision.
    """
    for config in walk.problem.fitting_uniform:
        walk.evaluations(config)
    if not walk.problem.fitting_uniform:
        # Costs of any table: something that fits is known from the beginning.
        walk.evaluations(walk.problem.cheapest)
    _require_any_usable(walk)
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


def nothing_usable(evaluations: Evaluations, problem: Problem) -> SearchError:
    """Why no configuration that fits a budget can be chosen: none has a finite loss."""
    fitting = sum(map(problem.fits, evaluations.losses))
    highest = problem.space.config(problem.space.highest)
    msg = f"no configuration that fits {problem.budget} has a finite score, of {fitting} that were "
    msg += "evaluated"
    if evaluations.first_unusable is not None:
        config, loss = evaluations.first_unusable
        msg += f"; the first one is {_shown(config)} with the score {loss}"
    if math.isfinite(evaluations.losses.get(highest, math.inf)):
        msg += ". Higher precisions have one, so allow a larger budget, or train or calibrate the "
        msg += "network for low ones"
    else:
        msg += ". Check whether the network's output is finite (at model.set_bits(None), too), the "
        msg += "images and their normalisation, norm statistics (anyprec.update_norms), and the "
        msg += "objective if it is a function of yours"
    return SearchError(msg)


def _require_any_usable(walk: Walk) -> None:
    """Without a finite loss so far, the highest precision shows whether there can be any."""
    if any(map(math.isfinite, walk.evaluations.losses.values())):
        return
    if math.isinf(walk.loss(walk.problem.space.highest)):
        raise nothing_usable(walk.evaluations, walk.problem)


def _shown(config: BitConfig) -> str:
    """The one precision of a uniform configuration, or the first layers of another one."""
    precisions = set(config.values())
    if len(precisions) == 1:
        return f"{precisions.pop()} everywhere"
    return shorten([f"{path}: {bits}" for path, bits in config.items()], 3)


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

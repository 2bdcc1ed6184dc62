"""One search algorithm below one budget, as `anyprec.search` runs it, with what it did on the way.

Only this file imports what is private to `anyprec.searching`.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import anyprec
from anyprec.model.cost import cost_model
from anyprec.runtime.modes import evaluating
from anyprec.searching.algorithms.evaluations import Evaluations
from anyprec.searching.algorithms.moves import Move, Walk
from anyprec.searching.algorithms.predictor import Predictor
from anyprec.searching.algorithms.problem import Problem
from anyprec.searching.algorithms.registry import Settings, run_algorithm
from anyprec.searching.algorithms.space import Point, make_space
from anyprec.searching.budget.budgets import parse_budget
from anyprec.searching.budget.costs import search_costs
from anyprec.searching.measuring.evaluator import Evaluator
from benchmarks.study.runs import Batches

Norms = Literal["stored", "batch"]


@dataclass(frozen=True)
class Outcome:
    """What a search measured.

    Attributes:
        config: The best configuration that fits.
        score: Its divergence.
        utilisation: Share of the budget that it uses.
        uniform: The best uniform configuration that fits.
        uniform_score: Its divergence.
        trace: After how many evaluations the best became better, and how good it was.
        evaluations: Configurations that were measured.
        asked: Moves that the algorithm asked for: without a memo each would be a forward pass.
        layer_runs: Layer executions.
        seconds: That it took.
    """

    config: anyprec.BitConfig
    score: float
    utilisation: float
    uniform: anyprec.BitConfig
    uniform_score: float
    trace: list[list[float]]
    evaluations: int
    asked: int
    layer_runs: int
    seconds: float


def search_once(
    model: anyprec.ConvertedModel,
    batches: Batches,
    *,
    algorithm: str,
    budget: str,
    norms: Norms = "stored",
    seed: int = 0,
    evaluations: int | None = None,
) -> Outcome:
    """Search below one budget.

    Args:
        model: Is searched.
        batches: To search on.
        algorithm: As `anyprec.search` names it.
        budget: As text, e.g. "W4A4".
        norms: The statistics that it judges by.
        seed: Of what evolution and random search draw.
        evaluations: At most so many by these two; the default is that of `anyprec.search`.
    """
    settings = Settings(seed=seed)
    if evaluations is not None:
        settings = dataclasses.replace(settings, evaluations=evaluations)
    priced = search_costs(cost_model(model), None)
    space = make_space(model.current_candidates)
    problem = Problem(space, parse_budget(budget, priced), priced)
    start = time.perf_counter()
    with evaluating(model), model.using_bits(model.bits):
        evaluator = Evaluator(model, batches, "divergence", norms=norms)
        walk = _CountingWalk(problem, Evaluations(evaluator), Predictor(space))
        run_algorithm(algorithm, walk, settings)
    seconds = time.perf_counter() - start
    losses = walk.evaluations.losses
    config = walk.evaluations.best(problem.fits)
    assert config is not None
    # Every algorithm measures the uniform configurations that fit before anything else.
    uniform = min(problem.fitting_uniform, key=losses.__getitem__)
    return Outcome(
        config=config,
        score=losses[config],
        utilisation=problem.utilisation(config),
        uniform=uniform,
        uniform_score=losses[uniform],
        trace=_trace(walk),
        evaluations=len(losses),
        asked=walk.asked,
        layer_runs=evaluator.layer_runs,
        seconds=round(seconds, 1),
    )


class _CountingWalk(Walk):
    """Counts the moves that an algorithm asks for."""

    asked = 0

    def measure(self, point: Point, moves: Iterable[Move]) -> None:
        """See `Walk`."""
        listed = list(moves)
        self.asked += len(listed)
        super().measure(point, listed)


def _trace(walk: Walk) -> list[list[float]]:
    trace, best = [], math.inf
    for count, (config, loss) in enumerate(walk.evaluations.losses.items(), 1):
        if loss < best and walk.problem.fits(config):
            best = loss
            trace.append([count, loss])
    return trace


def divergences(
    model: anyprec.ConvertedModel,
    batches: Batches,
    configs: Iterable[anyprec.BitConfig],
    norms: Norms,
) -> dict[anyprec.BitConfig, float]:
    """The divergence of configurations from the float network."""
    with evaluating(model), model.using_bits(model.bits):
        evaluator = Evaluator(model, batches, "divergence", norms=norms, reuse=False)
        return {config: evaluator(config) for config in dict.fromkeys(configs)}

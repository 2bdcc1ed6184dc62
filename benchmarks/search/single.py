"""One search algorithm below one budget, as `anyprec.search` runs it, with what it did on the way.

Only this file knows how `anyprec.search` is put together.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import anyprec
from anyprec.model.costing import cost_model
from anyprec.runtime.modes import evaluating
from anyprec.searching.algorithms import Answer, Question, Settings, make_space, run_search
from anyprec.searching.budget import parse_budgets
from anyprec.searching.measuring.evaluator import Evaluator
from benchmarks.study.runs import Batches

SearchNorms = Literal["stored", "batch"]


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
    norms: SearchNorms = "stored",
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
    costs = cost_model(model)
    question = Question(
        space=make_space(model.current_candidates),
        costs=costs,
        budgets=parse_budgets(budget, costs),
        algorithm=algorithm,
        settings=settings,
        whole_frontier=False,
    )
    start = time.perf_counter()
    with evaluating(model), model.using_bits(model.bits):
        evaluator = Evaluator(model, batches, "divergence", norms=norms)
        answer = run_search(question, evaluator, set_anchor=evaluator.set_anchor)
    seconds = time.perf_counter() - start
    if answer.stopped != "finished":
        raise KeyboardInterrupt
    assert answer.best is not None
    # Every algorithm measures the uniform configurations that fit before anything else.
    uniform = min(answer.problem.fitting_uniform, key=answer.losses.__getitem__)
    return Outcome(
        config=answer.best,
        score=answer.losses[answer.best],
        utilisation=answer.problem.utilisation(answer.best),
        uniform=uniform,
        uniform_score=answer.losses[uniform],
        trace=_trace(answer),
        evaluations=len(answer.losses),
        asked=answer.moves_asked,
        layer_runs=evaluator.layer_runs,
        seconds=round(seconds, 1),
    )


def _trace(answer: Answer) -> list[list[float]]:
    trace, best = [], math.inf
    for count, (config, loss) in enumerate(answer.losses.items(), 1):
        if loss < best and answer.problem.fits(config):
            best = loss
            trace.append([count, loss])
    return trace


def divergences(
    model: anyprec.ConvertedModel,
    batches: Batches,
    configs: Iterable[anyprec.BitConfig],
    norms: SearchNorms,
) -> dict[anyprec.BitConfig, float]:
    """The divergence of configurations from the float network."""
    with evaluating(model), model.using_bits(model.bits):
        evaluator = Evaluator(model, batches, "divergence", norms=norms, reuse=False)
        return {config: evaluator(config) for config in dict.fromkeys(configs)}

"""A search in plain numbers: one value for the question, one function that answers it.

`run_search` needs a function from configuration to number, whatever stands behind it. So a search
of a network, a benchmark and a test on made-up numbers run the very same code. What is below one
budget is in `registry.py`; networks, files and progress bars are in `anyprec.searching.search`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from anyprec.bits import BitConfig
from anyprec.errors import SearchError
from anyprec.model.cost import CostModel
from anyprec.searching.algorithms.evaluations import Evaluate, Evaluations, Stopped
from anyprec.searching.algorithms.improvement import sketch
from anyprec.searching.algorithms.moves import Walk
from anyprec.searching.algorithms.predictor import Predictor
from anyprec.searching.algorithms.problem import Problem
from anyprec.searching.algorithms.registry import (
    Settings,
    nothing_usable,
    require_algorithm,
    run_algorithm,
)
from anyprec.searching.algorithms.space import Space
from anyprec.searching.budget.budgets import Budget

_BETWEEN = 2
"""Budgets of a range per step from one uniform configuration to the next, its end included."""

_PATIENCE_OF_RANGE = 12
"""Turns without a gain at each budget of a range: what one budget misses, its neighbours find.
Measured as good as 24."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is searched, and how long.

    Attributes:
        space: What may be chosen; see `make_space`.
        costs: What configurations cost.
        budgets: Limits, each searched; the first is the result's. None at all is the whole range
            of BitOPs.
        algorithm: One of `ALGORITHMS`.
        settings: What the algorithm is told.
        max_evaluations: Stop after so many evaluations.
        max_seconds: Stop after so long.
        whole_frontier: After the budgets, measure also what the default algorithm proposes for the
            rest of the range: a few evaluations that make a frontier.

    Raises:
        BudgetError: Nothing fits a budget.
        SearchError: An unknown algorithm, or a number that cannot be used.
    """

    space: Space
    costs: CostModel
    budgets: tuple[Budget, ...] = ()
    algorithm: str = "combined"
    settings: Settings = field(default_factory=Settings)
    max_evaluations: int | None = None
    max_seconds: float | None = None
    whole_frontier: bool = True

    def __post_init__(self) -> None:
        """Check all but the costs, which are checked where they are read."""
        require_algorithm(self.algorithm)
        _require_positive("max_evaluations", self.max_evaluations)
        _require_positive("max_seconds", self.max_seconds)
        first = self.problems[0]
        if self.max_evaluations is not None:
            _require_enough(self.max_evaluations, first)

    @cached_property
    def problems(self) -> tuple[Problem, ...]:
        """The problem of each budget, in order."""
        budgets = self.budgets or _budgets_of_range(self.space, "bitops", self.costs)
        return tuple(Problem(self.space, budget, self.costs) for budget in budgets)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a search found.

    Attributes:
        problem: The problem of the first budget.
        losses: Every evaluated configuration with its loss, in order.
        best: The configuration of lowest loss that fits the first budget; None if none was
            measured before the search was stopped.
        stopped: `"finished"`, `"max_evaluations"`, `"max_seconds"` or `"interrupted"`.
        moves_asked: Single moves that were asked for, those with a known loss included.
    """

    problem: Problem
    losses: Mapping[BitConfig, float]
    best: BitConfig | None
    stopped: str
    moves_asked: int


def run_search(
    question: Question,
    evaluate: Evaluate,
    *,
    set_anchor: Callable[[BitConfig], None] | None = None,
    remembered: Mapping[BitConfig, float] | None = None,
    interrupted: Callable[[], bool] = bool,
    agree: Callable[[str], str] = str,
    on_evaluation: Callable[[BitConfig, float, bool], None] | None = None,
) -> Answer:
    """Search below every budget of a question.

    A `KeyboardInterrupt` of `evaluate` ends the search as a limit does. A loss that is not finite
    is worse than any other and never the answer.

    Args:
        question: What is searched.
        evaluate: The loss of a configuration, lower is better; called once for each.
        set_anchor: Called with a configuration from which those that follow will differ little.
        remembered: Losses measured before; see `Evaluations`.
        interrupted: Tells whether someone asked for the end.
        agree: Makes several processes agree on the reason to stop.
        on_evaluation: Called with each configuration, its loss, and whether it was measured now.

    Raises:
        SearchError: No configuration that fits has a finite loss; if the highest precision has none
            either, that is found after the uniform configurations.

    Example:
        >>> from anyprec.bits import LayerCandidates
        >>> from anyprec.model.cost import LayerCost
        >>> from anyprec.searching.algorithms.constraints import make_space
        >>> candidates = {"fc": LayerCandidates((2, 4, 8), (4, 8))}
        >>> costs = CostModel({"fc": LayerCost("fc", macs=10, weights=10)}, candidates)
        >>> question = Question(
        ...     space=make_space(candidates), costs=costs, budgets=(Budget(bitops=170),)
        ... )
        >>> answer = run_search(question, lambda config: 1 / config["fc"].weight)
        >>> str(answer.best["fc"])
        'W4A4'
    """
    evaluations = Evaluations(
        evaluate,
        set_anchor=set_anchor,
        remembered=remembered,
        max_evaluations=question.max_evaluations,
        max_seconds=question.max_seconds,
        interrupted=interrupted,
        agree=agree,
        on_evaluation=on_evaluation,
    )
    run = _Run(question, evaluations)
    stopped = "finished"
    try:
        run.search_budgets()
        if question.budgets and question.whole_frontier and question.algorithm == "combined":
            run.sketch_range()
    except Stopped as stop:
        stopped = stop.reason
    except KeyboardInterrupt:
        stopped = "interrupted"
    problem = question.problems[0]
    best = evaluations.best(problem.fits)
    if best is not None and math.isinf(evaluations(best)):
        if stopped != "interrupted":
            raise nothing_usable(evaluations, problem)
        best = None
    return Answer(
        problem=problem,
        losses=evaluations.losses,
        best=best,
        stopped=stopped,
        moves_asked=run.moves_asked,
    )


class _Run:
    """One run of a search: its walks, one after the other, and what they share."""

    def __init__(self, question: Question, evaluations: Evaluations) -> None:
        self._question = question
        self._evaluations = evaluations
        # Budgets that leave the same options to choose from share what was learned.
        self._predictors: dict[Space, Predictor] = {}
        self._walks: list[Walk] = []

    @property
    def moves_asked(self) -> int:
        return sum(walk.moves_asked for walk in self._walks)

    def search_budgets(self) -> None:
        question = self._question
        settings = question.settings
        if not question.budgets:
            settings = replace(settings, patience=_PATIENCE_OF_RANGE)
        if question.max_evaluations is not None:
            settings = replace(settings, evaluations=question.max_evaluations)
        for problem in question.problems:
            run_algorithm(question.algorithm, self._walk(problem), settings)

    def sketch_range(self) -> None:
        question, first = self._question, self._question.problems[0]
        name = next(iter(first.budget.limits))
        # Of the full space: an option that cannot pay below one budget may pay below another.
        for budget in _budgets_of_range(question.space, name, question.costs):
            problem = Problem(question.space, budget, question.costs)
            sketch(self._walk(problem), first.space.highest)

    def _walk(self, problem: Problem) -> Walk:
        predictor = self._predictors.setdefault(problem.space, Predictor(problem.space))
        walk = Walk(problem, self._evaluations, predictor)
        self._walks.append(walk)
        return walk


def _budgets_of_range(space: Space, name: str, costs: CostModel) -> list[Budget]:
    """Budgets over the whole range of a cost, descending.

    They are those of the uniform configurations, and some between each two.
    """
    totals = sorted({costs.total(name, config) for config in space.equal_widths} - {0})
    limits = totals[:1]
    for low, high in itertools.pairwise(totals):
        for step in range(1, _BETWEEN):
            limits.append(low * (high / low) ** (step / _BETWEEN))
        limits.append(high)
    return [Budget.of({name: float(limit)}) for limit in reversed(limits) if limit < math.inf]


def _require_positive(name: str, value: float | None) -> None:
    if value is not None and not value > 0:
        msg = f"{name}={value!r} leaves nothing to do: use a positive number, or None for no limit"
        raise SearchError(msg)


def _require_enough(max_evaluations: int, problem: Problem) -> None:
    uniform = sum(map(problem.fits, problem.full_space.equal_widths))
    needed = max(uniform, 1)
    if max_evaluations < needed:
        msg = f"max_evaluations={max_evaluations} is too few: the uniform configurations that fit "
        msg += f"take {uniform}; use at least {needed}, or None for no limit"
        raise SearchError(msg)

"""`search`: the best configuration for a budget, by inference alone. Puts budget, evaluator and algorithm together."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from anyprec.bits import BitConfig
from anyprec.errors import BudgetError, SearchError
from anyprec.model.converted import ConvertedModel, require_converted
from anyprec.model.cost import cost_model
from anyprec.runtime.batches import Batch
from anyprec.runtime.modes import evaluating
from anyprec.runtime.processes import first_reason, holding_back_interrupts
from anyprec.runtime.progress import Bar, progress_bar
from anyprec.searching.algorithms.evaluations import Evaluations, Stopped
from anyprec.searching.algorithms.improvement import sketch
from anyprec.searching.algorithms.moves import Walk
from anyprec.searching.algorithms.predictor import Predictor
from anyprec.searching.algorithms.problem import Problem
from anyprec.searching.algorithms.registry import Settings, require_algorithm, run_algorithm
from anyprec.searching.algorithms.space import Allowed, Space, make_space
from anyprec.searching.budget.budgets import Budget, BudgetLike, parse_budget
from anyprec.searching.budget.costs import SearchCosts, UserCost, search_costs
from anyprec.searching.measuring.evaluator import Evaluator, Norms, Objective
from anyprec.searching.measuring.execution import DEFAULT_MEMORY
from anyprec.searching.measuring.grouping import Tied, tied_groups
from anyprec.searching.measuring.memo import Memo
from anyprec.searching.result import SearchResult

_BETWEEN = 2
"""Budgets of a frontier per step from one uniform configuration to the next, its end included."""

_PATIENCE_OF_RANGE = 12
"""Turns without a gain at each budget of a frontier: what one budget misses its neighbours find. Measured as good as 24."""


def search(  # noqa: PLR0913 (each has a default, and its own subject)
    model: ConvertedModel,
    val_loader: Iterable[Batch],
    budget: BudgetLike | Sequence[BudgetLike] | None = None,
    *,
    algorithm: str = "combined",
    objective: Objective = "loss",
    norms: Norms = "stored",
    max_batches: int | None = None,
    costs: Mapping[str, UserCost] | None = None,
    allowed: Allowed | Mapping[str, Allowed] | None = None,
    tied: Tied = (),
    alpha: float = 1.5,
    seed: int = 0,
    max_evaluations: int | None = None,
    max_seconds: float | None = None,
    resume: str | Path | None = None,
    report_loader: Iterable[Batch] | None = None,
    reuse: bool = True,
    memory: int = DEFAULT_MEMORY,
    show_progress: bool = True,
) -> SearchResult:
    """Find the configuration with the lowest objective within a budget, by forward passes alone.

    After "Retraining-free Model Quantization via One-Shot Weight-Coupling Learning" (Tang et al., CVPR 2024, section
    3.5); the algorithms are described in docs/searching.md. Frozen candidates (`model.frozen`) are not tried. The result
    fits the budget, and its objective is not worse than that of any uniform configuration, one precision W x A
    everywhere, that fits. Everything measured on the way makes a frontier: `result.frontier`, `result.at("5 MiB")`.

    The model is left as it was. Ctrl-C, `max_evaluations` and `max_seconds` end the search with the best so far; with
    `resume` it goes on from there. Report accuracy on other images than those that `val_loader` yields.

    Args:
        model: A converted and calibrated model.
        val_loader: Batches of (images, labels), held in memory; images alone for `objective="divergence"`. Under
            `torchrun` every process passes the same loader, or one with a `DistributedSampler`.
        budget: What the configuration may cost: `"20 GBitOPs"`, `"5 MiB"`, `"4.5 bits"`, `"2.5 ms"`, `"W4A4"` (the
            BitOPs of that uniform configuration), `"60% of W8A8"`, a fraction such as 0.5 of the BitOPs at the highest
            candidates, several with "and", or a `Budget`. A list searches several; None the whole range of BitOPs.
        algorithm: `"combined"` (greedy descent and integer programs on measurements), `"lazy"` (bidirectional greedy that
            measures what looks best), `"greedy"` (the paper's, measures everything), `"program"` (one integer program on
            sensitivities), `"evolution"` or `"random"`.
        objective: `"loss"`, `"error"` (top-1), `"divergence"` (from the float network's predictions; needs no labels), or
            a function of the model, called with the configuration active and gradients off; lower is better.
        norms: `"stored"` or `"batch"`; see `Evaluator`. After `"batch"`, call `update_norms` for the configuration found.
        max_batches: At most so many batches of `val_loader`.
        costs: Costs of your own by name, `"latency"` (seconds) among them: tables `{path: {"W4A8": 0.0012, ...}}`, or
            functions of path and `Bits`.
        allowed: What hardware can run: `(4, 8)`, `("W4A4", "W8A8")`, or a mapping from paths or patterns to these.
        tied: Groups of paths or patterns that take one precision; `"inputs"` ties the layers that read the same tensor,
            `"residual"` those whose outputs are added.
        alpha: Weight of the loss against the cost in the choice of a greedy move.
        seed: Of evolution and random search.
        max_evaluations: Stop after so many evaluations; fewer than about seven for each layer often find a uniform one.
        max_seconds: Stop after so long.
        resume: File that keeps every score; a search of the same model and images goes on from it.
        report_loader: Other batches of (images, labels): the frontier's accuracy on them becomes part of the result.
        reuse: Execute only what depends on the layers that changed. Changes no result.
        memory: Bytes of intermediate results that are kept for that.
        show_progress: Show a bar on a terminal.

    Returns:
        The configuration with its cost and score, and the frontier.

    Raises:
        ConversionError: `model` is not converted.
        NotCalibratedError: Activations have no step sizes yet.
        BudgetError: The budget cannot be read, or nothing fits it (the message says what is achievable).
        BitsError: `allowed` or `tied` do not fit the model.
        SearchError: Another argument cannot be used, or the file of `resume` is of another search.

    Example:
        >>> import timm, torch, anyprec
        >>> model = anyprec.convert(timm.create_model("test_resnet", num_classes=2), bits=(4, 8))
        >>> images = torch.randn(2, 3, 160, 160)
        >>> anyprec.calibrate(model, [images])
        >>> result = anyprec.search(model, [images], "50%", objective="divergence")
        >>> result.utilisation <= 1
        True
    """
    require_converted(model, purpose="search")
    require_algorithm(algorithm)
    _check_numbers(alpha=alpha, max_evaluations=max_evaluations, max_seconds=max_seconds)
    priced = search_costs(cost_model(model), costs)
    space = make_space(model.current_candidates, allowed=allowed, tied=tied_groups(model, tied))
    asked = [parse_budget(each, priced) for each in _listed(budget)]
    problems = [
        Problem(space, limits, priced) for limits in asked or _ladder(space, "bitops", priced)
    ]
    settings = Settings(alpha=alpha, seed=seed)
    if not asked:
        settings = dataclasses.replace(settings, patience=_PATIENCE_OF_RANGE)
    if max_evaluations is not None:
        _require_enough(max_evaluations, problems[0])
        settings = dataclasses.replace(settings, evaluations=max_evaluations)
    with (
        evaluating(model),
        model.using_bits(model.bits),
        progress_bar(
            f"search {problems[0].budget if asked else 'all budgets'}", None, show=show_progress
        ) as bar,
        holding_back_interrupts() as interrupted,
    ):
        evaluator = Evaluator(
            model,
            val_loader,
            objective,
            norms=norms,
            max_batches=max_batches,
            reuse=reuse,
            memory=memory,
        )
        fingerprint = evaluator.fingerprint() if resume is not None else ""
        with Memo(resume, fingerprint=fingerprint, layers=model.candidates) as memo:
            watch = _Watch(problems, memo, bar, max_evaluations)
            evaluations = Evaluations(
                evaluator,
                known=memo.known,
                max_evaluations=max_evaluations,
                max_seconds=max_seconds,
                interrupted=interrupted,
                agree=first_reason,
                on_evaluation=watch.note,
            )
            stopped = _search_all(
                problems, evaluations, algorithm, settings, frontier=bool(asked), costs=priced
            )
        found = evaluations.best(problems[0].fits)
        if found is None:
            raise KeyboardInterrupt
        result = SearchResult(
            config=found,
            score=evaluations.losses[found],
            budget=problems[0].budget,
            evaluated=dict(evaluations.losses),
            uniform=tuple(config for config in space.equal_widths if config in evaluations),
            costs=priced,
            objective=objective
            if isinstance(objective, str)
            else getattr(objective, "__name__", "objective"),
            norms=norms,
            stopped=stopped,
            layer_runs=evaluator.layer_runs,
        )
        return (
            result
            if report_loader is None
            else _with_accuracies(result, model, report_loader, norms)
        )


def _search_all(
    problems: Sequence[Problem],
    evaluations: Evaluations,
    algorithm: str,
    settings: Settings,
    *,
    frontier: bool,
    costs: SearchCosts,
) -> str:
    """Search below every budget; the reason why it stopped."""
    predictors: dict[Space, Predictor] = {}
    try:
        for problem in problems:
            predictor = predictors.setdefault(problem.space, Predictor(problem.space))
            run_algorithm(algorithm, Walk(problem, evaluations, predictor), settings)
        if frontier and algorithm == "combined":
            name = next(iter(problems[0].budget.limits))
            for limits in _ladder(problems[0].everything, name, costs):
                other = Problem(problems[0].everything, limits, costs)
                predictor = predictors.setdefault(other.space, Predictor(other.space))
                sketch(Walk(other, evaluations, predictor), problems[0].space.highest)
    except Stopped as stop:
        return stop.reason
    except KeyboardInterrupt:
        return "interrupted"
    return "finished"


class _Watch:
    """Writes scores down and moves the bar."""

    def __init__(
        self, problems: Sequence[Problem], memo: Memo, bar: Bar, limit: int | None
    ) -> None:
        self._fits = problems[0].fits
        self._memo = memo
        self._bar = bar
        self._best = math.inf
        # What a search takes, roughly: single moves at each start, then a few dozen turns.
        starts = {problem.start: problem for problem in problems if problem.start is not None}
        moves = sum(len(problem.space.choices) * 2 for problem in starts.values())
        self._expected = limit or len(problems[0].everything.uniform) + moves + 60 * len(problems)
        self._done = 0
        bar.expect(self._expected)

    def note(self, config: BitConfig, score: float, measured: bool) -> None:  # noqa: FBT001 (a callback)
        """Called with each evaluation."""
        if measured:
            self._memo.write(config, score)
        if score < self._best and self._fits(config):
            self._best = score
        self._done += 1
        if self._done > self._expected:
            self._bar.expect(None)
        self._bar.advance(note=f"best that fits {self._best:.4f}")


def _listed(budget: BudgetLike | Sequence[BudgetLike] | None) -> list[BudgetLike]:
    if budget is None:
        return []
    if isinstance(budget, (str, Budget)) or not isinstance(budget, Sequence):
        return [budget]
    if not budget:
        msg = f"budget={budget!r} names no budget: pass at least one, or None for the whole range"
        raise BudgetError(msg)
    return list(budget)


def _ladder(space: Space, name: str, costs: SearchCosts) -> list[Budget]:
    """Budgets over the whole range of a cost, descending: those of uniform configurations, and between them."""
    totals = sorted(
        {
            costs.total(name, config)
            for config in space.equal_widths
            if costs.total(name, config) > 0
        }
    )
    budgets = [totals[0]] if totals else []
    for low, high in itertools.pairwise(totals):
        budgets += [low * (high / low) ** (step / _BETWEEN) for step in range(1, _BETWEEN)] + [high]
    return [Budget.of({name: float(limit)}) for limit in reversed(budgets) if math.isfinite(limit)]


def _with_accuracies(
    result: SearchResult, model: ConvertedModel, loader: Iterable[Batch], norms: Norms
) -> SearchResult:
    """`result` with top-1 on other images, of the frontier and of the uniform configurations."""
    judge = Evaluator(model, loader, "error", norms=norms, reuse=False)
    shown = dict.fromkeys(
        [found.config for found in result.frontier] + [*result.uniform, result.config]
    )
    return dataclasses.replace(
        result, accuracies={config: 100 * (1 - judge(config)) for config in shown}
    )


def _check_numbers(*, alpha: float, max_evaluations: int | None, max_seconds: float | None) -> None:
    if not 0 < alpha < math.inf:
        msg = f"alpha={alpha!r} is not a weight of the loss: use a positive finite number, e.g. 1.5"
        raise SearchError(msg)
    for name, value in (("max_evaluations", max_evaluations), ("max_seconds", max_seconds)):
        if value is not None and not value > 0:
            msg = f"{name}={value!r} leaves nothing to do: use a positive number, or None for no limit"
            raise SearchError(msg)


def _require_enough(limit: int, problem: Problem) -> None:
    needed = sum(map(problem.fits, problem.everything.equal_widths))
    if limit < max(needed, 1):
        msg = f"max_evaluations={limit} is too few: the uniform configurations that fit take {needed}; use at least "
        msg += f"{max(needed, 1)}, or None for no limit"
        raise SearchError(msg)

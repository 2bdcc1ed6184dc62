"""`search`: the best configuration for a budget, by inference alone.

It puts together the question in plain numbers, the evaluator, the search file and the progress bar.
The algorithms are in `algorithms`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from anyprec.bits import BitConfig
from anyprec.model.converted import ConvertedModel, require_converted
from anyprec.model.cost import UserCost
from anyprec.model.costing import cost_model
from anyprec.model.fitting import runnable_pairs
from anyprec.runtime.batches import Batch
from anyprec.runtime.modes import evaluating
from anyprec.runtime.processes import first_reason, holding_back_interrupts
from anyprec.runtime.progress import Bar, progress_bar
from anyprec.searching.algorithms.constraints import AllowedBits, make_space
from anyprec.searching.algorithms.question import Answer, Question, run_search
from anyprec.searching.algorithms.registry import Settings, require_algorithm
from anyprec.searching.budget.reading import BudgetLike, parse_budgets
from anyprec.searching.measuring.evaluator import Evaluator, Objective, SearchNorms
from anyprec.searching.measuring.execution import DEFAULT_MEMORY
from anyprec.searching.measuring.grouping import TiedLayers, tied_groups
from anyprec.searching.measuring.memo import Memo
from anyprec.searching.result import SearchResult


def search(  # noqa: PLR0913 (each has a default, and its own subject)
    model: ConvertedModel,
    val_loader: Iterable[Batch],
    budget: BudgetLike | Sequence[BudgetLike] | None = None,
    *,
    algorithm: str = "combined",
    objective: Objective = "loss",
    norms: SearchNorms = "stored",
    batches: int | None = None,
    costs: Mapping[str, UserCost] | None = None,
    allowed: AllowedBits | Mapping[str, AllowedBits] | None = None,
    hardware: str | None = None,
    tied: TiedLayers = (),
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

    After "Retraining-free Model Quantization via One-Shot Weight-Coupling Learning" (Tang et al.,
    CVPR 2024, section 3.5); the algorithms are described in docs/searching.md. Frozen candidates
    (`model.frozen`) are not tried. The result fits the budget, and its objective is not worse than
    that of any uniform configuration, one precision W x A everywhere, that fits. Everything
    measured on the way makes a frontier: `result.frontier`, `result.at("5 MiB")`.

    The model is left as it was, but for the input size that its costs are counted at: that of the
    first batch. Ctrl-C, `max_evaluations` and `max_seconds` end the search with the best so far;
    with `resume` it goes on from there. A configuration whose objective is not finite is never
    chosen. Report accuracy on other images than those that `val_loader` yields.

    Args:
        model: A converted and calibrated model.
        val_loader: Batches of (images, labels), held in memory; images alone for
            `objective="divergence"`. Under `torchrun` every process passes the same loader, or one
            with a `DistributedSampler`.
        budget: What the configuration may cost: `"20 GBitOPs"`, `"5 MiB"`, `"4.5 bits"`,
            `"2.5 ms"`, `"W4A4"` (the BitOPs of that uniform configuration), `"60% of W8A8"`, a
            fraction such as 0.5 of the BitOPs at the highest candidates, several with "and", or a
            `Budget`. A list searches several; None the whole range of BitOPs.
        algorithm: `"combined"` (greedy descent and integer programs on measurements), `"lazy"`
            (bidirectional greedy that measures what looks best), `"greedy"` (the paper's, measures
            everything), `"program"` (one integer program on sensitivities), `"evolution"` or
            `"random"`.
        objective: `"loss"`, `"error"` (top-1), `"divergence"` (from the float network's
            predictions; needs no labels), or a function of the model, called with the configuration
            active and gradients off; lower is better.
        norms: `"stored"` or `"batch"`; see `Evaluator`. After `"batch"`, call
            `update_norms` for the configuration that was found.
        batches: At most so many batches of `val_loader`.
        costs: Costs of your own by name, `"latency"` (seconds) among them: tables
            `{path: {"W4A8": 0.0012, ...}}`, or functions of path and `Bits`.
        allowed: What hardware can run: `(4, 8)`, `("W4A4", "W8A8")`, or a mapping from paths or
            patterns to these.
        hardware: Choose only precisions that this target runs (see `anyprec.hardware`); by default
            those of the target that the model was converted for, if any.
        tied: Groups of paths or patterns that take one precision; `"inputs"` ties the layers that
            read the same tensor, `"residual"` those whose outputs are added.
        alpha: Weight of the loss against the cost in the choice of a greedy move.
        seed: Of evolution and random search.
        max_evaluations: Stop after so many evaluations; fewer than about seven for each layer often
            find a uniform one.
        max_seconds: Stop after so long.
        resume: File that keeps every score; a search of the same model and images goes on from it.
        report_loader: Other batches of (images, labels): the frontier's accuracy on them becomes
            part of the result.
        reuse: Execute only what depends on the layers that changed. Changes no result.
        memory: Bytes of intermediate results that are kept for that.
        show_progress: Show a bar on a terminal.

    Returns:
        The configuration with its cost and score, and the frontier.

    Raises:
        ConversionError: `model` is not converted.
        NotCalibratedError: Activations have no step sizes yet.
        BudgetError: The budget cannot be read, or nothing fits it (the message says what is
            achievable).
        BitsError: `allowed`, `hardware` or `tied` do not fit the model.
        HardwareError: `hardware` is not known.
        SearchError: Another argument cannot be used, the labels or the network's outputs do not fit
            the objective, no configuration that fits has a finite score, or the file of `resume` is
            of another search.
        BatchError: A loader yields no images or labels, or images that the network does not run on.
        NoValuesError: The model is on the meta device.

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
    # What needs no images is checked before they are held.
    require_algorithm(algorithm)
    settings = Settings(alpha=alpha, seed=seed)
    target, pairs = runnable_pairs(model, hardware)
    space = make_space(
        model.current_candidates,
        allowed=allowed,
        tied=tied_groups(model, tied),
        hardware=target,
        pairs=pairs,
    )
    parse_budgets(budget, cost_model(model).with_costs(costs))
    with (
        evaluating(model),
        model.using_bits(model.bits),
        holding_back_interrupts() as interrupted,
        ExitStack() as showing,
    ):
        evaluator = Evaluator(
            model,
            val_loader,
            objective,
            norms=norms,
            batches=batches,
            reuse=reuse,
            memory=memory,
        )
        judge = None
        if report_loader is not None:
            judge = Evaluator(model, report_loader, "error", norms=norms, reuse=False)
        evaluator.follow_input_size()
        network_costs = cost_model(model).with_costs(costs)
        question = Question(
            space=space,
            costs=network_costs,
            budgets=parse_budgets(budget, network_costs),
            algorithm=algorithm,
            settings=settings,
            max_evaluations=max_evaluations,
            max_seconds=max_seconds,
        )
        title = f"search {question.budgets[0]}" if question.budgets else "search all budgets"
        bar = showing.enter_context(progress_bar(title, None, show=show_progress))
        fingerprint = "" if resume is None else evaluator.fingerprint()
        with Memo(resume, fingerprint=fingerprint, layers=model.candidates) as memo:
            answer = run_search(
                question,
                evaluator,
                set_anchor=evaluator.set_anchor,
                remembered=memo.scores,
                interrupted=interrupted,
                agree=first_reason,
                on_evaluation=_Watch(question, memo, bar).note,
            )
        result = _result(question, answer, objective, norms, evaluator.layer_runs)
        return result if judge is None else _with_accuracies(result, judge)


class _Watch:
    """Writes scores down and moves the bar."""

    def __init__(self, question: Question, memo: Memo, bar: Bar) -> None:
        self._fits = question.problems[0].fits
        self._memo = memo
        self._bar = bar
        self._best = math.inf
        self._expected = question.max_evaluations or _expected_evaluations(question)
        self._done = 0
        bar.expect(self._expected)

    def note(self, config: BitConfig, score: float, measured: bool) -> None:  # noqa: FBT001
        """Called with each evaluation."""
        if measured:
            self._memo.write(config, score)
        if score < self._best and self._fits(config):
            self._best = score
        self._done += 1
        if self._done > self._expected:
            self._bar.expect(None)
        self._bar.advance(note=f"best that fits {self._best:.4f}")


def _expected_evaluations(question: Question) -> int:
    """What a search takes, roughly: single moves at each start, then a few dozen turns."""
    problems = question.problems
    single_moves = {}
    for problem in problems:
        if problem.start is not None:
            single_moves[problem.start] = 2 * len(problem.space.choices)
    uniform = len(problems[0].full_space.uniform)
    return uniform + sum(single_moves.values()) + 60 * len(problems)


def _result(
    question: Question, answer: Answer, objective: Objective, norms: SearchNorms, layer_runs: int
) -> SearchResult:
    if answer.best is None:  # interrupted before anything that fits was measured
        raise KeyboardInterrupt
    if not isinstance(objective, str):
        objective = getattr(objective, "__name__", "objective")
    return SearchResult(
        config=answer.best,
        score=answer.losses[answer.best],
        budget=answer.problem.budget,
        evaluated=dict(answer.losses),
        uniform=tuple(filter(answer.losses.__contains__, question.space.equal_widths)),
        costs=question.costs,
        objective=objective,
        norms=norms,
        stopped=answer.stopped,
        layer_runs=layer_runs,
    )


def _with_accuracies(result: SearchResult, judge: Evaluator) -> SearchResult:
    """`result` with top-1 on other images, of the frontier and of the uniform configurations."""
    shown = [measured.config for measured in result.frontier]
    shown += [*result.uniform, result.config]
    accuracies = {config: 100 * (1 - judge(config)) for config in dict.fromkeys(shown)}
    return dataclasses.replace(result, accuracies=accuracies)

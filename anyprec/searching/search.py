"""`search`: the best configuration for a budget, by inference alone. Puts budget, evaluator and algorithm together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from anyprec.batches import Batch
from anyprec.bits import BitConfig
from anyprec.cost import Cost, cost_model
from anyprec.model import ConvertedModel, require_converted
from anyprec.modes import evaluating
from anyprec.progress import progress_bar
from anyprec.searching.budget import Budget, BudgetLike, parse_budget, require_reachable, utilisation
from anyprec.searching.evaluator import Evaluator, Objective
from anyprec.searching.greedy import Step, bidirectional_greedy


@dataclass(frozen=True)
class SearchResult:
    """What `search` found.

    Attributes:
        config: The configuration, for `model.set_bits`.
        budget: The budget, with absolute limits.
        cost: What the configuration costs.
        score: Its objective on the search's own batches; lower is better.
        utilisation: Share of the budget that it uses, at most 1.
        evaluations: Configurations that were evaluated.
        history: The way of the search, a step each.
        evaluated: Every evaluated configuration with its score.
    """

    config: BitConfig
    budget: Budget
    cost: Cost
    score: float
    utilisation: float
    evaluations: int
    history: tuple[Step, ...]
    evaluated: dict[BitConfig, float]

    def __str__(self) -> str:
        return (
            f"{self.cost.bitops / 1e9:.4g} GBitOPs, {self.cost.size / 8 / 2**20:.4g} MiB "
            f"({self.utilisation:.1%} of {self.budget}), score {self.score:.4f} after {self.evaluations} evaluations"
        )


def search(
    model: ConvertedModel,
    val_loader: Iterable[Batch],
    budget: BudgetLike,
    *,
    objective: Objective = "loss",
    max_batches: int | None = None,
    alpha: float = 1.5,
    lazy: bool = True,
    max_evaluations: int | None = None,
    show_progress: bool = True,
) -> SearchResult:
    """Find the configuration with the lowest objective within a budget, by forward passes alone.

    Bidirectional greedy search (Tang et al., CVPR 2024, section 3.5) as described in `searching/greedy.py`. Frozen
    candidates (`model.floors`) are not tried. The result fits the budget, and its objective is never worse than that of
    a uniform configuration that fits. The model is left as it was. Report accuracy on other images than those that
    `val_loader` yields.

    Args:
        model: A converted and calibrated model.
        val_loader: Batches of (images, labels), held in memory; images alone for `objective="divergence"`.
        budget: What the configuration may cost: `"20 GBitOPs"`, `"5 MiB"`, `"4.5 bits"`, `"W4A4"` (the BitOPs of
            that uniform configuration), `"60% of W8A8"`, a fraction such as 0.5 of the BitOPs at the highest
            candidates, or a `Budget`.
        objective: `"loss"`, `"divergence"` (from the predictions at the highest precision; needs no labels), or a
            function of the model, called with the configuration active and gradients off; lower is better.
        max_batches: At most so many batches of `val_loader`.
        alpha: Weight of the loss against the cost in the choice of a move.
        lazy: Evaluate only the moves that look best.
        max_evaluations: Stop after so many evaluations with the best configuration so far.
        show_progress: Show a bar on a terminal.

    Returns:
        The configuration with its cost, score and history.

    Raises:
        ConversionError: `model` is not converted.
        NotCalibratedError: Activations have no step sizes yet.
        BudgetError: The budget cannot be read, or nothing fits it (the message says what is achievable).
        ValueError: Unknown objective, or an empty loader.

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
    costs = cost_model(model)
    limits = parse_budget(budget, costs)
    costs = dataclasses.replace(costs, candidates=model.current_candidates)  # after "W2A2" was read against all of them
    require_reachable(limits, costs)
    with (
        evaluating(model),
        model.using_bits(model.bits),
        progress_bar(f"search {limits}", None, show=show_progress) as bar,
    ):
        evaluator = Evaluator(model, val_loader, objective, max_batches=max_batches)
        best = float("inf")

        def evaluate(config: BitConfig) -> float:
            nonlocal best
            score = evaluator(config)
            if utilisation(config, limits, costs) <= 1:
                best = min(best, score)
            bar.advance(note=f"evaluations, best that fits {best:.4f}")
            return score

        found = bidirectional_greedy(
            evaluate,
            candidates=costs.candidates,
            utilisation=lambda config: utilisation(config, limits, costs),
            alpha=alpha,
            lazy=lazy,
            max_evaluations=max_evaluations,
        )
    return SearchResult(
        config=found.config,
        budget=limits,
        cost=costs.cost(found.config),
        score=found.loss,
        utilisation=found.utilisation,
        evaluations=found.evaluations,
        history=found.history,
        evaluated=dict(found.evaluated),
    )

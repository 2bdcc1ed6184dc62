"""What a search found: the configuration for its budget, and what it measured for any other."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table

from anyprec.bits import BitConfig
from anyprec.errors import BudgetError
from anyprec.model.cost import Cost, CostModel
from anyprec.report.frontiers import bits_plot
from anyprec.searching.budget.budgets import Budget, unreachable, utilisation
from anyprec.searching.budget.reading import BudgetLike, parse_budget
from anyprec.searching.figures import plot_result, result_table
from anyprec.searching.stored import read_result, write_result

_SHOWN_PRECISIONS = 6
"""The most frequent ones, in the text of a result."""


@dataclass(frozen=True)
class MeasuredConfig:
    """A configuration that was measured.

    Attributes:
        config: For `model.set_bits`.
        score: Its objective on the search's images; lower is better.
        cost: BitOPs and size.
        accuracy: Top-1 in percent on `report_loader`; None if it was not measured there.
    """

    config: BitConfig = field(repr=False)
    score: float
    cost: Cost
    accuracy: float | None = None


@dataclass(frozen=True, repr=False)
class SearchResult:
    """What `search` found.

    Attributes:
        config: The configuration for the (first) budget, for `model.set_bits`.
        score: Its objective on the search's own images; lower is better.
        budget: The budget, with absolute limits.
        evaluated: Every evaluated configuration with its score, in order.
        uniform: Those of them that have one precision everywhere.
        costs: What configurations cost.
        objective: What was minimised.
        norms: Which norm statistics were used.
        stopped: `"finished"`, `"max_evaluations"`, `"max_seconds"` or `"interrupted"`.
        layer_runs: Executions of quantized layers that it took, counted for each batch; by this
            process.
        accuracies: Top-1 in percent on `report_loader`, of the frontier and the uniform
            configurations.
    """

    config: BitConfig
    score: float
    budget: Budget
    evaluated: Mapping[BitConfig, float]
    uniform: tuple[BitConfig, ...]
    costs: CostModel
    objective: str
    norms: str
    stopped: str
    layer_runs: int
    accuracies: Mapping[BitConfig, float] = field(default_factory=dict)

    @property
    def cost(self) -> Cost:
        """What the configuration costs."""
        return self.costs.cost(self.config)

    @property
    def utilisation(self) -> float:
        """Share of the budget that it uses, at most 1."""
        return utilisation(self.config, self.budget, self.costs)

    @property
    def evaluations(self) -> int:
        """Configurations that were evaluated."""
        return len(self.evaluated)

    @property
    def not_finite(self) -> int:
        """How many of them have no finite score: they are never chosen."""
        return sum(map(math.isinf, self.evaluated.values()))

    @property
    def frontier(self) -> tuple[MeasuredConfig, ...]:
        """The evaluated configurations of which none is at once cheaper and better.

        They are in the order of rising cost: the first that the budget limits.
        """
        cost_name = next(iter(self.budget.limits))
        priced = []
        for config, score in self.evaluated.items():
            priced.append((self.costs.total(cost_name, config), score, config))
        lowest_score = math.inf
        frontier = []
        for _, score, config in sorted(priced, key=lambda entry: entry[:2]):
            if score < lowest_score:
                frontier.append(self.measured(config))
                lowest_score = score
        return tuple(frontier)

    def at(self, budget: BudgetLike) -> MeasuredConfig:
        """The best evaluated configuration that fits another budget; nothing is evaluated anew.

        Raises:
            BudgetError: The budget cannot be read, or nothing that was evaluated fits it with a
                finite score.
        """
        limits = parse_budget(budget, self.costs)
        best, lowest_score = None, math.inf
        fitting = 0
        for config, score in self.evaluated.items():
            if utilisation(config, limits, self.costs) <= 1:
                fitting += 1
                if score < lowest_score:
                    best, lowest_score = config, score
        if best is not None:
            return self.measured(best)
        if fitting:
            msg = f"none of the {fitting} evaluated configurations that fit {limits} has a finite "
            msg += "score: ask for a larger budget, or search this one"
            raise BudgetError(msg)
        ranges = {}
        for name in limits.limits:
            totals = [self.costs.total(name, config) for config in self.evaluated]
            ranges[name] = min(totals), max(totals)
        raise unreachable(limits, ranges)

    def measured(self, config: BitConfig) -> MeasuredConfig:
        """All that is known of a configuration that was evaluated."""
        score, accuracy = self.evaluated[config], self.accuracies.get(config)
        return MeasuredConfig(config, score, self.costs.cost(config), accuracy)

    def table(self) -> Table:
        """The frontier and the uniform configurations as a rich table."""
        return result_table(self)

    def plot(self, path: str | Path, *, title: str = "") -> None:
        """Plot score (or accuracy, where it was reported) against cost, into a file.

        All that was evaluated is shown, the frontier, and the uniform configurations.

        Raises:
            ImportError: matplotlib is not installed (`pip install 'anyprec[plots]'`).
        """
        plot_result(self, path, title=title)

    def plot_bits(
        self, path: str | Path, *, budget: BudgetLike | None = None, title: str = ""
    ) -> None:
        """Plot the bits of each layer as bars, into a file; for this budget or another one.

        Raises:
            ImportError: matplotlib is not installed.
            BudgetError: as `at`.
        """
        bits_plot(self.config if budget is None else self.at(budget).config, path, title=title)

    def save(self, path: str | Path) -> None:
        """Write the result as JSON, for `SearchResult.load`.

        An existing file is replaced at once or not at all.

        Raises:
            SearchError: The file cannot be written.
        """
        write_result(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> SearchResult:
        """Read a result that `save` wrote.

        Raises:
            SearchError: The file cannot be read, or is no search result.
        """
        return cls(**read_result(Path(path)))

    def __str__(self) -> str:
        limits = f"{self.utilisation:.1%} of {self.budget}"
        score = f"{self.objective} {self.score:.4f} after {self.evaluations} evaluations"
        text = f"{_figures(self.cost)} ({limits}), {score}{self._unusable_text}"
        return text if self.stopped == "finished" else f"{text} (stopped: {self.stopped})"

    @property
    def _unusable_text(self) -> str:
        return f" ({self.not_finite} without a finite score)" if self.not_finite else ""

    def __repr__(self) -> str:
        return "\n".join(
            [
                "SearchResult",
                f"  bits         {_summary(self.config)}",
                f"  {self.objective:<12} {self.score:.4g}, lower is better",
                f"  cost         {_figures(self.cost)}",
                f"  budget       {self.budget}, {self.utilisation:.1%} used",
                f"  evaluations  {self.evaluations}{self._unusable_text}, {self.stopped}",
                "  more         .config has the bits of each layer, for model.set_bits",
                '               .at("5 MiB") answers another budget without a new evaluation',
                "               .frontier, .table(), .plot(file), .plot_bits(file), .save(file)",
            ]
        )


def _figures(cost: Cost) -> str:
    return f"{cost.bitops / 1e9:.4g} GBitOPs, {cost.size / 8 / 2**20:.4g} MiB"


def _summary(config: BitConfig) -> str:
    """How many layers have which precision, the most frequent first."""
    counts = Counter(config.values()).most_common()
    shown = [f"{count} x {bits}" for bits, count in counts[:_SHOWN_PRECISIONS]]
    if len(counts) > _SHOWN_PRECISIONS:
        shown.append(f"{len(counts) - _SHOWN_PRECISIONS} more precisions")
    return f"{len(config)} layers: {', '.join(shown)}"

"""A search result for the eye: its table and its plots, by way of `anyprec.report`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from anyprec.bits import BitConfig
from anyprec.report.frontiers import frontier_plot, frontier_table

if TYPE_CHECKING:
    from anyprec.searching.result import SearchResult


def result_table(result: SearchResult) -> Table:
    """The frontier and the uniform configurations."""
    names = {measured.config: "searched" for measured in result.frontier}
    names |= {config: uniform_name(config) for config in result.uniform}
    rows = []
    for config, name in names.items():
        measured = result.measured(config)
        rows.append((name, measured.cost, measured.score, measured.accuracy))
    return frontier_table(sorted(rows, key=lambda row: row[1].bitops), objective=result.objective)


def plot_result(result: SearchResult, file: str | Path, *, title: str) -> None:
    """Score (or accuracy, where it was reported) against cost."""
    scores: Mapping[BitConfig, float] = result.evaluated
    label = f"{result.objective} on the search's images"
    if result.accuracies:
        scores = result.accuracies
        label = "top-1 accuracy on other images, %"
    cost_name = next(iter(result.budget.limits))

    def points(configs: Iterable[BitConfig]) -> list[tuple[float, float]]:
        shown = [config for config in configs if config in scores]
        return [(result.costs.total(cost_name, config), scores[config]) for config in shown]

    frontier_plot(
        {
            # Accuracies are measured on the frontier and the uniform configurations only.
            "evaluated": [] if result.accuracies else points(result.evaluated),
            "uniform": points(result.uniform),
            "searched": points(measured.config for measured in result.frontier),
        },
        file,
        cost=cost_name,
        score=label,
        chosen=points([result.config]),
        title=title,
    )


def uniform_name(config: BitConfig) -> str:
    """`W4A4`: the precision that most layers of a uniform configuration have."""
    precisions = list(config.values())
    return str(max(dict.fromkeys(precisions), key=precisions.count))

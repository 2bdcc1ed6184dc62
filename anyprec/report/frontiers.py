"""Score against cost, and bits per layer, of a search: tables (rich) and plots (matplotlib).

matplotlib is the extra `anyprec[plots]`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from anyprec.bits import BitConfig
from anyprec.model.cost import Cost
from anyprec.report.figures import label_cost_and_score, new_figure
from anyprec.runtime.tables import TableContent

Points = Sequence[tuple[float, float]]
"""(cost, score) pairs."""

_STYLES: dict[str, dict[str, Any]] = {
    "evaluated": {
        "marker": ".",
        "linestyle": "none",
        "color": "#bbbbbb",
        "markersize": 4,
        "zorder": 1,
    },
    "uniform": {"marker": "o", "linestyle": "-", "color": "#4269d0", "zorder": 2},
    "searched": {"marker": "D", "linestyle": "-", "color": "#ff725c", "markersize": 4, "zorder": 3},
    "random": {"marker": "x", "linestyle": "none", "color": "#6cc5b0", "zorder": 2},
}
_CHOSEN_STYLE = {"markersize": 12, "fillstyle": "none", "color": "#000000", "zorder": 4}
_UNITS = {
    "bitops": (1e9, "BitOPs of one image, in G"),
    "size": (8 * 2**20, "size of the quantized weights, in MiB"),
    "average_bits": (1, "weight bits, averaged over the weights"),
    "average_activation_bits": (1, "activation bits, averaged over the MACs"),
    "latency": (1e-3, "latency, in ms"),
}
_WEIGHT, _ACTIVATION = "#4269d0", "#efb118"
_MOST_NAMES = 80
"""Layers of which the names can still be read on an axis."""


def frontier_table(
    rows: Iterable[tuple[str, Cost, float, float | None]], *, objective: str, title: str = ""
) -> Table:
    """A rich table with a line for each configuration.

    Args:
        rows: Name, cost, score, and top-1 accuracy in percent or None of each configuration.
        objective: What the score is.
        title: Above the table.
    """
    configurations = list(rows)
    numbers = ["GBitOPs", "MiB", "average bits", objective]
    any_accuracy = any(accuracy is not None for *_, accuracy in configurations)
    if any_accuracy:
        numbers.append("top-1 %")
    lines = []
    for name, cost, score, accuracy in configurations:
        size = f"{cost.size / 8 / 2**20:.3f}"
        cells = [name, f"{cost.bitops / 1e9:.4g}", size, f"{cost.average_bits:.2f}", f"{score:.4f}"]
        if any_accuracy:
            cells.append("" if accuracy is None else f"{accuracy:.2f}")
        lines.append(cells)
    table = TableContent(["configuration", *numbers], lines, numbers, title).rich()
    for row, (name, *_) in zip(table.rows, configurations, strict=True):
        if name == "searched":
            row.style = "bold"
    return table


def frontier_plot(
    series: Mapping[str, Points],
    path: str | Path,
    *,
    cost: str,
    score: str,
    chosen: Points = (),
    title: str = "",
) -> None:
    """Plot score against cost, a series for each kind of configuration.

    Args:
        series: Points by kind: "evaluated", "uniform", "searched", "random" or any other name.
        path: File to write; its suffix determines the format.
        cost: Name of the cost.
        score: Label of the other axis.
        chosen: Points to mark.
        title: Above the plot.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, axes = new_figure(7, 4.5, title=title)
    unit, label = _UNITS.get(cost, (1, cost))
    scores: list[float] = []
    for kind, points in series.items():
        finite = sorted((x / unit, y) for x, y in points if math.isfinite(y))
        if finite:
            style = _STYLES.get(kind, {"marker": "s", "linestyle": "--"})
            shown_costs, shown_scores = zip(*finite, strict=True)
            axes.plot(shown_costs, shown_scores, label=kind, **style)
            scores += shown_scores
    for x, y in chosen:
        axes.plot([x / unit], [y], "o", label="chosen", **_CHOSEN_STYLE)
    # Losses at 2 bits can be a hundred times those at 8, which would all look like 0.
    if scores and min(scores) > 0 and max(scores) > 30 * min(scores):
        axes.set_yscale("log")
    label_cost_and_score(axes, cost=label, score=score)
    axes.legend()
    figure.savefig(path)


def bits_plot(config: BitConfig, path: str | Path, *, title: str = "") -> None:
    """Plot the weight and activation bits of each layer, in network order, as a bar chart.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, axes = new_figure(max(7.0, 0.18 * len(config)), 4.5, title=title)
    weights = [bits.weight for bits in config.values()]
    activations = [bits.activation for bits in config.values()]
    positions = range(len(config))
    # Aligned by an edge, a bar of negative width is to the left of its position.
    axes.bar(positions, weights, width=-0.4, align="edge", color=_WEIGHT, label="weight bits")
    axes.bar(
        positions,
        activations,
        width=0.4,
        align="edge",
        color=_ACTIVATION,
        label="activation bits",
    )
    axes.set_xticks([])
    if len(config) <= _MOST_NAMES:
        axes.set_xticks(list(positions), list(config), rotation=90, fontsize=6)
    axes.set_xlabel("layer, in network order")
    axes.set_ylabel("bits")
    axes.set_xlim(-1, len(config))
    axes.grid(visible=True, axis="y", alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=2, frameon=False)
    figure.savefig(path)

"""Score against cost, and bits per layer: tables (rich) and plots (matplotlib, the extra `anyprec[plots]`) of a search."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from anyprec.bits import BitConfig
from anyprec.model.cost import Cost
from anyprec.report.figures import label_cost_and_score, new_figure

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
_UNITS = {
    "bitops": (1e9, "BitOPs of one image, in G"),
    "size": (8 * 2**20, "size of the quantized weights, in MiB"),
    "average_bits": (1, "weight bits, averaged over the weights"),
    "average_activation_bits": (1, "activation bits, averaged over the MACs"),
    "latency": (1e-3, "latency, in ms"),
}
_WEIGHT, _ACTIVATION = "#4269d0", "#efb118"
_LAYERS_WITHOUT_NAMES = 80


def frontier_table(
    rows: Iterable[tuple[str, Cost, float, float | None]], *, objective: str, title: str = ""
) -> Table:
    """A rich table with a line for each configuration: name, cost, score, and accuracy where it was measured."""
    lines = list(rows)
    measured = any(accuracy is not None for *_, accuracy in lines)
    table = Table(title=title or None)
    for index, column in enumerate(
        ["configuration", "GBitOPs", "MiB", "average bits", objective, *(["top-1 %"] * measured)]
    ):
        table.add_column(column, justify="left" if index == 0 else "right")
    for name, cost, score, accuracy in lines:
        cells = [
            name,
            f"{cost.bitops / 1e9:.4g}",
            f"{cost.size / 8 / 2**20:.3f}",
            f"{cost.average_bits:.2f}",
            f"{score:.4f}",
        ]
        if measured:
            cells.append("" if accuracy is None else f"{accuracy:.2f}")
        table.add_row(*cells, style="bold" if name == "searched" else None)
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
    """Write a picture of score against cost, a series for each kind of configuration.

    Args:
        series: Points by kind: "evaluated", "uniform", "searched", "random" or any other name.
        path: Picture to write; its suffix says the format.
        cost: Name of the cost.
        score: Label of the other axis.
        chosen: Points to mark.
        title: Above the plot.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, axes = new_figure(7, 4.5, title=title)
    scale, label = _UNITS.get(cost, (1, cost))
    for kind, points in series.items():
        shown = sorted((x / scale, y) for x, y in points if math.isfinite(y))
        if shown:
            axes.plot(
                *zip(*shown, strict=True),
                label=kind,
                **_STYLES.get(kind, {"marker": "s", "linestyle": "--"}),
            )
    for x, y in chosen:
        axes.plot(
            [x / scale],
            [y],
            "o",
            markersize=12,
            fillstyle="none",
            color="#000000",
            zorder=4,
            label="chosen",
        )
    positive = [y for points in series.values() for _, y in points if math.isfinite(y)]
    if positive and min(positive) > 0 and max(positive) > 30 * min(positive):
        axes.set_yscale("log")
    label_cost_and_score(axes, cost=label, score=score)
    axes.legend()
    figure.savefig(path)


def bits_plot(config: BitConfig, path: str | Path, *, title: str = "") -> None:
    """Write a bar chart of the weight and activation bits of each layer, in network order.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, axes = new_figure(max(7.0, 0.18 * len(config)), 4.5, title=title)
    places = range(len(config))
    axes.bar(
        [x - 0.2 for x in places],
        [b.weight for b in config.values()],
        width=0.4,
        color=_WEIGHT,
        label="weight bits",
    )
    activations = [bits.activation for bits in config.values()]
    axes.bar(
        [x + 0.2 for x in places],
        activations,
        width=0.4,
        color=_ACTIVATION,
        label="activation bits",
    )
    named = len(config) <= _LAYERS_WITHOUT_NAMES
    axes.set_xticks(
        list(places) if named else [], list(config) if named else [], rotation=90, fontsize=6
    )
    axes.set_xlabel("layer, in network order")
    axes.set_ylabel("bits")
    axes.set_xlim(-1, len(config))
    axes.grid(visible=True, axis="y", alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.12), ncols=2, frameon=False)
    figure.savefig(path)

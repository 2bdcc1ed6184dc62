"""Plots of measured results, with matplotlib (the extra `anyprec[plots]`)."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anyprec.report.figures import label_cost_and_score, new_figure
from anyprec.report.results import Result

_STYLES = {"uniform": ("o-", "#4269d0"), "searched": ("D", "#ff725c")}

_NAME_OFFSETS = {"uniform": 7, "searched": -13}
"""Points between a mark and its name, above or below, so that names of two series do not meet."""


def plot_accuracy(results: Sequence[Result], path: str | Path, *, title: str = "") -> None:
    """Plot accuracy against BitOPs: a series for each kind of result, the float network as a line.

    Args:
        results: What was measured.
        path: File to write; its suffix determines the format.
        title: Above the plot.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, axes = new_figure(7, 4.5, title=title)
    series = defaultdict(list)
    for result in results:
        series[result.kind].append(result)
    for kind in _STYLES:
        if kind in series:
            _plot_series(axes, kind, series[kind])
    for result, line in zip(series["float"], itertools.cycle(("--", ":", "-.")), strict=False):
        axes.axhline(
            result.accuracy, color="#6b6b6b", linestyle=line, linewidth=1, label=result.name
        )
    label_cost_and_score(axes, cost="BitOPs of one image, in G", score="top-1 accuracy, %")
    axes.margins(x=0.08, y=0.12)
    axes.legend(loc="lower right")
    figure.savefig(path)


def _plot_series(axes: Any, kind: str, series: Sequence[Result]) -> None:
    style, color = _STYLES[kind]
    series = sorted(series, key=lambda result: result.cost.bitops)
    costs = [result.cost.bitops / 1e9 for result in series]
    axes.plot(costs, [result.accuracy for result in series], style, color=color, label=kind)
    for result, cost in zip(series, costs, strict=True):
        axes.annotate(
            result.name.removeprefix("searched "),
            (cost, result.accuracy),
            textcoords="offset points",
            xytext=(0, _NAME_OFFSETS[kind]),
            ha="center",
            fontsize=8,
            color=color,
        )

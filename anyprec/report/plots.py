"""Plots of measured results, with matplotlib (the extra `anyprec[plots]`)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from anyprec.report.figures import label_cost_and_score, new_figure
from anyprec.report.results import Result

_STYLE = {"uniform": ("o-", "#4269d0"), "searched": ("D", "#ff725c")}


def plot_accuracy(results: Sequence[Result], path: str | Path, *, title: str = "") -> None:
    """Write a picture of accuracy against BitOPs: a series for each kind of result, the float network as a line.

    Args:
        results: What was measured.
        path: Picture to write; its suffix says the format.
        title: Above the plot.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure, axes = new_figure(7, 4.5, title=title)
    for kind, (style, color) in _STYLE.items():
        series = sorted(
            (r for r in results if r.kind == kind), key=lambda result: result.cost.bitops
        )
        if not series:
            continue
        axes.plot(
            [r.cost.bitops / 1e9 for r in series],
            [r.accuracy for r in series],
            style,
            color=color,
            label=kind,
        )
        for r in series:
            below = kind == "searched"
            axes.annotate(
                r.name.removeprefix("searched "),
                (r.cost.bitops / 1e9, r.accuracy),
                textcoords="offset points",
                xytext=(0, -13 if below else 7),
                ha="center",
                fontsize=8,
                color=color,
            )
    for r, line in zip(
        (r for r in results if r.kind == "float"), itertools.cycle(("--", ":", "-.")), strict=False
    ):
        axes.axhline(r.accuracy, color="#6b6b6b", linestyle=line, linewidth=1, label=r.name)
    label_cost_and_score(axes, cost="BitOPs of one image, in G", score="top-1 accuracy, %")
    axes.margins(x=0.08, y=0.12)
    axes.legend(loc="lower right")
    figure.savefig(path)

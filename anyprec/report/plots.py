"""Plots of measured results, with matplotlib (the extra `anyprec[plots]`)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

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
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 (optional)
    from matplotlib.figure import Figure  # noqa: PLC0415 (optional)
    from matplotlib.ticker import FuncFormatter  # noqa: PLC0415 (optional)

    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for kind, (style, color) in _STYLE.items():
        series = sorted((r for r in results if r.kind == kind), key=lambda result: result.cost.bitops)
        if not series:
            continue
        axes.plot([r.cost.bitops / 1e9 for r in series], [r.accuracy for r in series], style, color=color, label=kind)
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
    for r, line in zip((r for r in results if r.kind == "float"), itertools.cycle(("--", ":", "-.")), strict=False):
        axes.axhline(r.accuracy, color="#6b6b6b", linestyle=line, linewidth=1, label=r.name)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("BitOPs of one image, in G (log scale)")
    axes.set_ylabel("top-1 accuracy, %")
    axes.margins(x=0.08, y=0.12)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(loc="lower right")
    if title:
        axes.set_title(title)
    figure.savefig(path)

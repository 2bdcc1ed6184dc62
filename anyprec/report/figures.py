"""What every plot shares: a figure that needs no display, and an axis of costs.

matplotlib is the extra `anyprec[plots]`.
"""

from __future__ import annotations

from typing import Any


def new_figure(width: float, height: float, *, title: str = "") -> tuple[Any, Any]:
    """A figure of this size in inches, and its axes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 (optional)
    from matplotlib.figure import Figure  # noqa: PLC0415 (optional)

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if title:
        axes.set_title(title)
    return figure, axes


def label_cost_and_score(axes: Any, *, cost: str, score: str) -> None:
    """Costs run from left to right in powers of two, with plain numbers."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel(f"{cost} (log scale)")
    axes.set_ylabel(score)
    axes.grid(visible=True, alpha=0.3)

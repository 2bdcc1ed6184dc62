"""Plot of how an exported file agrees with its network: codes of each layer, and logits.

matplotlib is the extra `anyprec[plots]`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anyprec.report.figures import new_figure

_IN_SEQUENCE, _ALONE = "#4269d0", "#ff725c"
_MOST_NAMES = 80
"""Layers of which the names can still be read on an axis."""


def agreement_plot(
    shares: Mapping[str, tuple[float, float]],
    logits: Sequence[tuple[float, float]],
    path: str | Path,
    *,
    title: str = "",
) -> None:
    """Plot equal codes of each layer, if there are any, and logits of file against network.

    Args:
        shares: Percent of equal codes of each layer, in order: in the whole network, and alone.
        logits: Pairs of logits: network, file.
        path: File to write; its suffix determines the format.
        title: Above the plot.

    Raises:
        ImportError: matplotlib is not installed.
    """
    width = max(6.0, 0.16 * len(shares)) if shares else 0.0
    figure, axes = new_figure(width + 4.5, 4.8)
    figure.suptitle(title, fontsize=10)
    if shares:
        figure.delaxes(axes)
        left, axes = figure.subplots(1, 2, width_ratios=(width, 4.5))
        _plot_shares(left, shares)
    _plot_logits(axes, logits)
    figure.savefig(path)


def _plot_shares(axes: Any, shares: Mapping[str, tuple[float, float]]) -> None:
    positions = range(len(shares))
    sequence, alone = zip(*shares.values(), strict=True)
    axes.plot(positions, sequence, "o-", color=_IN_SEQUENCE, markersize=4, label="whole network")
    axes.plot(positions, alone, "x", color=_ALONE, markersize=5, label="each layer alone")
    axes.set_xticks([])
    if len(shares) <= _MOST_NAMES:
        axes.set_xticks(list(positions), list(shares), rotation=90, fontsize=6)
    axes.set_xlabel("quantizer, in network order")
    axes.set_ylabel("equal codes, %")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(loc="lower left")


def _plot_logits(axes: Any, logits: Sequence[tuple[float, float]]) -> None:
    network, file = zip(*logits, strict=True)
    limits = min(*network, *file), max(*network, *file)
    axes.plot(limits, limits, color="#6b6b6b", linewidth=1)
    axes.plot(network, file, ".", color=_IN_SEQUENCE, markersize=3, alpha=0.5)
    axes.set_xlabel("logit of the network")
    axes.set_ylabel("logit of the file")
    axes.set_aspect("equal")
    axes.grid(visible=True, alpha=0.3)

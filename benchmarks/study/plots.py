"""The study's pictures, with matplotlib: a panel for each network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from anyprec.report.figures import label_cost_and_score

Points = Sequence[tuple[float, float]]

_KINDS = {"random": ("o", "#9c9c9c"), "uniform": ("o-", "#4269d0"), "searched": ("D", "#ff725c")}
_COLORS = ("#4269d0", "#3ca951", "#efb118", "#ff725c", "#a463f2", "#9c6b4e", "#6cc5b0")


def draw_bitops(panels: Mapping[str, Mapping[str, Points]], path: Path) -> None:
    """Accuracy against BitOPs: uniform, random and searched configurations, the float network as a line."""
    figure, axes = panels_of(len(panels))
    for axis, (title, kinds) in zip(axes, panels.items(), strict=True):
        for kind, (style, color) in _KINDS.items():
            points = sorted(kinds[kind])
            axis.plot(
                [x / 1e6 for x, _ in points],
                [y for _, y in points],
                style,
                color=color,
                label=kind,
                markersize=5,
            )
        for _, accuracy in kinds["float"]:
            axis.axhline(accuracy, color="#6b6b6b", linestyle="--", linewidth=1, label="float")
        label_cost_and_score(axis, cost="BitOPs of one image, in M", score="top-1 accuracy, %")
        axis.set_title(title)
        axis.legend(loc="lower right")
    figure.savefig(path)


def draw_interference(panels: Mapping[str, Mapping[str, Points]], path: Path) -> None:
    """Accuracy of each bit-width against the lowest candidate that is trained along."""
    figure, axes = panels_of(len(panels))
    for axis, (title, lines) in zip(axes, panels.items(), strict=True):
        places = sorted({x for points in lines.values() for x, _ in points}, reverse=True)
        trained = [name for name in lines if "," not in name]
        for color, name in zip(_COLORS, trained, strict=False):
            points = sorted(lines[name], reverse=True)
            axis.plot(
                [places.index(x) for x, _ in points],
                [y for _, y in points],
                "o-",
                color=color,
                label=name,
            )
            crosses = lines.get(f"{name}, ours", [])
            axis.plot(
                [places.index(x) + 0.12 for x, _ in crosses],
                [y for _, y in crosses],
                "x",
                color=color,
            )
        axis.set_xticks(range(len(places)), [str(int(place)) for place in places])
        axis.set(title=title, xlabel="lowest candidate bit-width", ylabel="top-1 accuracy, %")
        axis.grid(visible=True, alpha=0.3)
        axis.legend(loc="lower left")
    figure.savefig(path)


def draw_instability(panels: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """Instability of every layer (rows) after every epoch (columns), with the frozen layers marked."""
    figure, axes = panels_of(len(panels), height=7.0)
    for axis, (title, epochs) in zip(axes, panels.items(), strict=True):
        layers = list(epochs[0]["instability"])
        values = [[epoch["instability"][layer] for epoch in epochs] for layer in layers]
        picture = axis.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest")
        marked = [
            (column, row)
            for column, epoch in enumerate(epochs)
            for row, layer in enumerate(layers)
            if layer in epoch["frozen"]
        ]
        axis.plot(
            [x for x, _ in marked],
            [y for _, y in marked],
            "x",
            color="red",
            markersize=6,
            markeredgewidth=2,
        )
        axis.set_xticks(range(len(epochs)), [str(index + 1) for index in range(len(epochs))])
        axis.set_yticks(range(len(layers)), layers, fontsize=7 if len(layers) < 30 else 5)
        axis.set(title=title, xlabel="after epoch")
        figure.colorbar(picture, ax=axis, label="instability")
    figure.savefig(path)


def panels_of(count: int, *, height: float = 4.5) -> tuple[Figure, list[Any]]:
    """A figure with panels, two or three in a row, and their axes."""
    columns = count if count <= 3 else 2
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(6.0 * columns, height * rows), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.remove()
    return figure, axes[:count]

"""The study's plots: the points of each workload, and how matplotlib draws them, a panel each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from anyprec.report.figures import label_cost_and_score
from benchmarks.study.figures import OURS, Study, Workload

_KINDS = {"random": ("o", "#9c9c9c"), "uniform": ("o-", "#4269d0"), "searched": ("D", "#ff725c")}
_COLORS = ("#4269d0", "#3ca951", "#efb118", "#ff725c", "#a463f2", "#9c6b4e", "#6cc5b0")


def draw(study: Study, folder: Path) -> list[str]:
    """Draw what there are records for; returns the names of the files."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "study-bitops.png": bitops_figure(study),
        "study-interference.png": interference_figure(study),
        "study-instability.png": instability_figure(study),
    }
    drawn = []
    for name, figure in figures.items():
        if figure is not None:
            figure.savefig(folder / name)
            drawn.append(name)
    return drawn


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


# --- BitOPs ---------------------------------------------------------------------------------------


def bitops_figure(study: Study) -> Figure | None:
    """Accuracy of ours against BitOPs: uniform, random and searched configurations, and float."""
    panels = []
    for workload in study.workloads:
        points = bitops_points(study, workload)
        if not points.empty:
            panels.append((workload, points))
    if not panels:
        return None
    figure, axes = panels_of(len(panels))
    for axis, (workload, points) in zip(axes, panels, strict=True):
        for kind, (style, color) in _KINDS.items():
            of_kind = points[points["kind"] == kind].sort_values(["bitops", "accuracy"])
            costs, accuracies = of_kind["bitops"] / 1e6, of_kind["accuracy"]
            axis.plot(costs, accuracies, style, color=color, label=kind, markersize=5)
        trained = study.values(workload, "float", "float")
        if not trained.empty:
            axis.axhline(
                trained.mean(), color="#6b6b6b", linestyle="--", linewidth=1, label="float"
            )
        label_cost_and_score(axis, cost="BitOPs of one image, in M", score="top-1 accuracy, %")
        axis.set_title(str(workload))
        axis.legend(loc="lower right")
    return figure


def bitops_points(study: Study, workload: Workload) -> pd.DataFrame:
    """Kind, BitOPs and accuracy of our configurations.

    Uniform and random ones are means over seeds. Each seed has searched ones of its own.
    """
    points = []
    for record in study.records_of(workload, [OURS]):
        points += [("uniform", width, record["configs"][width]) for width in workload.widths]
        for number, entry in enumerate(record["mixed"]):
            points.append(("random", str(number), entry))
        for budget, entry in record["searched"].items():
            if entry["config"] is not None:
                points.append(("searched", f"{budget} {record['seed']}", entry))
    figures = [(kind, name, entry["bitops"], entry["own"]) for kind, name, entry in points]
    frame = pd.DataFrame(figures, columns=["kind", "name", "bitops", "accuracy"])
    return frame.groupby(["kind", "name"], as_index=False).mean()


# --- Interference ---------------------------------------------------------------------------------


def interference_figure(study: Study) -> Figure | None:
    """Accuracy of each bit-width against the lowest candidate that is trained along."""
    panels = []
    for workload in study.workloads:
        trained, ours = interference(study, workload)
        if trained.count().max() > 1:
            panels.append((workload, trained, ours))
    if not panels:
        return None
    figure, axes = panels_of(len(panels))
    for axis, (workload, trained, ours) in zip(axes, panels, strict=True):
        positions = range(len(trained))
        for color, (width, accuracies) in zip(_COLORS, trained.items(), strict=False):
            axis.plot(positions, accuracies, "o-", color=color, label=f"{width} bits")
            # Ours has all candidates, as the last position: beside it, to be seen.
            axis.plot(positions[-1] + 0.12, ours[width], "x", color=color)
        axis.set_xticks(positions, trained.index)
        axis.set(title=str(workload), xlabel="lowest candidate bit-width")
        axis.set(ylabel="top-1 accuracy, %")
        axis.grid(visible=True, alpha=0.3)
        axis.legend(loc="lower left")
    return figure


def interference(study: Study, workload: Workload) -> tuple[pd.DataFrame, pd.Series[float]]:
    """Accuracy of each bit-width (columns) as lower candidates (rows) join, the highest first.

    Random paths learn from the labels alone. Beside it the accuracies of ours.
    """
    widths = workload.widths[::-1]
    methods = [f"random-{lowest}-up" for lowest in widths]
    methods[0], methods[-1] = f"dedicated-{widths[0]}", "random"
    same = study.of_seeds(workload.track.seeds_of("interference"))
    means = same.runs[str(workload)]["own"][widths].groupby("method").mean()
    trained = means.reindex(methods).set_axis(widths).dropna(axis="columns", how="all")
    return trained, means.reindex([OURS]).loc[OURS, trained.columns]


# --- Instability ----------------------------------------------------------------------------------


def instability_figure(study: Study) -> Figure | None:
    """Instability of each layer (rows) after each epoch (columns), frozen layers marked.

    Of the first seed of the full method.
    """
    panels = []
    for workload in study.workloads:
        records = study.records_of(workload, ["full"])
        first = min(records, key=lambda record: record["seed"], default={"trace": []})
        if first["trace"]:
            panels.append((workload, first["trace"]))
    if not panels:
        return None
    figure, axes = panels_of(len(panels), height=7.0)
    for axis, (workload, epochs) in zip(axes, panels, strict=True):
        image = _draw_instability(axis, epochs)
        axis.set(title=str(workload), xlabel="after epoch")
        figure.colorbar(image, ax=axis, label="instability")
    return figure


def _draw_instability(axis: Any, epochs: list[Mapping[str, Any]]) -> Any:
    values = pd.DataFrame([epoch["instability"] for epoch in epochs]).T
    layers = list(values.index)
    image = axis.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest")
    columns, rows = [], []
    for column, epoch in enumerate(epochs):
        for layer in epoch["frozen"]:
            columns.append(column)
            rows.append(layers.index(layer))
    axis.plot(columns, rows, "x", color="red", markersize=6, markeredgewidth=2)
    axis.set_xticks(range(len(epochs)), range(1, len(epochs) + 1))
    axis.set_yticks(range(len(layers)), layers, fontsize=7 if len(layers) < 30 else 5)
    return image

"""The search's part of `docs/results.md`: tables and plots, all from the records."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from anyprec.report.figures import label_cost_and_score
from benchmarks.common.pages import markdown, origin, write_part
from benchmarks.study.plots import panels_of

Record = dict[str, Any]

_WORK = """`naive` runs the whole network for each move that the paper's greedy search asks for,
up and down; `greedy` is the same search with every configuration measured once and only what
depends on the changed layers executed; `lazy` and `combined` measure what looks best. Random
weights, one batch; passes are MACs over those of one forward pass."""

_FRONTIER = """One search of all budgets (objective: divergence from the float network, stored
norm statistics), then divergence and top-1 on images that the search did not see. "searched" is
the best that the search knows for at most the BitOPs of the uniform precision beside it."""

_COMPARE = """Divergence over that of the best uniform configuration that fits, lower is better:
mean over seeds and range; in brackets the evaluations. A seed chooses the images to search on,
and what evolution and random search draw; these two take as many evaluations as `combined` did."""


def write_page(records: Iterable[Record], docs: Path) -> None:
    """Write the part of `results.md` between the markers, and the plots."""
    pictures = docs / "images"
    pictures.mkdir(parents=True, exist_ok=True)
    by_kind: dict[str, list[Record]] = {"work": [], "frontier": [], "compare": []}
    for record in records:
        by_kind[record["kind"]].append(record)
    lines = ["## The search", "", *work_section(by_kind["work"])]
    lines += frontier_section(by_kind["frontier"], pictures)
    lines += compare_section(by_kind["compare"], pictures)
    write_part(docs / "results.md", "search", "benchmarks.search render", "\n".join(lines).rstrip())


# --- Work saved -----------------------------------------------------------------------------------

_WORK_HEADER = ["network, budget, images", "search", "evaluations", "layer executions", "saved"]
_WORK_HEADER += ["passes", "saved", "divergence", "s"]


def work_section(records: list[Record]) -> list[str]:
    """Evaluations and layer executions of one search, by algorithm."""
    by_network: dict[str, dict[str, Record]] = {}
    for record in records:
        by_network.setdefault(record["network"], {})[record["algorithm"]] = record
    rows: list[list[str]] = []
    for network, by_algorithm in by_network.items():
        rows += _work_rows(network, by_algorithm)
    table = markdown(pd.DataFrame(rows, columns=_WORK_HEADER), texts=2)
    measured = origin([{**record, "seed": 0} for record in records])
    lines = ["### Work saved", "", _WORK, "", table, ""]
    return [*lines, f"{measured} `python -m benchmarks.search work`", ""]


def _work_rows(network: str, by_algorithm: dict[str, Record]) -> list[list[str]]:
    greedy = by_algorithm["greedy"]
    asked = greedy["asked"]
    layer_runs = asked * greedy["layers"] * greedy["batches"]
    # Older records had no choice of images.
    images = f"{greedy.get('images', 32)} images of {greedy.get('size', 64)} px"
    naive = [f"`{network}`, {greedy['budget']}, {images}", "naive", str(asked), str(layer_runs)]
    rows = [[*naive, "1", str(asked), "1", "", ""]]
    for algorithm, record in by_algorithm.items():
        passes = record["passes_of_macs"]
        rows.append(
            [
                "",
                algorithm,
                str(record["evaluations"]),
                str(record["layer_runs"]),
                f"{layer_runs / record['layer_runs']:.2f}",
                f"{passes:.0f}",
                f"{asked / passes:.2f}",
                f"{record['score']:.4g}",
                f"{record['seconds']:.0f}",
            ]
        )
    return rows


# --- Frontiers ------------------------------------------------------------------------------------

_FRONTIER_HEADER = ["MBitOPs", "share used", "divergence: uniform", "searched"]
_FRONTIER_HEADER += ["on other images: uniform", "searched", "top-1 %: uniform", "searched", "gain"]

_FIGURES = ["bitops", "divergence", "on other images", "top1"]
"""What a record has for each configuration."""


def frontier_section(records: Iterable[Record], pictures: Path) -> list[str]:
    """Uniform and searched configurations, a table for each network, and a plot for all."""
    latest = {record["case"]: record for record in records}
    lines = ["### Frontiers", "", _FRONTIER, ""]
    for case, record in latest.items():
        evaluated = f"{record['evaluations']} evaluations"
        if record["known"]:
            evaluated += f" (with the {record['known']} scores of earlier searches at hand)"
        described = (
            f"`{case}`: {record['layers']} layers, {record['images']} images to search on, "
            f"{record['report_images']} to report on, {evaluated} in {record['seconds']:.0f} s; "
            f"the float network has {record['float']:.1f} %."
        )
        table = markdown(frontier_table(record), texts=0)
        lines += [described, "", table, "", origin([record]), ""]
    if latest:
        draw_frontiers(latest, pictures / "search-frontiers.png")
        lines += ["![Top-1 against BitOPs](images/search-frontiers.png)", ""]
    return lines


def frontier_table(record: Record) -> pd.DataFrame:
    """Each uniform configuration beside the best one of at most its BitOPs."""
    uniform = pd.DataFrame(record["uniform"], columns=_FIGURES)
    best = pd.DataFrame(record["searched"], columns=_FIGURES)
    columns = [
        (uniform["bitops"] / 1e6).map("{:.4g}".format),
        (best["bitops"] / uniform["bitops"]).map("{:.3f}".format),
        uniform["divergence"].map("{:.4f}".format),
        best["divergence"].map("{:.4f}".format),
        uniform["on other images"].map("{:.4f}".format),
        best["on other images"].map("{:.4f}".format),
        uniform["top1"].map("{:.1f}".format),
        best["top1"].map("{:.1f}".format),
        (best["top1"] - uniform["top1"]).map("{:+.1f}".format),
    ]
    return pd.concat(columns, axis=1).set_axis(_FRONTIER_HEADER, axis=1)


def draw_frontiers(latest: dict[str, Record], file: Path) -> None:
    """Top-1 on held-out images against BitOPs, a panel for each network."""
    figure, axes = panels_of(len(latest))
    for axis, (case, record) in zip(axes, latest.items(), strict=True):
        for name, style, color in (("uniform", "o-", "#4269d0"), ("searched", "D-", "#ff725c")):
            points = pd.DataFrame(record[name], columns=_FIGURES).sort_values(["bitops", "top1"])
            costs = points["bitops"] / 1e6
            axis.plot(costs, points["top1"], style, color=color, markersize=4, label=name)
        axis.axhline(record["float"], color="#6b6b6b", linestyle="--", linewidth=1, label="float")
        label_cost_and_score(axis, cost="BitOPs of one image, in M", score="top-1 accuracy, %")
        axis.set_title(case)
        axis.legend(loc="lower right")
    figure.savefig(file)


# --- Algorithms -----------------------------------------------------------------------------------

_COLORS = ("#ff725c", "#efb118", "#3ca951", "#4269d0", "#9c9c9c", "#a463f2")


def compare_section(records: list[Record], pictures: Path) -> list[str]:
    """What each algorithm found, by network and budget."""
    if not records:
        return []
    table = markdown(compare_table(records), texts=2)
    lines = ["### Against other algorithms", "", _COMPARE, "", table, ""]
    lines += [f"{origin(records)} `python -m benchmarks.search compare --case CASE`", ""]
    draw_progress(records, pictures / "search-algorithms.png")
    lines += ["Best divergence so far against evaluations; a line is a seed.", ""]
    return [*lines, "![Divergence against evaluations](images/search-algorithms.png)", ""]


def compare_table(records: list[Record]) -> pd.DataFrame:
    """Divergence over that of the uniform configuration, a column for each algorithm."""
    searches = pd.DataFrame(records)
    searches["network, norms"] = "`" + searches["case"] + "`, " + searches["norms"]
    searches["ratio"] = searches["score"] / searches["uniform"]
    groups = searches.groupby(["network, norms", "budget", "algorithm"], sort=False)
    counts = groups["evaluations"].mean().map("{:.0f}".format)
    cells = groups["ratio"].agg(_spread) + " (" + counts + ")"
    return cells.unstack("algorithm", fill_value="", sort=False).reset_index()


def _spread(values: pd.Series[float]) -> str:
    text = f"{statistics.fmean(values):.3f}"
    if len(values) > 1:
        text += f", {min(values):.2f} to {max(values):.2f}"
    return text


def draw_progress(records: list[Record], file: Path) -> None:
    """Best so far against evaluations, of the first network, a panel for each budget."""
    searches = pd.DataFrame(records)
    case, norms = records[0]["case"], records[0]["norms"]
    searches = searches[(searches["case"] == case) & (searches["norms"] == norms)]
    colors = dict(zip(searches["algorithm"].unique(), _COLORS, strict=False))
    by_budget = searches.groupby("budget", sort=False)
    figure, axes = panels_of(len(by_budget))
    for axis, (budget, of_budget) in zip(axes, by_budget, strict=True):
        for algorithm, color in colors.items():
            of_algorithm = of_budget[of_budget["algorithm"] == algorithm]
            _draw_traces(axis, of_algorithm.to_dict("records"), color, str(algorithm))
        axis.set(title=f"{case}, {budget}", xlabel="evaluations", ylim=(None, 1.1))
        axis.set(ylabel="divergence over that of the best uniform")
        axis.grid(visible=True, alpha=0.3)
        axis.legend()
    figure.savefig(file)


def _draw_traces(axis: Any, searches: list[Record], color: str, label: str) -> None:
    """A line for each search, which ends at its last evaluation; only the first has a label."""
    for number, search in enumerate(searches):
        counts, scores = zip(*search["trace"], strict=True)
        counts = (*counts, search["evaluations"])
        ratios = pd.Series((*scores, search["score"])) / search["uniform"]
        axis.step(
            counts,
            ratios,
            where="post",
            color=color,
            linewidth=1.3,
            label=None if number else label,
        )

"""The search's part of `docs/results.md`: tables and pictures, all from the records of `search.py`."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from anyprec.report.figures import label_cost_and_score
from benchmarks.common.pages import origin, table, write_part
from benchmarks.study.plots import panels_of

Record = dict[str, Any]

_WORK = """`naive` runs the whole network for each move that the paper's greedy search asks for, up and down; `greedy` is
the same search with every configuration measured once and only what depends on the changed layers executed; `lazy` and
`combined` measure what looks best. Random weights, one batch; passes are MACs over those of one forward pass."""

_FRONTIER = """One search of all budgets (objective: divergence from the float network, stored norm statistics), then
divergence and top-1 on images that the search did not see. "searched" is the best that the search knows for at most the
BitOPs of the uniform precision beside it."""

_COMPARE = """Divergence over that of the best uniform configuration that fits, lower is better: mean over seeds and range;
in brackets the evaluations. A seed chooses the images to search on, and what evolution and random search draw; these two
take as many evaluations as `combined` did."""


def write_page(records: Iterable[Record], docs: Path) -> None:
    """Write the part of `results.md` between the markers, and the pictures."""
    kept = list(records)
    pictures = docs / "images"
    pictures.mkdir(parents=True, exist_ok=True)
    lines = ["## The search", ""]
    for section in (
        work_section(kept),
        frontier_section(kept, pictures),
        compare_section(kept, pictures),
    ):
        lines += section
    write_part(docs / "results.md", "search", "benchmarks.search render", "\n".join(lines).rstrip())


def of_kind(records: Iterable[Record], kind: str) -> list[Record]:
    """The records of one command."""
    return [record for record in records if record["kind"] == kind]


# --- Work saved ---------------------------------------------------------------------------------------------------


def work_section(records: Iterable[Record]) -> list[str]:
    """Evaluations and layer executions of one search, by algorithm."""
    done = of_kind(records, "work")
    rows = []
    for network in dict.fromkeys(record["network"] for record in done):
        by_name = {record["algorithm"]: record for record in done if record["network"] == network}
        greedy = by_name["greedy"]
        asked, per_pass = greedy["asked"], greedy["layers"] * greedy["batches"]
        cells = [str(asked), str(asked * per_pass), "1", str(asked), "1", "", ""]
        images = f"{greedy.get('images', 32)} images of {greedy.get('size', 64)} px"  # older records had no choice
        rows.append([f"`{network}`, {greedy['budget']}, {images}", "naive", *cells])
        for name, record in by_name.items():
            saved, passes = asked * per_pass / record["layer_runs"], record["passes_of_macs"]
            cells = [
                str(record["evaluations"]),
                str(record["layer_runs"]),
                f"{saved:.2f}",
                f"{passes:.0f}",
            ]
            cells += [f"{asked / passes:.2f}", f"{record['score']:.4g}", f"{record['seconds']:.0f}"]
            rows.append(["", name, *cells])
    header = (
        "network, budget, images",
        "search",
        "evaluations",
        "layer executions",
        "saved",
        "passes",
        "saved",
        "divergence",
        "s",
    )
    lines = ["### Work saved", "", _WORK, "", *table(header, rows, texts=2)]
    return [
        *lines,
        "",
        f"{origin([{**record, 'seed': 0} for record in done])} `python -m benchmarks.search work`",
        "",
    ]


# --- Frontiers ----------------------------------------------------------------------------------------------------


def frontier_section(records: Iterable[Record], pictures: Path) -> list[str]:
    """Uniform and searched configurations, a table for each network, and a picture for all."""
    latest = {record["case"]: record for record in of_kind(records, "frontier")}
    lines = ["### Frontiers", "", _FRONTIER, ""]
    for case, record in latest.items():
        evaluated = f"{record['evaluations']} evaluations"
        if record["known"]:
            evaluated += f" (with the {record['known']} scores of earlier searches at hand)"
        shown = f"`{case}`: {record['layers']} layers, {record['images']} images to search on, "
        shown += (
            f"{record['report_images']} to report on, {evaluated} in {record['seconds']:.0f} s; "
        )
        lines += [f"{shown}the float network has {record['float']:.1f} %.", ""]
        rows = []
        for uniform, best in zip(record["uniform"], record["searched"], strict=True):
            cells = [f"{uniform[0] / 1e6:.4g}", f"{best[0] / uniform[0]:.3f}"]
            cells += [
                f"{value:.4f}"
                for pair in zip(uniform[1:3], best[1:3], strict=True)
                for value in pair
            ]
            rows.append(
                [*cells, f"{uniform[3]:.1f}", f"{best[3]:.1f}", f"{best[3] - uniform[3]:+.1f}"]
            )
        header = ("MBitOPs", "share used", "divergence: uniform", "searched", "on other images: uniform", "searched",
                  "top-1 %: uniform", "searched", "gain")  # fmt: skip
        lines += [*table(header, rows, texts=0), "", f"{origin([record])}", ""]
    if latest:
        draw_frontiers(latest, pictures / "search-frontiers.png")
        lines += ["![Top-1 against BitOPs](images/search-frontiers.png)", ""]
    return lines


def draw_frontiers(latest: dict[str, Record], path: Path) -> None:
    """Top-1 on held-out images against BitOPs, a panel for each network."""
    figure, axes = panels_of(len(latest))
    for axis, (case, record) in zip(axes, latest.items(), strict=True):
        for name, style, color in (("uniform", "o-", "#4269d0"), ("searched", "D-", "#ff725c")):
            points = sorted((cost / 1e6, accuracy) for cost, *_, accuracy in record[name])
            axis.plot(*zip(*points, strict=True), style, color=color, markersize=4, label=name)
        axis.axhline(record["float"], color="#6b6b6b", linestyle="--", linewidth=1, label="float")
        label_cost_and_score(axis, cost="BitOPs of one image, in M", score="top-1 accuracy, %")
        axis.set_title(case)
        axis.legend(loc="lower right")
    figure.savefig(path)


# --- Algorithms ---------------------------------------------------------------------------------------------------


def compare_section(records: Iterable[Record], pictures: Path) -> list[str]:
    """What each algorithm found, by network and budget."""
    done = of_kind(records, "compare")
    if not done:
        return []
    names = list(dict.fromkeys(record["algorithm"] for record in done))
    rows = []
    groups = dict.fromkeys((record["case"], record["norms"], record["budget"]) for record in done)
    for case, norms, budget in groups:
        here = [
            record
            for record in done
            if (record["case"], record["norms"], record["budget"]) == (case, norms, budget)
        ]
        cells = []
        for name in names:
            ratios = [
                record["score"] / record["uniform"]
                for record in here
                if record["algorithm"] == name
            ]
            counts = [record["evaluations"] for record in here if record["algorithm"] == name]
            cells.append(f"{_spread(ratios)} ({statistics.fmean(counts):.0f})" if ratios else "")
        rows.append([f"`{case}`, {norms}", budget, *cells])
    lines = ["### Against other algorithms", "", _COMPARE, ""]
    lines += [*table(("network, norms", "budget", *names), rows, texts=2), ""]
    lines += [f"{origin(done)} `python -m benchmarks.search compare --case CASE`", ""]
    draw_progress(done, pictures / "search-algorithms.png")
    lines += ["Best divergence so far against evaluations; a line is a seed.", ""]
    return [*lines, "![Divergence against evaluations](images/search-algorithms.png)", ""]


def draw_progress(records: Sequence[Record], path: Path) -> None:
    """Best so far against evaluations, of the first network, a panel for each budget."""
    case, norms = records[0]["case"], records[0]["norms"]
    here = [record for record in records if (record["case"], record["norms"]) == (case, norms)]
    budgets = list(dict.fromkeys(record["budget"] for record in here))
    names = list(dict.fromkeys(record["algorithm"] for record in here))
    figure, axes = panels_of(len(budgets))
    for axis, budget in zip(axes, budgets, strict=True):
        for name, color in zip(
            names, ("#ff725c", "#efb118", "#3ca951", "#4269d0", "#9c9c9c", "#a463f2"), strict=False
        ):
            label: str | None = name
            for record in here:
                if (record["budget"], record["algorithm"]) == (budget, name):
                    steps = [*record["trace"], [record["evaluations"], record["score"]]]
                    shares = [best / record["uniform"] for _, best in steps]
                    counts = [count for count, _ in steps]
                    axis.step(counts, shares, where="post", color=color, linewidth=1.3, label=label)
                    label = None
        axis.set(
            title=f"{case}, {budget}",
            xlabel="evaluations",
            ylabel="divergence over that of the best uniform",
            ylim=(None, 1.1),
        )
        axis.grid(visible=True, alpha=0.3)
        axis.legend()
    figure.savefig(path)


def _spread(values: Sequence[float]) -> str:
    text = f"{statistics.fmean(values):.3f}"
    return text if len(values) == 1 else f"{text}, {min(values):.2f} to {max(values):.2f}"

"""Tables and plots of results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

import anyprec
from anyprec.report.agreement import agreement_plot
from anyprec.report.frontiers import frontier_plot, frontier_table
from anyprec.report.plots import plot_accuracy
from anyprec.report.results import Result
from anyprec.report.tables import results_markdown, results_table


@pytest.fixture
def results(net: anyprec.ConvertedModel) -> list[Result]:
    return [
        Result("float", "float", 90.0, anyprec.cost_of(net, None)),
        Result("W2A2", "uniform", 70.0, anyprec.cost_of(net, 2)),
        Result("W8A8", "uniform", 89.95, anyprec.cost_of(net, 8)),
        Result("searched W4A4", "searched", 88.0, anyprec.cost_of(net, 4)),
    ]


def test_the_table_has_a_line_for_each_result_with_its_figures(results: list[Result]) -> None:
    console = Console(width=100, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(results_table(results, title="all of it"))
    text = console.export_text()
    console.file.close()
    assert "all of it" in text
    line = next(line for line in text.splitlines() if "searched W4A4" in line)
    cost = results[-1].cost
    for figure in (
        "88.0",
        f"{cost.bitops / 1e9:.4g}",
        f"{cost.size / 8 / 2**20:.3f}",
        f"{cost.average_bits:.2f}",
    ):
        assert figure in line


def test_markdown_has_the_same_lines(results: list[Result]) -> None:
    lines = results_markdown(results).splitlines()
    assert len(lines) == 2 + len(results)
    assert lines[2].startswith("| float | 90.0 |")
    assert len({line.count("|") for line in lines}) == 1


def test_results_of_one_kind_stand_together(results: list[Result]) -> None:
    assert [row.end_section for row in results_table(results).rows] == [True, False, True, False]


def test_a_frontier_shows_accuracy_where_it_was_measured(results: list[Result]) -> None:
    cost = results[1].cost
    rows = [("W2A2", cost, 0.5, None), ("searched", cost, 0.25, 71.5)]
    table = frontier_table(rows, objective="loss", title="frontier")
    header = ["configuration", "GBitOPs", "MiB", "average bits", "loss", "top-1 %"]
    assert [column.header for column in table.columns] == header
    assert list(table.columns[-1].cells) == ["", "71.50"]
    assert list(table.columns[-2].cells) == ["0.5000", "0.2500"]
    assert [row.style for row in table.rows] == [None, "bold"]
    figures = {column.header: next(iter(column.cells)) for column in table.columns}
    assert figures["GBitOPs"] == f"{cost.bitops / 10**9:.4g}"
    assert figures["MiB"] == f"{cost.size / 2**23:.3f}"
    without = frontier_table([(*row[:3], None) for row in rows], objective="loss")
    assert [column.header for column in without.columns] == header[:-1]


def test_the_plot_has_a_series_for_each_kind(
    results: list[Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = []
    real = Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda self, *a, **k: labels.append((k["label"], a[0])) or real(self, *a, **k)
    )
    plot_accuracy(results, tmp_path / "plot.png", title="accuracy")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert [label for label, _ in labels] == ["uniform", "searched"]
    assert labels[0][1] == sorted(labels[0][1])


@pytest.mark.parametrize(
    ("cost", "one", "label"),
    [
        ("bitops", 10**9, "BitOPs of one image, in G"),
        ("size", 2**23, "size of the quantized weights, in MiB"),
        ("latency", 0.001, "latency, in ms"),
        ("energy", 1, "energy"),
    ],
)
def test_a_frontier_is_plotted_in_the_unit_that_its_label_names(
    cost: str, one: float, label: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[float]] = []
    all_axes: set[Axes] = set()
    plot = Axes.plot

    def record(axes: Axes, costs: list[float], *args: Any, **options: Any) -> Any:
        drawn.append(list(costs))
        all_axes.add(axes)
        return plot(axes, costs, *args, **options)

    monkeypatch.setattr(Axes, "plot", record)
    series = {"searched": [(2 * one, 0.5), (one, 0.7)]}
    frontier_plot(series, tmp_path / "f.png", cost=cost, score="loss", chosen=[(2 * one, 0.5)])
    assert drawn == [[1, 2], [2]]
    assert [axes.get_xlabel() for axes in all_axes] == [f"{label} (log scale)"]


SHARES = {"stem": (100.0, 100.0), "fc": (90.0, 99.5)}
LOGIT_PAIRS = ((0.0, 0.1), (1.0, 1.0), (-2.0, -2.1))


def axes_of_agreement(
    shares: dict[str, tuple[float, float]], path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[Any]:
    saved: list[Any] = []
    original = Figure.savefig

    def note(figure: Any, *args: Any, **kwargs: Any) -> None:
        saved.append(figure)
        original(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", note)
    agreement_plot(shares, LOGIT_PAIRS, path, title="network.onnx")
    assert path.stat().st_size > 0
    (figure,) = saved
    assert figure.get_suptitle() == "network.onnx"
    return figure.axes


def test_agreement_has_equal_codes_of_each_layer_and_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes, logits = axes_of_agreement(SHARES, tmp_path / "plot.png", monkeypatch)
    lines = {line.get_label(): list(line.get_ydata()) for line in codes.lines}
    assert lines == {"whole network": [100.0, 90.0], "each layer alone": [100.0, 99.5]}
    assert [label.get_text() for label in codes.get_xticklabels()] == ["stem", "fc"]
    diagonal, points = logits.lines
    assert list(zip(*points.get_data(), strict=True)) == list(LOGIT_PAIRS)
    assert [tuple(data) for data in diagonal.get_data()] == [(-2.1, 1.0), (-2.1, 1.0)]


def test_without_codes_agreement_has_logits_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (logits,) = axes_of_agreement({}, tmp_path / "plot.svg", monkeypatch)
    assert logits.get_ylabel() == "logit of the file"

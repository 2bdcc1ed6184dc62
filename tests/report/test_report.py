"""Tables and plots of results."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.axes import Axes
from rich.console import Console

import anyprec
from anyprec.report.frontiers import frontier_table
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

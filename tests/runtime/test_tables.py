"""Tables: nothing is cut off, nothing is read as markup."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from anyprec.runtime.tables import TableContent

LONG = "stages.3.blocks." * 20 + "conv[0]"


@pytest.fixture
def content() -> TableContent:
    rows = [("head[1-9] [red]", "1,000", ""), (LONG, "20", "excluded by 'a b'")]
    return TableContent(("layer", "weights", "reason"), rows, numbers=("weights",), title="a [b]")


def test_text_shows_every_cell_on_one_line_whatever_the_terminal(
    content: TableContent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    width = len(LONG)
    assert content.text().splitlines() == [
        "a [b]",
        f"{'layer':{width}}  weights  reason",
        f"{'head[1-9] [red]':{width}}    1,000",
        f"{LONG}       20  excluded by 'a b'",
    ]


def test_text_without_a_title_starts_with_the_header() -> None:
    assert TableContent(("a", "b"), [("1", "2")]).text() == "a  b\n1  2"


def test_text_is_a_string_in_a_notebook_too(
    content: TableContent, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert "excluded by 'a b'" in content.text()


@pytest.mark.parametrize("width", [40, 80, 1000])
def test_a_narrow_terminal_folds_cells_and_cuts_nothing_off(
    content: TableContent, width: int
) -> None:
    output = io.StringIO()
    Console(file=output, width=width).print(content.rich())
    lines = [line.split("│")[1:-1] for line in output.getvalue().splitlines() if "│" in line]
    columns = ["".join(cell.strip() for cell in column) for column in zip(*lines, strict=True)]
    assert columns[0].replace(" ", "") == f"head[1-9][red]{LONG}"
    assert columns[1] == "1,00020"
    assert columns[2].replace(" ", "") == "excludedby'ab'"


def test_markdown_has_a_ruler_that_aligns_numbers(content: TableContent) -> None:
    assert content.markdown().splitlines() == [
        "| layer | weights | reason |",
        "| --- | ---: | --- |",
        "| head[1-9] [red] | 1,000 |  |",
        f"| {LONG} | 20 | excluded by 'a b' |",
    ]

"""Tables for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from anyprec.report.results import Result

_HEADER = ("configuration", "top-1 %", "GBitOPs", "weights MiB", "average weight bits")


def results_table(results: Sequence[Result], *, title: str = "") -> Table:
    """A rich table of results, a line each; print it with `rich.print`."""
    table = Table(title=title or None)
    for index, column in enumerate(_HEADER):
        table.add_column(column, justify="left" if index == 0 else "right")
    for before, result in zip((None, *results), results, strict=False):
        if before is not None and before.kind != result.kind:
            table.add_section()
        table.add_row(*_cells(result))
    return table


def results_markdown(results: Sequence[Result]) -> str:
    """The same table in Markdown."""
    lines = [
        _HEADER,
        ("---", *["---:"] * (len(_HEADER) - 1)),
        *(_cells(result) for result in results),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cells(result: Result) -> tuple[str, ...]:
    return (
        result.name,
        f"{result.accuracy:.1f}",
        f"{result.cost.bitops / 1e9:.4g}",
        f"{result.cost.size / 8 / 2**20:.3f}",
        f"{result.cost.average_bits:.2f}",
    )

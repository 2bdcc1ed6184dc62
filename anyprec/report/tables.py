"""Tables of measured results, for the terminal and as Markdown."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from rich.table import Table

from anyprec.report.results import Result
from anyprec.runtime.tables import TableContent


def results_table(results: Sequence[Result], *, title: str = "") -> Table:
    """A rich table of results, a line each; print it with `rich.print`."""
    table = _content(results, title).rich()
    for row, (result, following) in zip(table.rows, itertools.pairwise(results), strict=False):
        row.end_section = result.kind != following.kind
    return table


def results_markdown(results: Sequence[Result]) -> str:
    """The same table in Markdown."""
    return _content(results).markdown()


def _content(results: Sequence[Result], title: str = "") -> TableContent:
    numbers = ("top-1 %", "GBitOPs", "weights MiB", "average weight bits")
    rows = []
    for result in results:
        cost = result.cost
        gigabitops = f"{cost.bitops / 1e9:.4g}"
        mebibytes = f"{cost.size / 8 / 2**20:.3f}"
        average = f"{cost.average_bits:.2f}"
        rows.append((result.name, f"{result.accuracy:.1f}", gigabitops, mebibytes, average))
    return TableContent(("configuration", *numbers), rows, numbers, title)

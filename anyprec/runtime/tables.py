"""Tables: a header and rows of text, for a terminal (rich), as plain text, and as Markdown."""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from rich.console import Console, JustifyMethod
from rich.markup import escape
from rich.table import Table

_UNLIMITED = 100_000
"""Characters on a line that no table reaches."""


@dataclass(frozen=True)
class TableContent:
    """What a table shows, apart from how.

    Attributes:
        header: Names of the columns.
        rows: A cell for each column; their text is shown as it is.
        numbers: Names of the columns whose cells are aligned to the right.
        title: Above the table; empty for none.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Collection[str] = ()
    title: str = ""

    def rich(self) -> Table:
        """For `rich.print`; a cell that is too wide for the terminal is folded, not cut off."""
        table = Table(title=escape(self.title) or None)
        for name in self.header:
            justify: JustifyMethod = "right" if name in self.numbers else "left"
            table.add_column(escape(name), justify=justify, overflow="fold")
        for row in self.rows:
            # Paths and patterns may hold brackets, which rich would read as markup.
            table.add_row(*map(escape, row))
        return table

    def text(self) -> str:
        """For `str`: every cell in full on one line, without colours, whatever the terminal."""
        table = self.rich()
        table.title = None
        table.box = None
        table.pad_edge = False
        table.padding = (0, 2, 0, 0)
        table.header_style = ""
        output = io.StringIO()
        console = Console(
            file=output, width=_UNLIMITED, color_system=None, emoji=False, force_jupyter=False
        )
        console.print(table)
        lines = [line.rstrip() for line in output.getvalue().splitlines()]
        if self.title:
            lines.insert(0, self.title)
        return "\n".join(lines)

    def markdown(self) -> str:
        """A Markdown table, without the title."""
        ruler = ["---:" if name in self.numbers else "---" for name in self.header]
        lines = [self.header, ruler, *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

"""What people see while something runs: progress bars with rich.

A bar is shown on a terminal only, and only by rank 0 of a distributed run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from anyprec.runtime.processes import is_first_process


class Bar:
    """One progress bar: `advance` moves it, `note` is the text at its end."""

    def __init__(self, progress: Progress, description: str, total: int | None) -> None:
        self._progress = progress
        self._task = progress.add_task(description, total=total, note="")

    def expect(self, total: int | None) -> None:
        """Say how many steps there will be, as far as is known now."""
        self._progress.update(self._task, total=total)

    def advance(self, steps: int = 1, *, note: str | None = None) -> None:
        """Move on by `steps`, and change the text at the end."""
        self._progress.update(self._task, advance=steps)
        if note is not None:
            self._progress.update(self._task, note=note)


@contextmanager
def progress_bar(description: str, total: int | None, *, show: bool) -> Iterator[Bar]:
    """A bar with steps done, elapsed and remaining time, shown while the `with` block runs.

    Args:
        description: What is going on.
        total: Steps to come, or None if unknown.
        show: False shows nothing, whatever the terminal.
    """
    console = Console(stderr=True)
    columns: list[ProgressColumn] = [
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    ]
    visible = show and console.is_terminal and is_first_process()
    with Progress(*columns, console=console, disable=not visible, transient=True) as progress:
        yield Bar(progress, description, total)

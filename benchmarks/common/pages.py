"""Parts of pages that are written from records: tables, their origin, text between markers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd


def write_part(page: Path, name: str, command: str, text: str) -> None:
    """Put `text` between the markers of a part; without markers, at the end of the page."""
    begin, end = f"<!-- {name}: written by {command} -->", f"<!-- end of the {name} -->"
    old = "# Results\n"
    if page.exists():
        old = page.read_text()
    part = f"{begin}\n\n{text}\n\n{end}"
    if begin in old:
        before, _, rest = old.partition(begin)
        page.write_text(before + part + rest.partition(end)[2])
    else:
        page.write_text(f"{old.rstrip()}\n\n{part}\n")


def markdown(table: pd.DataFrame, *, texts: int = 1) -> str:
    """A table of text cells; all columns but the first `texts` are numbers."""
    alignment = ["left"] * texts + ["right"] * (table.shape[1] - texts)
    # Numbers are formatted already: without `disable_numparse`, 0.20 would become 0.2.
    return table.to_markdown(index=False, colalign=alignment, disable_numparse=True)


def origin(records: Sequence[Mapping[str, Any]]) -> str:
    """Seeds, machines and commits of records."""
    seeds = sorted({record["seed"] for record in records})
    machines = sorted({_machine(record["machine"]) for record in records})
    commits = sorted({record["commit"] for record in records})
    word = _plural("Seed", len(seeds))
    listed = ", ".join(map(str, seeds))
    return f"({word} {listed}; {'; '.join(machines)}; commit {', '.join(commits)}.)"


def _machine(described: Mapping[str, Any]) -> str:
    threads = f"{described['threads']} {_plural('thread', described['threads'])}"
    versions = f"torch {described['torch']}, timm {described['timm']}"
    return f"{described['processor']}, {threads}, {versions}"


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"

"""Parts of pages that are written from records: tables, what they were measured on, and where they stand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def write_part(page: Path, name: str, command: str, text: str) -> None:
    """Put `text` between the markers of a part, which is made at the end of the page if there is none."""
    begin, end = f"<!-- {name}: written by {command} -->", f"<!-- end of the {name} -->"
    old = page.read_text() if page.exists() else "# Results\n"
    part = f"{begin}\n\n{text}\n\n{end}"
    if begin in old:
        before, _, rest = old.partition(begin)
        page.write_text(before + part + rest.partition(end)[2])
    else:
        page.write_text(f"{old.rstrip()}\n\n{part}\n")


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, texts: int = 1) -> list[str]:
    """Markdown; all columns but the first `texts` are numbers."""
    ruler = ["---"] * texts + ["---:"] * (len(header) - texts)
    return [f"| {' | '.join(line)} |" for line in (header, ruler, *rows)]


def origin(records: Sequence[Mapping[str, Any]]) -> str:
    """Seeds, machines and commits of records."""
    seeds = sorted({record["seed"] for record in records})
    machines = sorted({_machine(record["machine"]) for record in records})
    commits = sorted({record["commit"] for record in records})
    shown = "seed" if len(seeds) == 1 else "seeds"
    listed = ", ".join(str(seed) for seed in seeds)
    return f"({shown.capitalize()} {listed}; {'; '.join(machines)}; commit {', '.join(commits)}.)"


def _machine(of: Mapping[str, Any]) -> str:
    threads = f"{of['threads']} thread{'s' if of['threads'] > 1 else ''}"
    return f"{of['processor']}, {threads}, torch {of['torch']}, timm {of['timm']}"

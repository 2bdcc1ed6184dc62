"""docs/calibration.md, from the records: `python -m benchmarks.calibration.page`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.common import pages, records

RESULTS = records.ROOT / "benchmarks" / "results" / "calibration.jsonl"
PAGE = records.ROOT / "docs" / "calibration.md"
COMMAND = "python -m benchmarks.calibration.page"

COLUMNS = ("float", "8", "6", "5", "4", "3", "2", "W4A8", "W3A8", "mixes around 4")
"""The configurations of a record, in its order; all that are left are mixes."""

Record = Mapping[str, Any]


def write_page(page: Path, measured: Sequence[Record]) -> None:
    """Write the table into the page."""
    table = table_of([record for record in measured if record["kind"] == "lite0"])
    last = measured[-1]
    machine = last["machine"]
    origin = f"({machine['processor']}, {machine['threads']} threads, torch {machine['torch']}, "
    origin += f"timm {machine['timm']}; commit {last['commit']}.)"
    text = f"{origin}\n\n{pages.markdown(table, texts=2)}"
    pages.write_part(page, "calibration", COMMAND, text)


def table_of(measured: Sequence[Record]) -> pd.DataFrame:
    """Two rows for each run."""
    rows: list[tuple[str, ...]] = []
    for record in measured:
        for number, name in enumerate(("calibrated", "reconstructed")):
            label = f"{name}, {record['steps']} steps" if number else name
            seconds = f"{record['seconds'][number]:.0f}"
            rows.append((f"split {record['split']}", label, *_cells(record[name]), seconds))
    return pd.DataFrame(rows, columns=["images", "weights", *COLUMNS, "s"])


def line_of(record: Record) -> str:
    """Both rows of a run, as text."""
    return str(table_of([record]).to_string(index=False))


def _cells(accuracies: Sequence[float]) -> list[str]:
    alone = len(COLUMNS) - 1
    cells = [f"{value:.1f}" for value in accuracies[:alone]]
    return [*cells, " ".join(f"{value:.1f}" for value in accuracies[alone:])]


if __name__ == "__main__":
    write_page(PAGE, records.read(RESULTS))

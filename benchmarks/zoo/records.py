"""Results of the zoo: one record per model, and in what a model falls short."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.common import records


def read_last(file: Path) -> dict[str, dict[str, Any]]:
    """The last record of every model, by name."""
    return {record["name"]: record for record in records.read(file)}


def shortfalls(record: dict[str, Any]) -> list[str]:
    """Everything in which a model falls short, in words."""
    if "died" in record:
        return [record["died"]]
    texts = []
    for check, reason in record["structure"]["broken"].items():
        texts.append(f"{check}: {reason}")
    for check, reason in record["features"].items():
        if check != "none":
            texts.append(f"as feature extractor: {check}: {reason}")
    if record["numbers"] is not None:
        size = record["arguments"].get("size")
        for check, reason in record["numbers"]["broken"].items():
            texts.append(f"at size {size}: {check}: {reason}")
    return texts

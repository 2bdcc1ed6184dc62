"""The page of exported networks, from the records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.common import pages

Records = Sequence[Mapping[str, Any]]


def write_page(page: Path, records: Records) -> None:
    """Write each part of the page that there are records for."""
    families = list({r["name"]: r for r in records if r["kind"] == "family"}.values())
    if families:
        text = families_text(families)
        pages.write_part(page, "families", "python -m benchmarks.deployment render", text)
    equal = [record for record in records if record["kind"] == "equality"]
    if equal:
        text = equality_text(equal)
        pages.write_part(page, "equality", "python -m benchmarks.deployment render", text)
    compared = [record for record in records if record["kind"] == "accuracy"]
    if compared:
        text = accuracy_text(compared)
        pages.write_part(page, "accuracy", "python -m benchmarks.deployment render", text)
    trained = [record for record in records if record["kind"] == "trained"]
    if trained:
        text = trained_text(trained)
        pages.write_part(page, "trained", "python -m benchmarks.deployment render", text)
    timed = [record for record in records if record["kind"] == "speed"]
    if timed:
        text = speed_text(timed)
        pages.write_part(page, "speed", "python -m benchmarks.deployment render", text)


def accuracy_text(records: Records) -> str:
    """A row for each file of EfficientNet-Lite0."""
    rows = []
    for record in records:
        weight, activation = record["bits"]
        rows.append(
            {
                "placement": record["placement"],
                "target": record["target"],
                "bits": f"W{weight}A{activation}",
                "difference": f"{record['mean']:.4f}",
                "of float64": f"{record['noise']:.4f}",
                "same class": f"{record['agreeing']} of {record['images']}",
                "top-1 %": f"{record['accuracy']:.1f}",
                "top-1 % of the file": f"{record['file_accuracy']:.1f}",
                "MB": f"{record['bytes'] / 1e6:.2f}",
            }
        )
    return pages.markdown(pd.DataFrame(rows), texts=3)


def equality_text(records: Records) -> str:
    """A row for each network and precision: `integer()` against onnxruntime."""
    rows = [
        {
            "network": record["name"],
            "bits": record["bits"],
            "equal": "bit for bit" if record["equal"] else f"{record['difference']:.1e}",
            "operators on codes": str(record["integer_operators"]),
            "others": str(record["floating_operators"]),
            "of onnxruntime": str(record["onnxruntime_operators"]),
        }
        for record in records
    ]
    return pages.markdown(pd.DataFrame(rows), texts=3)


def trained_text(records: Records) -> str:
    """A row for each configuration of a network that was trained one-shot."""
    rows = [
        {
            "network": record["name"],
            "bits": record["bits"],
            "million BitOPs": f"{record['bitops'] / 1e6:.0f}",
            "same class": f"{record['agreeing']} of {record['images']}",
            "top-1 %": f"{record['accuracy']:.2f}",
            "top-1 % of the file": f"{record['file_accuracy']:.2f}",
            "kB": f"{record['bytes'] / 1e3:.0f}",
        }
        for record in records
    ]
    return pages.markdown(pd.DataFrame(rows), texts=2)


def shortfall(record: Mapping[str, Any]) -> str | None:
    """What a network of a family did not do, or None."""
    if "died" in record:
        return str(record["died"])
    if "error" in record:
        return str(record["error"])
    if not record["equal"]:
        return "the graph is not equal to the network"
    return None


def families_text(records: Records) -> str:
    """Counts, the failures by name, and a row for each family."""
    failed = [record for record in records if shortfall(record) is not None]
    lines = [
        f"{len(records) - len(failed)} of {len(records)} families: the lowered graph equals "
        "`set_bits` bit for bit, and onnxruntime runs the file.",
        "",
    ]
    lines += [
        f"- `{record['name']}` ({record['family']}): {shortfall(record)}" for record in failed
    ]
    exported = [record for record in records if shortfall(record) is None]
    rows = [_family_row(record) for record in sorted(exported, key=lambda record: record["family"])]
    table = pages.markdown(pd.DataFrame(rows), texts=2)
    return "\n".join([*lines, "", table])


def _family_row(record: Mapping[str, Any]) -> dict[str, str]:
    return {
        "family": record["family"],
        "network": record["name"],
        "layers": str(record["layers"]),
        "batch": record["batch"],
        "difference": f"{record['difference']:.1e}",
        "integer operators": str(record["integer_operators"]),
        "seconds": f"{record['seconds']:.0f}",
    }


def speed_text(records: Records) -> str:
    """A row for each network, runtime, placement and precision."""
    rows = [
        {
            "network": record["name"],
            "runtime": record["runtime"],
            "file": record["network"],
            "ms": f"{record['milliseconds']:.1f}",
            "speed": f"{record['speedup']:.2f}",
            "MB": f"{record['bytes'] / 1e6:.2f}",
            "smaller": f"{record['smaller']:.1f}",
        }
        for record in records
    ]
    return pages.markdown(pd.DataFrame(rows), texts=3)

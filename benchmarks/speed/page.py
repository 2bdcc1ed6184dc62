"""docs/speed.md, from the records: `python -m benchmarks.speed.page`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.common import pages, records

RESULTS = records.ROOT / "benchmarks" / "results" / "speed.jsonl"
PAGE = records.ROOT / "docs" / "speed.md"
COMMAND = "python -m benchmarks.speed.page"

NETWORKS = {
    "resnet18": "ResNet-18",
    "mobilenetv2_100": "MobileNetV2",
    "vit_tiny_patch16_224": "ViT-Tiny",
}
"""Networks of the table, in its order."""

Record = Mapping[str, Any]


def write_page(page: Path, measured: Sequence[Record]) -> None:
    """Write each part of the page that there are records for: the last of each kind."""
    proxies = [record for record in measured if record["kind"] == "proxies"]
    if proxies:
        text = f"{origin(proxies[-1])}\n\n{pages.markdown(proxies_table(proxies[-1]))}"
        pages.write_part(page, "proxies", COMMAND, text)
    accelerators = [record for record in measured if record["kind"] == "accelerator"]
    if accelerators:
        last = accelerators[-1]
        text = f"{origin(last)}\n\n{pages.markdown(accelerator_table(last), texts=3)}"
        pages.write_part(page, "accelerator", COMMAND, text)


def origin(record: Record) -> str:
    """Machine, version and commit of a record."""
    machine = record["machine"]
    where = f"{machine['processor']}, torch {machine['torch']}, timm {machine['timm']}"
    return f"({where}; commit {record['commit']}.)"


def proxies_table(record: Record) -> pd.DataFrame:
    """A row for each figure: what it was, what is demanded, what it is."""
    rows = [*_launch_rows(record), *_host_rows(record), *_wait_rows(record)]
    return pd.DataFrame(rows, columns=["figure", "before", "demanded", "measured"])


def accelerator_table(record: Record) -> pd.DataFrame:
    """A row for each network, precision and variant: ratios to the float network."""
    table = pd.DataFrame(record["ratios"])
    names = ["network", "arithmetic", "variant"]
    # What was not measured has no column.
    figures = [name for name in _FIGURES if name in table]
    for name in figures:
        table[name] = table[name].map("{:.2f}".format)
    return table[names + figures]


_FIGURES = (
    "float step, ms",
    "step",
    "step on device",
    "float eval, ms",
    "eval",
    "eval on device",
)


def _launch_rows(record: Record) -> list[tuple[str, str, str, str]]:
    launches = record["launches"]

    def of_networks(figure: str) -> str:
        return _joined(launches, lambda counts: f"{counts[figure]:.1f}")

    switches = _joined(launches, lambda counts: str(counts["set_bits"]))
    return [
        ("launches a layer over float, forward", "12", "2", of_networks("forward")),
        ("launches a layer over float, backward", "32", "4", of_networks("backward")),
        ("launches a layer over float, eval", "6", "1", of_networks("evaluation")),
        ("launches of a `set_bits`", "82 to 210", "1", switches),
    ]


def _host_rows(record: Record) -> list[tuple[str, str, str, str]]:
    host = record["host"]

    def ratio(figure: str, base: str) -> str:
        return _joined(host, lambda times: f"{times[figure] / times[base]:.2f}")

    per_layer = _joined(host, lambda times: f"{times['microseconds_per_layer']:.0f}")
    switch = host["mobilenetv2_100"]["set_bits"]
    return [
        ("host, us a layer over float", "610 / 528 / 451", "180 / 145 / 95", per_layer),
        ("host, path over float", "3.0 to 4.2", "1.7", ratio("path", "float_pass")),
        ("host, eval over float", "2.7 to 3.3", "1.6", ratio("evaluation", "float_evaluation")),
        (
            "host, one-shot step (1 + 3 paths) over float step",
            "9.7 to 13.3",
            "6.5",
            ratio("oneshot_step", "float_step"),
        ),
        ("`set_bits` of MobileNetV2, us", "1280", "300", f"{1e6 * switch:.0f}"),
        ("`set_bits` of ViT-B, us", "600", "200", f"{1e6 * record['set_bits_vit_base']:.0f}"),
    ]


def _wait_rows(record: Record) -> list[tuple[str, str, str, str]]:
    waits = record["waits"]
    step = sum(waits[part] for part in ("set_bits", "forward", "loss", "backward", "OneShot.step"))
    return [
        ("waits in set_bits, forward, loss, backward, `OneShot.step`", "0", "0", str(step)),
        ("waits in `fit`, 2 steps", "2", "0", str(waits["fit"])),
        ("waits in an evaluation of a search, 3 batches", "3", "1", str(waits["evaluation"])),
        ("waits in `calibrate`, 3 layers", "54", "few", str(waits["calibrate"])),
        ("waits in `update_norms`, 2 norms", "4", "few", str(waits["update_norms"])),
    ]


def _joined(of_networks: Mapping[str, Any], text: Callable[[Any], str]) -> str:
    """A figure of each network, in the order of `NETWORKS`."""
    return " / ".join(text(of_networks[name]) for name in NETWORKS)


if __name__ == "__main__":
    write_page(PAGE, records.read(RESULTS))

"""What a GPU would wait for, measured on a CPU: launches, waits and the time of the host.

    python -m benchmarks.speed.proxies [--rounds N] [--dry-run]

Launches and waits are counted on the meta device (`launch_counts.py`), and are exact. The time of
the host is that of one thread, on networks of well-known structure with few channels
(`host_times.py`). Beside each figure is what is demanded, and what it was before there was a fused
operation, at commit fff474f.

Prints a table, and adds a line of JSON to `benchmarks/results/speed.jsonl` unless `--dry-run`;
`python -m benchmarks.speed.page` renders docs/speed.md from it.
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import pages, records
from benchmarks.speed import host_times, launch_counts, page
from benchmarks.speed.small_networks import make_pair

RESULTS = records.ROOT / "benchmarks" / "results" / "speed.jsonl"


def main() -> None:
    """Measure, print and record."""
    options = make_parser().parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    record = measure(rounds=options.rounds)
    if not options.dry_run:
        records.append(options.results, record)
    print(pages.markdown(page.proxies_table(record)))


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20, help="of each time")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--dry-run", action="store_true", help="record nothing")
    return parser


def measure(*, rounds: int) -> dict[str, Any]:
    """All figures of the table."""
    launches: dict[str, Any] = {}
    times: dict[str, Any] = {}
    for name in page.NETWORKS:
        pair = make_pair(name)
        launches[name] = asdict(launch_counts.count_launches(pair))
        measured = host_times.measure(pair, rounds=rounds)
        per_layer = measured.microseconds_per_layer
        times[name] = {**asdict(measured), "microseconds_per_layer": per_layer}
    vit = host_times.time_set_bits(make_pair("vit_base_patch16_224"), rounds=3 * rounds)
    return {
        "kind": "proxies",
        "launches": launches,
        "waits": count_waits(),
        "host": times,
        "set_bits_vit_base": vit,
        "commit": records.commit(),
        "machine": records.machine(),
    }


def count_waits() -> dict[str, int]:
    """How often the host waits, in each part of training, search and calibration."""
    small = launch_counts.small_convolutions()
    waits = launch_counts.count_step_waits(make_pair("test_resnet", bits=(2, 8)))
    waits["fit"] = launch_counts.count_fit_waits(small, steps=2)
    waits["evaluation"] = launch_counts.count_evaluation_waits(small, batches=3, objective="loss")
    return {**waits, **launch_counts.count_calibration_waits(small, batches=2)}


if __name__ == "__main__":
    main()

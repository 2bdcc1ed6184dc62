"""What `convert` costs: seconds and memory, against the targets of the project.

    python -m benchmarks.speed.conversion_cost [NETWORK ...]

Each network is converted in a process of its own. Extra memory is the peak during `convert` beyond
what the converted network needs itself. It may be as large as the largest layer plus what one float
forward pass takes. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import timm
import torch
from torch import nn

import anyprec

NETWORKS = {"resnet50": 2.0, "vit_large_patch16_224": 10.0}
"""Networks, and the seconds that converting them may take."""

REPEATS = 3
MIB = 2**20


def measure(name: str) -> dict[str, float]:
    """Seconds and MiB of one conversion in this process."""
    model = timm.create_model(name).eval()
    images = torch.zeros(1, *model.pretrained_cfg["input_size"])
    with torch.no_grad():
        _, forward_peak = seconds_and_peak(lambda: model(images))
    largest = max(parameter.nbytes for parameter in model.parameters())
    float_size = size_of(model)
    seconds, peak = seconds_and_peak(lambda: anyprec.convert(model))
    extra = max(0, peak - (size_of(model) - float_size))
    return {
        "seconds": seconds,
        "extra": extra / MIB,
        "allowed": (largest + forward_peak) / MIB,
    }


def seconds_and_peak(call: Callable[[], Any]) -> tuple[float, int]:
    """Time of a call, and the bytes by which memory rose at most meanwhile."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before, start = memory("VmRSS"), time.perf_counter()
    call()
    return time.perf_counter() - start, memory("VmHWM") - before


def memory(field: str) -> int:
    """A figure of this process's memory in bytes, as Linux gives it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    msg = f"/proc/self/status has no {field}: this benchmark needs Linux"
    raise SystemExit(msg)


def size_of(model: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def main() -> None:
    """Measure networks, three times each, and print a table of the worst."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--here", action="store_true", help="once, in this process; prints JSON")
    args = parser.parse_args()
    if args.here:
        print(json.dumps([measure(name) for name in args.networks]))
        return
    rows = []
    for name in args.networks:
        command = [sys.executable, "-m", "benchmarks.speed.conversion_cost", name, "--here"]
        runs = []
        for _ in range(REPEATS):
            runs += json.loads(subprocess.check_output(command))  # noqa: S603 (our own)
        figures = pd.DataFrame(runs)
        limit = f"{NETWORKS[name]:.0f}" if name in NETWORKS else ""
        worst = figures.max()
        rows.append(
            {
                "network": f"`{name}`",
                "seconds": f"{worst.seconds:.2f}",
                "at most, s": limit,
                "extra MiB": f"{worst.extra:.1f}",
                "at most, MiB": f"{figures.allowed.min():.1f}",
            }
        )
    aligned = ["left", *["right"] * 4]
    print(pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True, colalign=aligned))


if __name__ == "__main__":
    main()

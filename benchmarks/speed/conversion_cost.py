"""What `convert` costs: seconds and memory, against the targets of the project.

    python -m benchmarks.speed.conversion_cost

Each network is converted in a process of its own. Extra memory is the peak during `convert` beyond what the converted
network needs itself; it may be as large as the largest layer plus what one float forward pass takes. Linux only.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import anyprec

NETWORKS = {"resnet50": 2.0, "vit_large_patch16_224": 10.0}
"""Networks, and the seconds that converting them may take."""

MIB = 2**20


def measure(name: str) -> dict[str, float]:
    """Seconds and MiB of one conversion in this process."""
    model = timm.create_model(name).eval()
    images = torch.zeros(1, *model.pretrained_cfg["input_size"])
    with torch.no_grad():
        _, forward = measured(lambda: model(images))
    largest = max(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    held = size_of(model)
    seconds, peak = measured(lambda: anyprec.convert(model))
    extra = max(0, peak - (size_of(model) - held))
    return {"seconds": seconds, "extra": extra / MIB, "allowed": (largest + forward) / MIB}


def measured(call: Callable[[], Any]) -> tuple[float, int]:
    """Seconds, and the bytes by which memory rose at most meanwhile."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before, start = status("VmRSS"), time.perf_counter()
    call()
    return time.perf_counter() - start, status("VmHWM") - before


def status(field: str) -> int:
    """A figure of this process in bytes, as Linux gives it."""
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(field)
    )
    return int(line.split()[1]) * 1024


def size_of(model: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())


def main() -> None:
    """Measure all networks, three times each, and print a table of the worst."""
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
        return
    print(
        "| network | seconds | at most | extra MiB | at most |\n| --- | ---: | ---: | ---: | ---: |"
    )
    for name, limit in NETWORKS.items():
        command = [sys.executable, "-m", "benchmarks.speed.conversion_cost", name]
        runs = [json.loads(subprocess.check_output(command)) for _ in range(3)]  # noqa: S603 (our own)
        worst = {key: max(run[key] for run in runs) for key in ("seconds", "extra")}
        allowed = min(run["allowed"] for run in runs)
        print(
            f"| `{name}` | {worst['seconds']:.2f} | {limit:.0f} | {worst['extra']:.1f} | {allowed:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

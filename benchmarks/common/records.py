"""Results of benchmarks: one line of JSON for each finished measurement, and what it was measured on."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import timm
import torch

ROOT = Path(__file__).parents[2]


def read(path: Path) -> list[dict[str, Any]]:
    """The finished measurements; a line that was cut off by a kill is none."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def append(path: Path, record: dict[str, Any]) -> None:
    """Add a measurement, in one write that is on the disk afterwards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            whole = file.read(1) == b"\n"
        else:
            whole = True
        file.write((b"" if whole else b"\n") + json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def commit() -> str:
    """The commit that is measured."""
    command = ["git", "describe", "--always", "--dirty"]
    asked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603 (our own)
    return asked.stdout.strip() or "unknown"


def machine(device: str = "cpu") -> dict[str, Any]:
    """Processor, threads and versions."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else _processor()
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **versions,
    }


def _processor() -> str:
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()

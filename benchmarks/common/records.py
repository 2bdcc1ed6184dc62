"""Results of benchmarks: a line of JSON for each measurement, and what it was measured on."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import timm
import torch

ROOT = Path(__file__).parents[2]


def read(file: Path) -> list[dict[str, Any]]:
    """The finished measurements; a line that was cut off by a kill is none."""
    if not file.exists():
        return []
    records = []
    for line in file.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def append(file: Path, record: dict[str, Any]) -> None:
    """Add a measurement, in one write that is on the disk afterwards."""
    file.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(record).encode() + b"\n"
    with file.open("ab+") as stream:
        if stream.tell():
            # A write that was cut off left a line without an end: this one starts on a new line.
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b"\n":
                line = b"\n" + line
        stream.write(line)
        stream.flush()
        os.fsync(stream.fileno())


def commit() -> str:
    """The commit that is measured."""
    command = ["git", "describe", "--always", "--dirty"]
    git = subprocess.run(  # noqa: S603 (our own command)
        command, cwd=ROOT, capture_output=True, text=True, check=False
    )
    return git.stdout.strip() or "unknown"


def machine(device: str = "cpu") -> dict[str, Any]:
    """Processor, threads and versions."""
    on_gpu = device.startswith("cuda")
    return {
        "processor": torch.cuda.get_device_name() if on_gpu else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }


def _processor() -> str:
    described = Path("/proc/cpuinfo")
    if described.exists():
        for line in described.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

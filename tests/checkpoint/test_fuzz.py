"""A slice of `benchmarks/checkpoint/fuzz.py`, in another process, since it bounds its memory."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("resource", reason="needs POSIX limits")
ROOT = Path(__file__).parents[2]


def test_damaged_and_forged_files_are_refused_or_harmless():
    command = [
        sys.executable,
        "-m",
        "benchmarks.checkpoint.fuzz",
        "--files",
        "150",
        "--first",
        "20000",
    ]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT
    )
    assert run.returncode == 0, run.stderr
    counts = {
        text: int(count) for count, text in re.findall(r"^ *(\d+) (.*)$", run.stdout, re.MULTILINE)
    }
    assert counts["damaged, refused"] > 30
    assert counts["forged, refused"] > 30
    assert counts["forged, loaded and run"] > 2  # so the attacks reach beyond the first check

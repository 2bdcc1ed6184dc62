"""A process killed at any moment of saving leaves the old file or the new one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("kill_while_saving.py")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.parametrize("form", ["training", "packed"])
def test_a_file_is_loadable_after_each_of_25_kills(tmp_path, form):
    run = subprocess.run(
        [sys.executable, SCRIPT, tmp_path, form, "25"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    networks, interrupted = map(int, run.stdout.split())
    assert networks == 2  # the one or the other, and nothing between
    assert interrupted > 0  # kills did meet writes

"""A process killed at any step of saving leaves the old file or the new one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import anyprec

SCRIPT = Path(__file__).with_name("kill_while_saving.py")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_file_is_the_whole_old_or_the_whole_new_one_after_a_kill_at_any_step(tmp_path):
    run = subprocess.run(
        [sys.executable, SCRIPT, tmp_path],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    outcomes = json.loads(run.stdout)
    assert list(outcomes) == ["training", "packed"]
    for form, after in outcomes.items():
        replaced = after.index("new")
        assert set(after[:replaced]) == {"old"}, form
        assert set(after[replaced:]) == {"new"}, form
        assert replaced > 8, form  # kills did meet writes
        assert list((tmp_path / form).glob(".anyprec-*.tmp"))  # and left what they had written
        for name in ("old", "new", "net"):
            network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 8, 3))
            loaded = anyprec.load(tmp_path / form / name, network.eval())
            loaded.set_bits(2)
            assert loaded(torch.ones(1, 3, 8, 8)).isfinite().all()

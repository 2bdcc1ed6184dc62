"""The command line."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import anyprec
from anyprec.cli import app


@pytest.fixture
def file(tmp_path):
    model = anyprec.convert(
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 1, 3)), example_input=torch.randn(1, 1, 8, 8)
    )
    path = tmp_path / "net"
    anyprec.save(model, path, configs={"small": model.resolve_bits(8)})
    return path


def test_inspect_prints_the_summary(file):
    result = CliRunner().invoke(app, ["inspect", str(file)])
    assert result.exit_code == 0
    assert result.stdout == f"{anyprec.inspect(file)}\n"


def test_inspect_prints_json(file):
    result = CliRunner().invoke(app, ["inspect", str(file), "--json"])
    found, info = json.loads(result.stdout), anyprec.inspect(file)
    assert found["form"] == "training"
    assert found["bytes"] == file.stat().st_size
    assert found["configs"] == {"small": {"0": "W8A8", "1": "W8A8"}}
    assert found["notes"]["small"]["bitops"] == info.notes["small"].bitops
    assert list(found["layers"]) == ["0", "1"]
    assert found["settings"]["bits"] == list(info.settings.bits)


def test_an_error_is_one_line_and_an_exit_status(tmp_path):
    result = CliRunner().invoke(app, ["inspect", str(tmp_path / "none")])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("anyprec: there is no file '")


def test_without_a_command_it_helps():
    assert "inspect" in CliRunner().invoke(app, []).output

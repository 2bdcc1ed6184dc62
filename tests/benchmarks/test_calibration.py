"""The benchmark of calibration, end to end on a small network: the figures mean nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from benchmarks.calibration import __main__ as command
from benchmarks.calibration import page


def small() -> nn.Module:
    return timm.create_model("test_efficientnet", num_classes=4)


def test_splits_are_measured_recorded_and_rendered(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    images, labels = torch.randn(12, 3, 32, 32), torch.arange(12) % 4
    monkeypatch.setattr(command, "read_sample", lambda *_: (images, labels))
    monkeypatch.setattr(command, "efficientnet_lite0", small)
    monkeypatch.setattr(command, "UNIFORM", (8, 4))
    monkeypatch.setattr(page, "COLUMNS", ("float", "8", "4", "mixes"))
    results = tmp_path / "calibration.jsonl"
    arguments = ["--data", tmp_path, "--splits", 0, 1, "--steps", 1, "--results", results]
    monkeypatch.setattr("sys.argv", ["command", *map(str, arguments)])
    command.main()
    records = [json.loads(line) for line in results.read_text().splitlines()]
    assert [record["split"] for record in records] == [0, 1]
    assert [len(record["calibrated"]) for record in records] == [3 + command.MIXES] * 2
    assert all(0 <= value <= 100 for value in records[0]["reconstructed"])
    assert "reconstructed, 1 steps" in capsys.readouterr().out
    written = tmp_path / "results.md"
    written.write_text("before\n\n<!-- calibration: x -->\n<!-- end of the calibration -->\n")
    page.write_page(written, records)
    table = written.read_text()
    assert table.count("| split 1 ") == 2
    assert table.startswith("before")


def test_mixes_are_of_three_to_five_bits_where_a_layer_has_them() -> None:
    model = command.anyprec.convert(small().eval(), example_input=torch.randn(1, 3, 32, 32))
    first, *others = command.mixes_of(model, seed=0)
    assert len({first, *others}) == command.MIXES
    several = {path for path, layer in model.candidates.items() if len(layer.weight) > 1}
    assert {first[path].weight for path in several} == {3, 4, 5}
    assert first["conv_stem"] == command.anyprec.Bits(8, 8)

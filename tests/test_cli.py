"""The command line."""

from __future__ import annotations

import json

import numpy as np
import pytest
import timm
import torch
from torch import nn
from typer.testing import CliRunner

import anyprec
from anyprec.cli import app
from anyprec.errors import ExportError


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


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint that names its network, for images of 32 pixels."""
    images = torch.randn(4, 3, 32, 32)
    model = anyprec.convert(
        timm.create_model("test_byobnet", num_classes=5).eval(),
        bits=(4, 8),
        example_input=images[:1],
    )
    anyprec.calibrate(model, [images])
    path = tmp_path_factory.mktemp("trained") / "net.safetensors"
    anyprec.save(model, path, configs={"small": model.resolve_bits((4, 8))})
    return path


def test_export_writes_a_file_and_compares_it(trained, tmp_path):
    pytest.importorskip("onnxruntime")
    images, labels = torch.randn(6, 3, 32, 32), torch.arange(6) % 5
    np.savez(tmp_path / "images.npz", images=images.numpy(), labels=labels.numpy())
    output = tmp_path / "net.onnx"
    report, plot = tmp_path / "report.md", tmp_path / "plot.png"
    options = ["--bits", "small", "--images", str(tmp_path / "images.npz"), "--most-images", "5"]
    options += ["--report", str(report), "--plot", str(plot), "--no-speed"]
    result = CliRunner().invoke(app, ["export", str(trained), str(output), *options])
    assert result.exit_code == 0, result.output
    layers = anyprec.inspect(trained).layers
    made, text = result.stdout.split("\n\n", 1)
    assert made.startswith(f"{output}: ONNX with QuantizeLinear and DequantizeLinear, ")
    assert f"  layers  {len(layers) - 2} at W4A8, 2 at W8A8" in made
    first, *lines = text.splitlines()
    assert first.startswith("net.onnx in onnxruntime ")
    assert first.endswith(" against the network, 5 images")
    rows = [line.split()[0] for line in lines[lines.index("") + 2 :]]
    assert sorted(rows) == sorted(layers)
    for word in ("same top-1 class", "top-1 accuracy", "equal codes"):
        assert f"\n{word}" in text
        assert f"\n| {word} |" in report.read_text()
    assert "of float" not in text
    assert plot.stat().st_size > 0


def test_export_reads_bits_as_people_write_them(trained, tmp_path, monkeypatch):
    asked = []

    def note(model, path, *, bits, target):
        asked.append((bits, target))
        raise ExportError("far enough")

    monkeypatch.setattr("anyprec.cli.export_model", note)
    for bits in ("4", "W4A8", "small"):
        command = ["export", str(trained), "x.xml", "--bits", bits, "--target", "openvino"]
        result = CliRunner().invoke(app, command)
        assert (result.exit_code, result.stderr) == (1, "anyprec: far enough\n")
    assert asked == [(4, "openvino"), ("W4A8", "openvino"), ("small", "openvino")]


@pytest.mark.parametrize(
    ("output", "options", "message"),
    [
        ("net.onnx", ["--bits", "W9A9"], "bit-width"),
        ("net.onnx", ["--bits", "big"], "cannot read 'big' as a precision"),
        ("net.onnx", ["--target", "toaster"], "target 'toaster' is not known"),
        ("net.xml", [], "a file for target 'onnx' ends with '.onnx'"),
        ("net.onnx", ["--report", "report.md"], "pass the images for it, --images ..."),
    ],
)
def test_what_cannot_be_exported_is_said(trained, tmp_path, output, options, message):
    result = CliRunner().invoke(app, ["export", str(trained), str(tmp_path / output), *options])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("anyprec: ")
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []

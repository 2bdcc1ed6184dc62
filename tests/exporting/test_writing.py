from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

import anyprec
from anyprec.errors import ExportError, HardwareError
from tests.conftest import SmallNet
from tests.exporting.networks import converted

pytest.importorskip("onnx")


def test_what_the_hardware_cannot_run_is_named_with_the_nearest(
    images: Tensor, tmp_path: Path
) -> None:
    model = converted(SmallNet(), images)
    file = tmp_path / "network.onnx"
    message = r"litert cannot run this configuration: .*has W4A4, .*nearest is W4A8"
    with pytest.raises(ExportError, match=message):
        anyprec.export(model, file, bits=4, target="onnx", hardware="litert")
    with pytest.raises(ExportError, match=r"tensorrt cannot run .*activation_grid='signed'"):
        anyprec.export(model, file, bits=8, hardware="tensorrt")
    with pytest.raises(HardwareError, match="tensorr"):
        anyprec.export(model, file, bits=8, hardware="tensorr")
    assert not file.exists()


def test_the_hardware_of_convert_is_that_of_export(images: Tensor, tmp_path: Path) -> None:
    model = anyprec.convert(SmallNet().eval(), hardware="openvino", example_input=images)
    anyprec.calibrate(model, [images])
    with pytest.raises(ExportError, match="a file for target 'openvino' ends with '.xml'"):
        anyprec.export(model, tmp_path / "network.onnx", bits=8)
    exported = anyprec.export(model, tmp_path / "network.onnx", bits=8, target="onnx")
    assert exported.target == "onnx"

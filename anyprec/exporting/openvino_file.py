"""Writing an integer network as OpenVINO's IR: a file of operators and one of weights beside it."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx
import openvino

from anyprec.errors import ExportError
from anyprec.exporting.files import write_bytes
from anyprec.exporting.integers import IntegerGraph, to_integers
from anyprec.exporting.lowering import Lowered
from anyprec.exporting.onnx_file import onnx_model, write_onnx


def write_openvino(lowered: Lowered, path: Path) -> IntegerGraph:
    """Write the IR of a lowered network, by way of ONNX; the weights go to `path` with `.bin`.

    OpenVINO has no codes of two bits, so those are stored in four.

    Raises:
        ExportError: OpenVINO does not read the network.
    """
    network = to_integers(lowered)
    write_ir(onnx_model(network, narrowest=4), path)
    return network


def write_ir(source_model: onnx.ModelProto, path: Path) -> None:
    """Write an ONNX model as IR; `path` holds the old content or the new one.

    Raises:
        ExportError: OpenVINO does not read it, or a file cannot be written.
    """
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "network.onnx"
        write_onnx(source_model, source)
        try:
            model = openvino.Core().read_model(source)
            written = Path(folder) / "network.xml"
            openvino.save_model(model, written, compress_to_fp16=False)
        except RuntimeError as error:
            msg = f"OpenVINO does not read this network ({str(error).strip().splitlines()[-1]})"
            raise ExportError(msg) from error
        # The weights first: an old file of operators would not fit them, a missing one says so.
        for suffix in (".bin", ".xml"):
            write_bytes(written.with_suffix(suffix).read_bytes(), path.with_suffix(suffix))

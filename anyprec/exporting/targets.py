"""The targets of `export`: what each one is, and who writes its file.

A writer takes a lowered network and a path. It is imported when it is used, since most need a
library that is not installed with anyprec.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

from anyprec.errors import ExportError
from anyprec.exporting.extras import require_extra
from anyprec.exporting.integers import IntegerGraph
from anyprec.exporting.lowering import Lowered

Writer = Callable[[Lowered, Path], IntegerGraph]
"""Writes a network and returns the integer network that the file holds."""


@dataclass(frozen=True)
class Target:
    """What a network can be exported to.

    Attributes:
        name: As `export` takes it.
        title: For people.
        suffix: How names of its files end.
        writer: Module and function that write it.
        needs: Libraries that the writer imports.
        extra: The extra of anyprec that installs them.
        beside: How the names of other files end that are written with it.
    """

    name: str
    title: str
    suffix: str
    writer: tuple[str, str]
    needs: tuple[str, ...]
    extra: str
    beside: tuple[str, ...] = ()

    def write(self, lowered: Lowered, path: Path) -> IntegerGraph:
        """Write the file.

        Raises:
            ExportError: The target cannot run the network, a library is missing, or the file cannot
                be written.
        """
        require_extra(*self.needs, extra=self.extra)
        module, function = self.writer
        writer: Any = getattr(import_module(f"anyprec.exporting.{module}"), function)
        network: IntegerGraph = writer(lowered, path)
        return network


_TARGETS = (
    Target(
        "onnx",
        "ONNX with QuantizeLinear and DequantizeLinear",
        ".onnx",
        ("onnx_file", "write_onnx_file"),
        needs=("onnx", "onnxscript"),
        extra="onnx",
    ),
    Target(
        "openvino",
        "OpenVINO IR",
        ".xml",
        ("openvino_file", "write_openvino"),
        needs=("onnx", "onnxscript", "openvino"),
        extra="openvino",
    ),
    Target(
        "qonnx",
        "QONNX, for FINN and hls4ml",
        ".onnx",
        ("qonnx_file", "write_qonnx"),
        needs=("onnx", "onnxscript"),
        extra="onnx",
    ),
    Target(
        "encodings",
        "float ONNX with AIMET's encodings, for Qualcomm",
        ".onnx",
        ("encodings_file", "write_encodings"),
        needs=("onnx", "onnxscript"),
        extra="onnx",
        beside=(".encodings",),
    ),
    Target(
        "executorch",
        "ExecuTorch, run by XNNPACK",
        ".pte",
        ("executorch_file", "write_executorch"),
        needs=("executorch",),
        extra="executorch",
    ),
)

TARGETS = {target.name: target for target in _TARGETS}
"""Every target by name."""


def target_of(name: str) -> Target:
    """The target of this name.

    Raises:
        ExportError: There is none.
    """
    if name in TARGETS:
        return TARGETS[name]
    msg = f"target {name!r} is not known: use one of {', '.join(map(repr, TARGETS))}"
    close = get_close_matches(str(name), TARGETS, n=1)
    if close:
        msg += f"; did you mean {close[0]!r}?"
    raise ExportError(msg)

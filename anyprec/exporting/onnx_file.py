"""Writing an integer network as an ONNX file with QuantizeLinear and DequantizeLinear (QDQ).

The graph is translated by torch's exporter. What is changed in the ONNX model afterwards: padding
becomes that of the convolution behind it, and weights of few bits are stored in as many.
"""

from __future__ import annotations

import copy
import io
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from anyprec.errors import ExportError
from anyprec.exporting.extras import require_extra
from anyprec.exporting.integers import IntegerGraph
from anyprec.exporting.onnx_graph import DEQUANTIZE_LINEAR, arrange_for_onnx
from anyprec.exporting.onnx_storage import merge_pads, store_narrow_weights
from anyprec.exporting.operators import FAKE_QUANTIZE, FAKE_QUANTIZE_WEIGHT
from anyprec.runtime.storage import replacing

if TYPE_CHECKING:
    import onnx

OPSET = 21
"""The first opset with codes of four bits."""


def onnx_model(network: IntegerGraph, *, narrowest: int = 2) -> onnx.ModelProto:
    """The ONNX model of an integer network.

    Args:
        network: The network; not changed.
        narrowest: Fewest bits that a stored weight may have: 2, 4 or 8. Codes stay as they are.

    Raises:
        ExportError: onnx or onnxscript is missing, or an operator has no ONNX form.
    """
    require_extra("onnx", "onnxscript", extra="onnx")
    lowered = network.lowered
    graph = copy.deepcopy(lowered.graph)
    arrange_for_onnx(graph)
    shapes = ({0: torch.export.Dim("batch", min=1)},) if lowered.dynamic_batch else None
    try:
        with torch.no_grad(), _quietly():
            program = torch.onnx.export(
                graph,
                (lowered.example,),
                dynamo=True,
                dynamic_shapes=shapes,
                opset_version=OPSET,
                custom_translation_table=_translations(),
                input_names=["images"],
                verbose=False,
            )
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        msg = f"torch.onnx cannot export this network ({type(error).__name__}: {lines[0]})"
        raise ExportError(msg) from error
    model = program.model_proto
    merge_pads(model)
    store_narrow_weights(model, narrowest=narrowest)
    return model


def write_onnx(model: onnx.ModelProto, path: str | os.PathLike[str]) -> None:
    """Write an ONNX model; `path` holds the old content or the new one."""
    import onnx

    target = Path(path)
    if not target.parent.is_dir():
        msg = f"cannot write {str(target)!r}: there is no folder {str(target.parent)!r}"
        raise ExportError(msg)
    onnx.checker.check_model(model)
    with replacing(target) as temporary:
        Path(temporary).write_bytes(model.SerializeToString())


def _translations() -> dict[Any, Any]:
    """What ONNX has for our operators."""
    import onnx
    from onnxscript import opset21 as op

    def scalar(kind: int, value: float) -> Any:
        return op.Constant(value=onnx.helper.make_tensor("value", kind, [], [value]))

    def fake_quantize(
        values: Any, scale: float, zero_point: int, low: int, high: int, bits: int, layer: str
    ) -> Any:
        del bits, layer
        step = scalar(onnx.TensorProto.FLOAT, scale)
        zero = scalar(onnx.TensorProto.UINT8, zero_point)
        codes = op.QuantizeLinear(values, step, zero)
        if low > 0 or high < 255:
            limits = scalar(onnx.TensorProto.UINT8, low), scalar(onnx.TensorProto.UINT8, high)
            codes = op.Clip(codes, *limits)
        return op.DequantizeLinear(codes, step, zero)

    def dequantize_linear(codes: Any, scale: Any, axis: int, bits: int) -> Any:
        del bits
        return op.DequantizeLinear(codes, scale, axis=axis)

    def fake_quantize_weight(operand: Any, scale: Any, bits: int, layer: str) -> Any:
        del layer
        half = float(2 ** (bits - 1))
        limits = scalar(onnx.TensorProto.FLOAT, -half), scalar(onnx.TensorProto.FLOAT, half - 1)
        codes = op.Clip(op.Round(op.Div(operand, scale)), *limits)
        return op.Mul(codes, scale)

    return {
        FAKE_QUANTIZE: fake_quantize,
        DEQUANTIZE_LINEAR: dequantize_linear,
        FAKE_QUANTIZE_WEIGHT: fake_quantize_weight,
    }


@contextmanager
def _quietly() -> Iterator[None]:
    """Let the exporter print, log and warn nothing: what fails raises."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)

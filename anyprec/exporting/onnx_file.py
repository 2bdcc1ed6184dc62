"""Writing an integer network as an ONNX file with QuantizeLinear and DequantizeLinear (QDQ).

The graph is translated by torch's exporter. What is changed in the ONNX model afterwards: padding
becomes that of the convolution behind it, and weights of few bits are stored in as many.
"""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Container, Iterator
from contextlib import contextmanager, redirect_stdout
from math import prod
from pathlib import Path
from typing import Any

import onnx
import torch
from onnxscript import opset21 as op
from torch import Tensor, fx

from anyprec.errors import ExportError
from anyprec.exporting.files import refusing_to_write, write_bytes
from anyprec.exporting.integers import IntegerGraph, to_integers
from anyprec.exporting.lowering import Lowered
from anyprec.exporting.onnx_graph import (
    DEQUANTIZE_LINEAR,
    GLOBAL_AVERAGE,
    REQUANTIZE,
    arrange_for_onnx,
    codes_in,
    write_out_attention,
)
from anyprec.exporting.onnx_names import name_layers
from anyprec.exporting.onnx_storage import merge_pads, store_narrow_weights
from anyprec.exporting.operators import FAKE_QUANTIZE, FAKE_QUANTIZE_WEIGHT
from anyprec.exporting.points import codes_name

_LARGEST_WEIGHT = 8
"""Bits of a weight, at most; biases have more."""

OPSET = 21
"""The first opset with codes of four bits."""

_AT_NODE = "Error when translating node"


def onnx_model(network: IntegerGraph, *, narrowest: int = 2) -> onnx.ModelProto:
    """The ONNX model of an integer network.

    Args:
        network: The network; not changed.
        narrowest: Fewest bits that a stored weight may have: 2, 4 or 8. Codes stay as they are.

    Raises:
        ExportError: An operator has no ONNX form.
    """
    lowered = network.lowered
    graph = copy.deepcopy(lowered.graph)
    arrange_for_onnx(graph)
    model = translated(
        graph, lowered.example, dynamic_batch=lowered.dynamic_batch, layers=lowered.config
    )
    held = codes_in(graph)
    name_layers(model, {name: codes.layer for name, codes in held.items()})
    merge_pads(model)
    bits = {name: codes.bits for name, codes in held.items()}
    store_narrow_weights(model, narrowest=narrowest, bits=bits)
    return model


def translated(
    graph: fx.GraphModule,
    example: Tensor,
    *,
    dynamic_batch: bool,
    layers: Container[str] = (),
    opset: int = OPSET,
    translations: dict[Any, Any] | None = None,
) -> onnx.ModelProto:
    """The ONNX model of a graph, as torch's exporter makes it.

    Args:
        graph: Of torch's operators, and of ours in the form that ONNX has. Attention over other
            than four axes is written out, in place.
        example: A batch that it accepts.
        dynamic_batch: Accept batches of any size.
        layers: Paths of the quantized layers, after which codes are named.
        opset: Version of ONNX's operators.
        translations: What becomes of operators of ours; QuantizeLinear and the like by default.

    Raises:
        ExportError: An operator has no ONNX form.
    """
    write_out_attention(graph)
    shapes = ({0: torch.export.Dim("batch", min=1)},) if dynamic_batch else None
    try:
        with torch.no_grad(), _quietly():
            program: Any = torch.onnx.export(
                graph,
                (example,),
                dynamo=True,
                dynamic_shapes=shapes,
                opset_version=opset,
                custom_translation_table=translations or _translations(layers),
                input_names=["images"],
                verbose=False,
            )
    except Exception as error:
        msg = f"torch.onnx cannot export this network: {_reason(error)}"
        if dynamic_batch:
            msg += "; if that depends on the size of the batch, pass dynamic_batch=False"
        raise ExportError(msg) from error
    model: onnx.ModelProto = program.model_proto
    return model


def write_onnx_file(lowered: Lowered, path: Path) -> IntegerGraph:
    """Write the ONNX file of a lowered network.

    Raises:
        ExportError: as `onnx_model`, or the file cannot be written.
    """
    network = to_integers(lowered)
    write_onnx(onnx_model(network), path)
    return network


def write_onnx(model: onnx.ModelProto, path: Path) -> None:
    """Write a checked ONNX model; `path` holds the old content or the new one.

    Raises:
        ExportError: It is too large for one file, or cannot be written.
    """
    with refusing_to_write(path, ValueError, onnx.checker.ValidationError):
        onnx.checker.check_model(model)
        content = model.SerializeToString()
    write_bytes(content, path)


def _reason(error: BaseException) -> str:
    """What the exporter says of the operator that it failed at, or its first line."""
    cause: BaseException | None = error
    while cause is not None:
        lines = str(cause).strip().splitlines() or [""]
        if lines[0].startswith(_AT_NODE):
            return lines[0]
        cause = cause.__cause__
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _translations(layers: Container[str]) -> dict[Any, Any]:
    """What ONNX has for our operators."""

    def scalar(kind: int, value: float) -> Any:
        return op.Constant(value=onnx.helper.make_tensor("value", kind, [], [value]))

    def quantize(
        values: Any,
        scale: float,
        zero_point: int,
        low: int,
        high: int,
        layer: str,
        *,
        clip: bool,
    ) -> Any:
        step = scalar(onnx.TensorProto.FLOAT, scale)
        zero = scalar(onnx.TensorProto.UINT8, zero_point)
        codes = op.QuantizeLinear(values, step, zero)
        if clip:
            limits = scalar(onnx.TensorProto.UINT8, low), scalar(onnx.TensorProto.UINT8, high)
            codes = op.Clip(codes, *limits)
        codes.name = codes_name(layer, layers)
        return op.DequantizeLinear(codes, step, zero)

    def fake_quantize(
        values: Any, scale: float, zero_point: int, low: int, high: int, bits: int, layer: str
    ) -> Any:
        del bits
        clip = low > 0 or high < 255
        return quantize(values, scale, zero_point, low, high, layer, clip=clip)

    def requantize(
        values: Any, scale: float, zero_point: int, low: int, high: int, bits: int, layer: str
    ) -> Any:
        del bits
        # onnxruntime makes one quantizer of two in a row, on a third grid, unless a clip is there.
        return quantize(values, scale, zero_point, low, high, layer, clip=True)

    def dequantize_linear(codes: Any, scale: Any, axis: int, bits: int, layer: str) -> Any:
        del layer
        if bits > _LARGEST_WEIGHT:
            return op.DequantizeLinear(codes, scale, axis=axis)
        # onnxruntime runs Linear layers on codes only if their weight has a zero point.
        shape = list(scale.shape)
        zeros = onnx.helper.make_tensor("zero", onnx.TensorProto.INT8, shape, [0] * prod(shape))
        return op.DequantizeLinear(codes, scale, op.Constant(value=zeros), axis=axis)

    def global_average(values: Any) -> Any:
        return op.GlobalAveragePool(values)

    def fake_quantize_weight(operand: Any, scale: Any, bits: int, layer: str) -> Any:
        del layer
        half = float(2 ** (bits - 1))
        limits = scalar(onnx.TensorProto.FLOAT, -half), scalar(onnx.TensorProto.FLOAT, half - 1)
        codes = op.Clip(op.Round(op.Div(operand, scale)), *limits)
        return op.Mul(codes, scale)

    return {
        FAKE_QUANTIZE: fake_quantize,
        REQUANTIZE: requantize,
        DEQUANTIZE_LINEAR: dequantize_linear,
        GLOBAL_AVERAGE: global_average,
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

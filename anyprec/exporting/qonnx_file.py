"""Writing a lowered network as QONNX, the form that FINN and hls4ml read.

Activations and weights pass through Quant nodes of any bit-width (Pappalardo et al., "QONNX:
Representing Arbitrary-Precision Quantized Neural Networks", 2022). BatchNorm and ReLU stay nodes of
their own: FINN turns them into thresholds together with the Quant behind them.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import onnx
import torch
from onnxscript import opset18 as op
from onnxscript import values
from torch import fx

from anyprec.exporting.codes import drop_repeated_quantizers, share_quantizers
from anyprec.exporting.constants import clean
from anyprec.exporting.graphs import grid_of, is_call, tensor_of, with_buffer
from anyprec.exporting.integers import IntegerGraph
from anyprec.exporting.lowering import Lowered
from anyprec.exporting.onnx_file import translated, write_onnx
from anyprec.exporting.onnx_graph import with_matrix_products
from anyprec.exporting.operators import DEQUANTIZE, FAKE_QUANTIZE, FAKE_QUANTIZE_WEIGHT

OPSET = 18
"""The opset of everything but Quant; tools for FPGAs know no much later one."""

_DOMAIN = "qonnx.custom_op.general"


def write_qonnx(lowered: Lowered, path: Path) -> IntegerGraph:
    """Write the QONNX file of a lowered network, for batches of one: its tools want fixed shapes.

    Returns:
        The network, with a note that names the layers whose zero point no FPGA tool takes.

    Raises:
        ExportError: An operator has no ONNX form, or the file cannot be written.
    """
    graph = copy.deepcopy(lowered.graph)
    share_quantizers(graph)
    drop_repeated_quantizers(graph)
    clean(graph)
    network = IntegerGraph(dataclasses.replace(lowered, graph=graph), (), (), _notes(graph))
    write_onnx(qonnx_model(network), path)
    return network


def qonnx_model(network: IntegerGraph) -> onnx.ModelProto:
    """The QONNX model of a network whose clamps and norms are nodes of their own.

    Raises:
        ExportError: An operator has no ONNX form.
    """
    lowered = network.lowered
    graph = copy.deepcopy(lowered.graph)
    with_matrix_products(graph)
    _with_float_weights(graph)
    return translated(
        graph,
        lowered.example[:1],
        opset=OPSET,
        translations=_translations(),
        dynamic_batch=False,
    )


@torch.no_grad()
def _with_float_weights(graph: fx.GraphModule) -> None:
    """Store weights as numbers that are quantized again, to the same codes."""
    for node in list(graph.graph.nodes):
        if not is_call(node, DEQUANTIZE):
            continue
        codes, scale = (tensor_of(graph, operand) for operand in node.args[:2])
        with graph.graph.inserting_before(node):
            operands = with_buffer(graph, "weight", codes.to(scale.dtype) * scale), node.args[1]
            quantized = graph.graph.call_function(FAKE_QUANTIZE_WEIGHT, (*operands, *node.args[2:]))
        quantized.meta = dict(node.meta)
        node.replace_all_uses_with(quantized)
    clean(graph)


def _centred_zero_point(zero_point: int, bits: int) -> int:
    """The zero point where codes that can be negative are signed; 0 on symmetric grids."""
    return zero_point - 2 ** (bits - 1) if zero_point else 0


def _notes(graph: fx.GraphModule) -> tuple[str, ...]:
    layers: list[str] = []
    for node in graph.graph.nodes:
        if is_call(node, FAKE_QUANTIZE):
            grid = grid_of(node)
            if _centred_zero_point(grid.zero_point, grid.bits):
                layers.append(str(node.args[6]))
    if not layers:
        return ()
    note = f"inputs of {len(layers)} layers have a zero point, which qonnx runs but FINN does not "
    note += f"build: {', '.join(layers)}"
    return (note,)


def _translations() -> dict[Any, Any]:
    quant = values.Op(values.Opset(_DOMAIN, 1), "Quant", _quant_schema())

    def scalar(value: float) -> Any:
        return op.Constant(value_float=float(value))

    def fake_quantize(
        activation: Any, scale: float, zero_point: int, low: int, high: int, bits: int, layer: str
    ) -> Any:
        del low, high, layer
        zero = _centred_zero_point(zero_point, bits)
        signed = int(zero_point != 0)
        operands = activation, scalar(scale), scalar(zero), scalar(bits)
        return quant(*operands, signed=signed, narrow=0, rounding_mode="ROUND")

    def fake_quantize_weight(operand: Any, scale: Any, bits: int, layer: str) -> Any:
        del layer
        operands = operand, scale, scalar(0), scalar(bits)
        return quant(*operands, signed=1, narrow=0, rounding_mode="ROUND")

    return {FAKE_QUANTIZE: fake_quantize, FAKE_QUANTIZE_WEIGHT: fake_quantize_weight}


def _quant_schema() -> onnx.defs.OpSchema:
    """The operator as qonnx documents it: values, scale, zero point and bit-width."""
    schema = onnx.defs.OpSchema
    attribute, kinds = schema.Attribute, schema.AttrType
    names = ("values", "scale", "zero_point", "bit_width")
    return schema(
        "Quant",
        _DOMAIN,
        1,
        inputs=[schema.FormalParameter(name, "T") for name in names],
        outputs=[schema.FormalParameter("quantized", "T")],
        type_constraints=[("T", ["tensor(float)"], "")],
        attributes=[
            attribute("signed", kinds.INT, required=True),
            attribute("narrow", kinds.INT, required=True),
            attribute("rounding_mode", kinds.STRING, required=True),
        ],
    )

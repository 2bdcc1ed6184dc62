"""Writing an integer network as an ExecuTorch program, which XNNPACK runs on CPUs.

Activations and weights pass through the operators of `quantized_decomposed`, as in the flow of
torchao's quantizers; ExecuTorch's partitioner makes integer operators of what is between them.
What it wants: a dequantize of its own for each reader, positive scales, int8 codes, and a quantizer
right behind each layer. Layers without one run in floating point.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from torch import fx
from torch.fx.node import Node

from anyprec.errors import ExportError
from anyprec.exporting.codes import simplify_quantizers
from anyprec.exporting.constants import clean
from anyprec.exporting.files import write_bytes
from anyprec.exporting.graphs import (
    ATEN,
    Multiplication,
    grid_of,
    is_call,
    multiplication,
    only_reader,
    quantizer_of,
    tensor_of,
    with_buffer,
)
from anyprec.exporting.integers import IntegerGraph
from anyprec.exporting.lowering import Lowered
from anyprec.exporting.norms import fold_norms
from anyprec.exporting.operators import DEQUANTIZE, FAKE_QUANTIZE
from anyprec.exporting.signs import make_scales_positive

_DECOMPOSED = torch.ops.quantized_decomposed
"""Operators that the import of `_decomposed` registers."""

_INT8 = (-128, 127, torch.int8)
_SHIFT = 128
"""From codes that start at 0 to those of int8."""


def write_executorch(lowered: Lowered, path: Path) -> IntegerGraph:
    """Write the program of a lowered network, for batches of one.

    Returns:
        The network, with a note that names the layers that XNNPACK runs in floating point.

    Raises:
        ExportError: ExecuTorch does not take the network, or the file cannot be written.
    """
    network = to_xnnpack(lowered)
    write_bytes(program(network), path)
    return network


def to_xnnpack(lowered: Lowered) -> IntegerGraph:
    """The integer form of a lowered network that XNNPACK computes."""
    graph = copy.deepcopy(lowered.graph)
    simplify_quantizers(graph)
    folded = fold_norms(graph)
    simplify_quantizers(graph)
    make_scales_positive(graph, code_bits=8)
    floating = _floating_layers(graph)
    changed = dataclasses.replace(lowered, graph=graph)
    return IntegerGraph(changed, tuple(folded), (), _notes(floating))


def program(network: IntegerGraph) -> bytes:
    """The content of a file.

    Raises:
        ExportError: ExecuTorch does not take the network.
    """
    graph = copy.deepcopy(network.lowered.graph)
    _decompose(graph)
    example = network.lowered.example[:1]
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.export.export(graph, (example,), strict=False)
            edge = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
            content: bytes = edge.to_executorch().buffer
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        msg = f"ExecuTorch does not take this network ({type(error).__name__}: {lines[0]})"
        raise ExportError(msg) from error
    return content


def _floating_layers(graph: fx.GraphModule) -> list[str]:
    layers: list[str] = []
    for node in graph.graph.nodes:
        product = multiplication(node)
        if product is None or not is_call(product.weight, DEQUANTIZE):
            continue
        if not _is_integer(product):
            layers.append(product.layer)
    return layers


def _is_integer(product: Multiplication) -> bool:
    """Whether XNNPACK can run a layer on codes: they go in, and only codes come out."""
    reads_codes = quantizer_of(product.input) is not None
    return reads_codes and is_call(only_reader(product.node), FAKE_QUANTIZE)


def _notes(floating: list[str]) -> tuple[str, ...]:
    if not floating:
        return ()
    note = f"{len(floating)} layers run in floating point, since no quantizer alone reads their "
    note += f"results (convert with placement='integer'): {', '.join(floating)}"
    return (note,)


@torch.no_grad()
def _decompose(graph: fx.GraphModule) -> None:
    """Replace our operators by those that ExecuTorch knows, in place."""
    for node in list(graph.graph.nodes):
        product = multiplication(node)
        if product is not None and is_call(product.weight, DEQUANTIZE):
            _decompose_weight(graph, product)
    for node in list(graph.graph.nodes):
        if is_call(node, FAKE_QUANTIZE):
            _decompose_activation(graph, node)
    clean(graph)


def _decompose_weight(graph: fx.GraphModule, product: Multiplication) -> None:
    node = product.weight
    codes, scale = tensor_of(graph, node.args[0]), tensor_of(graph, node.args[1])
    axes = [axis for axis in range(scale.ndim) if scale.shape[axis] > 1]
    with graph.graph.inserting_before(product.node):
        if not _is_integer(product) or len(axes) > 1:
            weight = with_buffer(graph, "weight", codes.to(scale.dtype) * scale)
        elif not axes:
            held = with_buffer(graph, "codes", codes)
            grid = float(scale), 0, *_INT8
            weight = graph.graph.call_function(
                _DECOMPOSED.dequantize_per_tensor.default, (held, *grid)
            )
        else:
            scales = scale.flatten()
            zeros = torch.zeros(len(scales), dtype=torch.int64)
            held = with_buffer(graph, "codes", codes)
            grids = with_buffer(graph, "scale", scales), with_buffer(graph, "zeros", zeros)
            weight = graph.graph.call_function(
                _DECOMPOSED.dequantize_per_channel.default, (held, *grids, axes[0], *_INT8)
            )
    product.replace_weight(weight)


def _decompose_activation(graph: fx.GraphModule, node: Node) -> None:
    grid = grid_of(node)
    values: Any = node.args[0]
    operands = grid.scale, grid.zero_point - _SHIFT, *_INT8
    with graph.graph.inserting_before(node):
        if not grid.saturates:
            low, high = ((limit - grid.zero_point) * grid.scale for limit in (grid.low, grid.high))
            values = graph.graph.call_function(ATEN.hardtanh.default, (values, low, high))
        codes = graph.graph.call_function(
            _DECOMPOSED.quantize_per_tensor.default, (values, *operands)
        )
    for reader in list(node.users):
        with graph.graph.inserting_before(reader):
            own = graph.graph.call_function(
                _DECOMPOSED.dequantize_per_tensor.default, (codes, *operands)
            )
        reader.replace_input_with(node, own)
    graph.graph.erase_node(node)

"""What is changed in an ONNX model after it was translated: padding, and how weights are stored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_OPSET_OF_INT2 = 25


def merge_pads(model: onnx.ModelProto) -> None:
    """Make padding with zeros that of the convolution behind it, in place (SAME padding).

    Runtimes run a convolution of codes with any padding; a Pad of its own costs time, and often
    floating point.
    """
    graph = model.graph
    producers = {output: node for node in graph.node for output in node.output}
    readers = Counter(name for node in graph.node for name in node.input)
    readers.update(output.name for output in graph.output)
    constants = _Constants(model)
    merged: list[Any] = []
    for node in graph.node:
        pad = producers.get(node.input[0]) if node.op_type == "Conv" else None
        if pad is None or pad.op_type != "Pad" or readers[pad.output[0]] != 1:
            continue
        amounts = _spatial_pads(pad, constants)
        if amounts is not None and _add_pads(node, amounts):
            node.input[0] = pad.input[0]
            merged.append(pad)
    for pad in merged:
        graph.node.remove(pad)


def _add_pads(convolution: Any, amounts: list[int]) -> bool:
    """Let a convolution pad by this more; False if it determines its padding by itself."""
    attributes = {attribute.name: attribute for attribute in convolution.attribute}
    if "auto_pad" in attributes and attributes["auto_pad"].s != b"NOTSET":
        return False
    present = [0] * len(amounts)
    if "pads" in attributes:
        present = list(attributes["pads"].ints)
        convolution.attribute.remove(attributes["pads"])
    total = [before + added for before, added in zip(present, amounts, strict=True)]
    convolution.attribute.append(helper.make_attribute("pads", total))
    return True


class _Constants:
    """The constants of a model, by name."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self._nodes = {
            node.output[0]: node for node in model.graph.node if node.op_type == "Constant"
        }

    def of(self, name: str) -> Any:
        """The value as an array; None if it is no constant."""
        if name in self._initializers:
            return numpy_helper.to_array(self._initializers[name])
        if name not in self._nodes:
            return None
        attribute = self._nodes[name].attribute[0]
        value = helper.get_attribute_value(attribute)
        return numpy_helper.to_array(value) if attribute.name == "value" else np.asarray(value)


def _spatial_pads(pad: Any, constants: _Constants) -> list[int] | None:
    """Padding before and after each spatial axis; None if a convolution cannot do the same."""
    attributes = {attribute.name: attribute for attribute in pad.attribute}
    mode = attributes["mode"].s if "mode" in attributes else b"constant"
    # Inputs of Pad: values, amounts, the value to pad with, axes.
    names = [*pad.input, "", ""]
    amounts_name, value_name, axes_name = names[1:4]
    value = constants.of(value_name) if value_name else 0
    amounts = constants.of(amounts_name)
    if mode != b"constant" or value is None or np.any(value != 0) or amounts is None or axes_name:
        return None
    before, after = np.split(amounts, 2)
    if before[:2].any() or after[:2].any() or (amounts < 0).any():
        return None
    return [*map(int, before[2:]), *map(int, after[2:])]


def store_narrow_weights(
    model: onnx.ModelProto, *, narrowest: int, bits: Mapping[str, int] | None = None
) -> None:
    """Store weights of at most four bits in as many, in place.

    What they were multiplied by to fill eight bits is stored beside them, and nodes for both stand
    between them and their DequantizeLinear. Runtimes compute them once, when they load the file,
    and then run as if all weights had eight bits. Four bits that go into DequantizeLinear directly
    are dequantized in every pass instead.

    Args:
        model: The model.
        narrowest: Fewest bits to store.
        bits: Bit-width of weights, by the name of their initializer: a weight of eight bits whose
            codes happen to fit into two stays as it is, since few runtimes read those. None lets
            the codes decide.
    """
    graph = model.graph
    readers = {node.input[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    widened: dict[str, str] = {}
    widening: list[Any] = []
    for tensor in list(graph.initializer):
        if tensor.name not in readers or tensor.data_type != TensorProto.INT8:
            continue
        codes = numpy_helper.to_array(tensor)
        factor = _factors(codes, _axis(readers[tensor.name]))
        narrow = codes // factor
        fewest = max(narrowest, 2 if bits is None else bits[tensor.name])
        kind = _narrowest_type(narrow, fewest)
        if kind is None:
            continue
        tensor.CopyFrom(numpy_helper.from_array(narrow.astype(kind), tensor.name))
        widened[tensor.name] = f"{tensor.name}_int8"
        widening += _widening(graph, tensor.name, factor)
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in widened:
            node.input[0] = widened[node.input[0]]
    for node in reversed(widening):
        graph.node.insert(0, node)
    if any(tensor.data_type == TensorProto.INT2 for tensor in graph.initializer):
        _require_opset(model, _OPSET_OF_INT2)


def _axis(dequantize: Any) -> int:
    """Along which axis a DequantizeLinear has scales."""
    axes = [attribute.i for attribute in dequantize.attribute if attribute.name == "axis"]
    return axes[0] if axes else 1


def _factors(codes: Any, axis: int) -> Any:
    """The largest power of two that divides all codes of each channel, to be broadcast; int8."""
    if codes.ndim == 0 or not codes.size:
        return np.int8(1)
    rest = tuple(other for other in range(codes.ndim) if other != axis % codes.ndim)
    bits = np.bitwise_or.reduce(codes, axis=rest, keepdims=True).astype(np.int32)
    lowest = bits & -bits
    used = lowest[bits != 0]
    if not used.size:
        return np.int8(1)
    # Channels of zeros may have any factor. The lowest bit of -128 alone would be no int8.
    factors = np.where(bits == 0, used[0], lowest).clip(max=64).astype(np.int8)
    if np.unique(factors).size == 1:
        return factors.reshape(-1)[:1].reshape([1] * codes.ndim)
    return factors


def _widening(graph: Any, name: str, factor: Any) -> list[Any]:
    """Nodes that make int8 codes of narrow ones."""
    if (factor == 1).all():
        return [helper.make_node("Cast", [name], [f"{name}_int8"], to=TensorProto.INT8)]
    # The product is one of int32: OpenVINO would run one of int8 in every pass.
    multiplier = f"{name}_factor"
    graph.initializer.append(numpy_helper.from_array(factor.astype(np.int32), multiplier))
    return [
        helper.make_node("Cast", [name], [f"{name}_int32"], to=TensorProto.INT32),
        helper.make_node("Mul", [f"{name}_int32", multiplier], [f"{name}_product"]),
        helper.make_node("Cast", [f"{name}_product"], [f"{name}_int8"], to=TensorProto.INT8),
    ]


def _narrowest_type(codes: Any, narrowest: int) -> Any:
    """The narrowest type that holds these codes; None if that is int8."""
    if not codes.size:
        return None
    low, high = int(codes.min()), int(codes.max())
    if narrowest <= 2 and low >= -2 and high <= 1:
        return ml_dtypes.int2
    if narrowest <= 4 and low >= -8 and high <= 7:
        return ml_dtypes.int4
    return None


def _require_opset(model: onnx.ModelProto, version: int) -> None:
    for opset in model.opset_import:
        if opset.domain in ("", "ai.onnx"):
            opset.version = max(opset.version, version)

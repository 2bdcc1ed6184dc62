"""What is changed in an ONNX model after it was translated: padding, and how weights are stored."""

from __future__ import annotations

from collections import Counter
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


def store_narrow_weights(model: onnx.ModelProto, *, narrowest: int) -> None:
    """Store weights of at most four bits in as many, in place.

    A Cast to int8 stands between them and their DequantizeLinear: runtimes compute it once, when
    they load the file, and then run as if all weights had eight bits. Four bits that go into
    DequantizeLinear directly are dequantized in every pass instead.
    """
    graph = model.graph
    dequantized = {node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    casts: dict[str, Any] = {}
    for tensor in graph.initializer:
        if tensor.name not in dequantized or tensor.data_type != TensorProto.INT8:
            continue
        codes = numpy_helper.to_array(tensor)
        kind = _narrowest_type(codes, narrowest)
        if kind is not None:
            name = f"{tensor.name}_int8"
            tensor.CopyFrom(numpy_helper.from_array(codes.astype(kind), tensor.name))
            casts[tensor.name] = helper.make_node(
                "Cast", [tensor.name], [name], to=TensorProto.INT8
            )
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in casts:
            node.input[0] = casts[node.input[0]].output[0]
    for cast in reversed(casts.values()):
        graph.node.insert(0, cast)
    if any(tensor.data_type == TensorProto.INT2 for tensor in graph.initializer):
        _require_opset(model, _OPSET_OF_INT2)


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

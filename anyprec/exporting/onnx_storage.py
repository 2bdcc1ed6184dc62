"""What is changed in an ONNX model after it was translated: padding, and how weights are stored."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx


def merge_pads(model: onnx.ModelProto) -> None:
    """Make padding with zeros that of the convolution behind it, in place (SAME padding).

    Runtimes run a convolution of codes with any padding; a Pad of its own costs time, and often
    floating point.
    """
    from onnx import helper, numpy_helper

    graph = model.graph
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}
    readers = Counter(name for node in graph.node for name in node.input)
    readers.update(output.name for output in graph.output)
    merged: list[Any] = []
    for node in graph.node:
        pad = producers.get(node.input[0]) if node.op_type == "Conv" else None
        if pad is None or pad.op_type != "Pad" or readers[pad.output[0]] != 1:
            continue
        amounts = _constant(pad.input[1], initializers, producers)
        spatial = _spatial_pads(pad, amounts, initializers, producers)
        if spatial is None:
            continue
        attributes = {attribute.name: attribute for attribute in node.attribute}
        if "auto_pad" in attributes and attributes["auto_pad"].s != b"NOTSET":
            continue
        present = list(attributes["pads"].ints) if "pads" in attributes else [0] * len(spatial)
        if "pads" in attributes:
            node.attribute.remove(attributes["pads"])
        total = [int(own + added) for own, added in zip(present, spatial, strict=True)]
        node.attribute.append(helper.make_attribute("pads", total))
        node.input[0] = pad.input[0]
        merged.append(pad)
    for pad in merged:
        graph.node.remove(pad)
    del numpy_helper


def _constant(name: str, initializers: dict[str, Any], producers: dict[str, Any]) -> Any:
    """The value of a constant; None if it is none."""
    from onnx import numpy_helper

    if name in initializers:
        return numpy_helper.to_array(initializers[name])
    producer = producers.get(name)
    if producer is None or producer.op_type != "Constant":
        return None
    attribute = producer.attribute[0]
    if attribute.name == "value":
        return numpy_helper.to_array(attribute.t)
    if attribute.name in ("value_ints", "value_floats"):
        return np.array(attribute.ints or attribute.floats)
    return np.array(attribute.i if attribute.name == "value_int" else attribute.f)


def _spatial_pads(
    pad: Any, amounts: Any, initializers: dict[str, Any], producers: dict[str, Any]
) -> list[int] | None:
    """Padding before and after each spatial axis; None if a convolution cannot do the same."""
    attributes = {attribute.name: attribute for attribute in pad.attribute}
    if "mode" in attributes and attributes["mode"].s != b"constant":
        return None
    if len(pad.input) > 2 and pad.input[2]:
        value = _constant(pad.input[2], initializers, producers)
        if value is None or float(value) != 0:
            return None
    if amounts is None or (len(pad.input) > 3 and pad.input[3]):
        return None
    before, after = np.split(np.asarray(amounts), 2)
    if before[:2].any() or after[:2].any() or (before < 0).any() or (after < 0).any():
        return None
    return [*map(int, before[2:]), *map(int, after[2:])]


def store_narrow_weights(model: onnx.ModelProto, *, narrowest: int) -> None:
    """Store weights of at most four bits in as many, in place.

    A Cast to int8 stands between them and their DequantizeLinear: runtimes compute it once, when
    they load the file, and then run as if all weights had eight bits. Four bits that go into
    DequantizeLinear directly are dequantized in every pass instead.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph = model.graph
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    casts: list[Any] = []
    cast_names: dict[str, str] = {}
    for node in graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in initializers:
            continue
        tensor = initializers[node.input[0]]
        if tensor.data_type != TensorProto.INT8:
            if tensor.name in cast_names:
                node.input[0] = cast_names[tensor.name]
            continue
        codes = numpy_helper.to_array(tensor)
        kind = _narrowest_kind(codes, narrowest)
        if kind is None:
            continue
        name = f"{tensor.name}_int8"
        tensor.CopyFrom(
            helper.make_tensor(tensor.name, kind, codes.shape, codes.flatten().tolist())
        )
        casts.append(helper.make_node("Cast", [tensor.name], [name], to=TensorProto.INT8))
        cast_names[tensor.name] = name
        node.input[0] = name
    for cast in reversed(casts):
        graph.node.insert(0, cast)
    if any(tensor.data_type == getattr(TensorProto, "INT2", -1) for tensor in graph.initializer):
        _require_opset(model, 25)


def _narrowest_kind(codes: Any, narrowest: int) -> int | None:
    """The narrowest ONNX type that holds these codes; None if that is int8."""
    from onnx import TensorProto

    if not codes.size:
        return None
    low, high = int(codes.min()), int(codes.max())
    if narrowest <= 2 and low >= -2 and high <= 1 and hasattr(TensorProto, "INT2"):
        return int(TensorProto.INT2)
    if narrowest <= 4 and low >= -8 and high <= 7:
        return int(TensorProto.INT4)
    return None


def _require_opset(model: onnx.ModelProto, version: int) -> None:
    for opset in model.opset_import:
        if opset.domain in ("", "ai.onnx"):
            opset.version = max(opset.version, version)

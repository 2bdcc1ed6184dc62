"""Copies of an exported ONNX model that tell, or take, the codes of its quantizers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from anyprec.errors import ExportError

_GIVEN = ".given"


def read_onnx(path: Path) -> onnx.ModelProto:
    """The model in a file.

    Raises:
        ExportError: It is no ONNX model.
    """
    try:
        return onnx.load(path)
    except Exception as error:
        msg = f"{str(path)!r} is no ONNX model ({type(error).__name__}): export it again"
        raise ExportError(msg) from error


def values_of(model: onnx.ModelProto) -> set[str]:
    """Names of the values that a model computes."""
    return {name for node in model.graph.node for name in node.output}


def telling_codes(model: onnx.ModelProto, names: Mapping[str, int]) -> bytes:
    """A model that has codes among its outputs.

    Args:
        model: Not changed.
        names: Names of the codes to the number of their axes.
    """
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    _add_outputs(copied, names)
    content: bytes = copied.SerializeToString()
    return content


def taking_codes(model: onnx.ModelProto, names: Mapping[str, int]) -> bytes:
    """A model in which what reads codes gets them from outside: each layer is on its own.

    Args:
        model: Not changed.
        names: Names of the codes to the number of their axes. They are outputs; the input for each
            is called `given_name(name)`.
    """
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    for node in copied.graph.node:
        for position, name in enumerate(node.input):
            if name in names:
                node.input[position] = given_name(name)
    for name, axes in names.items():
        given = helper.make_tensor_value_info(given_name(name), TensorProto.UINT8, [None] * axes)
        copied.graph.input.append(given)
    _add_outputs(copied, names)
    content: bytes = copied.SerializeToString()
    return content


def given_name(name: str) -> str:
    """The input that takes the place of codes."""
    return name + _GIVEN


def _add_outputs(model: onnx.ModelProto, names: Mapping[str, int]) -> None:
    for name, axes in names.items():
        output = helper.make_tensor_value_info(name, TensorProto.UINT8, [None] * axes)
        model.graph.output.append(output)

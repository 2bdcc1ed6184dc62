"""Writing an integer network as a float ONNX file and the encodings of its tensors beside it.

Qualcomm's tools read both: the file's numbers are quantized by what the encodings say. The format
is version 1.0.0 of AIMET's "Encoding Format Specification" (Docs/techniques/encoding_spec.rst of
github.com/qualcomm/aimet), which a converter takes as quantization overrides. It holds codes of any
bit-width; versions 2 and later have 2, 4, 8 and 16 bits only. Biases have no encodings, as in
AIMET's files of that version: a converter quantizes them as its chip needs.

Numbers are `(code + offset) * scale`, with codes from 0: offsets are zero points, negated.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from onnxscript import values
from torch import fx

from anyprec.errors import ExportError
from anyprec.exporting.codes import drop_repeated_quantizers, share_quantizers
from anyprec.exporting.constants import clean
from anyprec.exporting.files import write_bytes
from anyprec.exporting.graphs import is_call, tensor_of
from anyprec.exporting.integers import IntegerGraph
from anyprec.exporting.lowering import Lowered
from anyprec.exporting.norms import fold_norms
from anyprec.exporting.onnx_file import translated, write_onnx
from anyprec.exporting.onnx_graph import with_matrix_products
from anyprec.exporting.operators import DEQUANTIZE, FAKE_QUANTIZE, FAKE_QUANTIZE_WEIGHT
from anyprec.exporting.signs import make_scales_positive

OPSET = 18
"""The first opset that torch's exporter writes without a conversion."""

SUFFIX = ".encodings"
"""How the name of the second file ends, which is else that of the first one."""

_DOMAIN = "anyprec.encodings"


def write_encodings(lowered: Lowered, path: Path) -> IntegerGraph:
    """Write a lowered network as a float ONNX file, and the encodings beside it.

    Norms are folded into scales. Clamps stay nodes: encodings have no limits of their own.

    Returns:
        The network, with a note that names the layers behind which signs are multiplied.

    Raises:
        ExportError: A weight has scales that no encoding has, an operator has no ONNX form, or a
            file cannot be written.
    """
    graph = copy.deepcopy(lowered.graph)
    share_quantizers(graph)
    drop_repeated_quantizers(graph)
    _as_activations(graph)
    folded = fold_norms(graph)
    signed = make_scales_positive(graph)
    changed = dataclasses.replace(lowered, graph=graph)
    network = IntegerGraph(changed, tuple(folded), (), _notes(signed))
    model, encodings = encoded_model(network)
    write_onnx(model, path)
    write_bytes(json.dumps(encodings, indent=1).encode(), path.with_suffix(SUFFIX))
    return network


def encoded_model(network: IntegerGraph) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """The float ONNX model of an integer network, and the encodings of its tensors.

    Raises:
        ExportError: as `write_encodings`.
    """
    lowered = network.lowered
    graph = copy.deepcopy(lowered.graph)
    with_matrix_products(graph)
    model = translated(
        graph,
        lowered.example,
        opset=OPSET,
        translations=_translations(),
        dynamic_batch=lowered.dynamic_batch,
    )
    file = _EncodedFile(model)
    file.take_parameters()
    file.take_activations()
    return model, {
        "version": "1.0.0",
        "activation_encodings": file.activations,
        "param_encodings": file.parameters,
        "excluded_layers": [],
    }


def _as_activations(graph: fx.GraphModule) -> None:
    """Quantize weight operands that the network computes as the activations that they are."""
    for node in list(graph.graph.nodes):
        if not is_call(node, FAKE_QUANTIZE_WEIGHT):
            continue
        operand, scale_node, bits, layer = node.args
        scale = tensor_of(graph, scale_node)
        if scale.numel() > 1:
            msg = f"layer {layer!r}: its weight (W{bits}) depends on the network's input and has a "
            msg += "scale for each channel, while the encoding of such a tensor has one scale: "
            msg += "convert with per_channel=False, or leave the layer out"
            raise ExportError(msg)
        grid = float(scale), 2 ** (bits - 1), 0, 2**bits - 1, bits
        with graph.graph.inserting_before(node):
            quantized = graph.graph.call_function(FAKE_QUANTIZE, (operand, *grid, layer))
        quantized.meta = dict(node.meta)
        node.replace_all_uses_with(quantized)
    clean(graph)


def _notes(signed: list[str]) -> tuple[str, ...]:
    if not signed:
        return ()
    note = f"{len(signed)} layers have channels whose norm has a negative scale and whose codes "
    note += f"cannot be negated; signs are multiplied behind them: {', '.join(signed)}"
    return (note,)


class _EncodedFile:
    """A translated model, from which our operators are taken out as encodings."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._graph = model.graph
        self._model = model
        self._initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self._names: Counter[str] = Counter()
        self.activations: list[dict[str, Any]] = []
        self.parameters: list[dict[str, Any]] = []

    def take_parameters(self) -> None:
        """Store the numbers that weights stand for, and their encodings."""
        renamed: dict[str, str] = {}
        for node, attributes in self._of_kind("Parameter"):
            codes, scale = (numpy_helper.to_array(self._initializers[name]) for name in node.input)
            bits, layer = attributes["bits"], attributes["layer"].decode()
            name = self._unique(f"{layer}.weight")
            numbers = codes.astype(np.float32) * scale
            self._graph.initializer.append(numpy_helper.from_array(numbers, name))
            self.parameters.append(_parameter(name, layer, bits, scale))
            renamed[node.output[0]] = name
        self._rename(renamed)
        read = {name for node in self._graph.node for name in node.input}
        for tensor in list(self._graph.initializer):
            if tensor.name not in read:
                self._graph.initializer.remove(tensor)

    def take_activations(self) -> None:
        """Name the tensors that are quantized, and write down their encodings.

        Whoever else reads such a tensor reads it unquantized. Then an Identity makes a tensor of
        its own of what is quantized.
        """
        readers = Counter(name for node in self._graph.node for name in node.input)
        fixed = {value.name for value in [*self._graph.input, *self._graph.output]}
        renamed: dict[str, str] = {}
        for node, attributes in self._of_kind("Activation", keep=True):
            source, result = node.input[0], node.output[0]
            name = self._unique(f"{attributes['layer'].decode()}.input")
            alone = readers[source] == 1 and source not in self._initializers
            if alone and result not in fixed:
                self._graph.node.remove(node)
                name = source if source in fixed else name
                renamed[source] = renamed[result] = name
            else:
                name = result if result in fixed else name
                node.CopyFrom(helper.make_node("Identity", [source], [name], name=node.name))
                renamed[result] = name
            self.activations.append(_activation(name, attributes))
        self._rename(renamed)
        for opset in list(self._model.opset_import):
            if opset.domain == _DOMAIN:
                self._model.opset_import.remove(opset)

    def _of_kind(self, kind: str, *, keep: bool = False) -> list[tuple[Any, dict[str, Any]]]:
        """Our operators of one kind with their attributes, taken out of the graph."""
        found: list[tuple[Any, dict[str, Any]]] = []
        for node in list(self._graph.node):
            if node.domain == _DOMAIN and node.op_type == kind:
                attributes = {
                    each.name: helper.get_attribute_value(each) for each in node.attribute
                }
                found.append((node, attributes))
                if not keep:
                    self._graph.node.remove(node)
        return found

    def _unique(self, name: str) -> str:
        self._names[name] += 1
        count = self._names[name]
        return name if count == 1 else f"{name}_{count}"

    def _rename(self, renamed: dict[str, str]) -> None:
        for node in self._graph.node:
            for tensors in (node.input, node.output):
                for index, name in enumerate(tensors):
                    tensors[index] = _last_name(name, renamed)
        # Shapes of tensors that are there no more would mislead.
        del self._graph.value_info[:]


def _last_name(name: str, renamed: dict[str, str]) -> str:
    while renamed.get(name, name) != name:
        name = renamed[name]
    return name


def _parameter(name: str, layer: str, bits: int, scale: Any) -> dict[str, Any]:
    if sum(length > 1 for length in scale.shape) > 1:
        msg = f"layer {layer!r}: the scales of its weight (W{bits}) are along two axes, since it "
        msg += "is a transposed convolution with groups, while encodings have one axis: export to "
        msg += "'onnx', or convert with per_channel=False"
        raise ExportError(msg)
    return {
        "name": name,
        "enc_type": "PER_CHANNEL" if scale.size > 1 else "PER_TENSOR",
        "dtype": "INT",
        "bw": bits,
        "is_sym": True,
        "scale": scale.flatten().tolist(),
        "offset": [-(2 ** (bits - 1))] * scale.size,
    }


def _activation(name: str, attributes: dict[str, Any]) -> dict[str, Any]:
    bits, zero_point = attributes["bits"], attributes["zero_point"]
    return {
        "name": name,
        "enc_type": "PER_TENSOR",
        "dtype": "INT",
        "bw": bits,
        "is_sym": zero_point == 2 ** (bits - 1),
        "scale": [attributes["scale"]],
        "offset": [-zero_point],
    }


def _translations() -> dict[Any, Any]:
    """Our operators as nodes that `_EncodedFile` takes out again."""
    opset = values.Opset(_DOMAIN, 1)
    activation = values.Op(opset, "Activation", _schema("Activation", 1, scale="FLOAT"))
    parameter = values.Op(opset, "Parameter", _schema("Parameter", 2))

    def fake_quantize(
        operand: Any, scale: float, zero_point: int, low: int, high: int, bits: int, layer: str
    ) -> Any:
        del low, high
        return activation(operand, scale=scale, zero_point=zero_point, bits=bits, layer=layer)

    def dequantize(codes: Any, scale: Any, bits: int, layer: str) -> Any:
        return parameter(codes, scale, zero_point=0, bits=bits, layer=layer)

    return {FAKE_QUANTIZE: fake_quantize, DEQUANTIZE: dequantize}


def _schema(name: str, operands: int, **more: str) -> onnx.defs.OpSchema:
    schema = onnx.defs.OpSchema
    kinds = {"bits": "INT", "layer": "STRING", "zero_point": "INT", **more}
    return schema(
        name,
        _DOMAIN,
        1,
        inputs=[schema.FormalParameter(f"x{number}", f"T{number}") for number in range(operands)],
        outputs=[schema.FormalParameter("y", "U")],
        type_constraints=[
            *((f"T{number}", ["tensor(float)", "tensor(int8)"], "") for number in range(operands)),
            ("U", ["tensor(float)"], ""),
        ],
        attributes=[
            schema.Attribute(key, getattr(schema.AttrType, kind), required=True)
            for key, kind in kinds.items()
        ],
    )

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor

import anyprec
from anyprec import Bits
from anyprec.errors import ExportError, HardwareError
from tests.conftest import SmallNet
from tests.exporting.networks import converted

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from anyprec.exporting.onnx_profile import layer_of_operators  # noqa: E402 (needs onnx)


def node(kind: str, name: str, inputs: str, outputs: str) -> object:
    return onnx.helper.make_node(kind, inputs.split(), outputs.split(), name=name)


def test_operators_count_for_the_layer_that_reads_their_result_next() -> None:
    nodes = [
        node("QuantizeLinear", "q", "images s", "codes"),
        node("Transpose", "order", "codes", "ordered"),
        node("QLinearConv", "stem_token_3", "ordered w", "first"),
        node("QLinearConv", "blocks.0.conv#2_nhwc", "first v", "second"),
        node("QLinearAdd", "add", "first second", "sum"),
        node("Gemm", "fc", "sum u", "logits"),
        node("Identity", "last", "logits", "output"),
    ]
    graph = onnx.helper.make_graph(nodes, "network", [], [])
    model = onnx.helper.make_model(graph)
    assert layer_of_operators(model, ["stem", "blocks.0.conv", "fc"]) == {
        "q": "stem",
        "order": "stem",
        "stem_token_3": "stem",
        "blocks.0.conv#2_nhwc": "blocks.0.conv",
        "add": "fc",
        "fc": "fc",
        "last": "fc",
    }


def test_every_layer_has_a_time_at_each_of_its_precisions(images: Tensor) -> None:
    model = converted(SmallNet(), images, activation_bits=(8,))
    model.set_bits((4, 8))
    start = time.perf_counter()
    table = anyprec.measure_latency(model, rounds=3)
    elapsed = time.perf_counter() - start
    assert model.bits == model.resolve_bits((4, 8))
    assert table.keys() == model.candidates.keys()
    for path, candidates in model.candidates.items():
        assert table[path].keys() == {Bits(weight, 8) for weight in candidates.weight}
        assert all(0 < seconds < elapsed for seconds in table[path].values())
    whole = sum(times[Bits(8, 8)] for times in table.values())
    model.set_bits(8)
    costs = anyprec.cost_model(model).with_costs({"latency": table})
    assert costs.total("latency", model.bits) == pytest.approx(whole)


def test_only_what_runs_here_is_measured(images: Tensor) -> None:
    model = converted(SmallNet(), images)
    with pytest.raises(ExportError, match="times of 'imx500' cannot be measured here, only those "):
        anyprec.measure_latency(model, hardware="imx500")
    with pytest.raises(HardwareError, match="did you mean 'onnxruntime'"):
        anyprec.measure_latency(model, hardware="onnxruntim")
    with pytest.raises(anyprec.ConversionError, match="measure_latency"):
        anyprec.measure_latency(torch.nn.Linear(2, 2))  # type: ignore[arg-type]

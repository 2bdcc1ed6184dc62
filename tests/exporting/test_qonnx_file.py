from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

import anyprec
from anyprec.exporting.lowering import lower
from anyprec.exporting.operators import FAKE_QUANTIZE
from tests.conftest import SmallNet

qonnx_cleanup = pytest.importorskip("qonnx.util.cleanup")
onnx_exec = pytest.importorskip("qonnx.core.onnx_exec")
inference_cost = pytest.importorskip("qonnx.util.inference_cost").inference_cost
ModelWrapper = pytest.importorskip("qonnx.core.modelwrapper").ModelWrapper

CANDIDATES = (2, 3, 4, 5, 6, 8)
CONFIGURATIONS = {
    "W2A2": 2,
    "W4A4": 4,
    "mixed": {"depthwise": (5, 6), "pointwise": (3, 5), "head": (6, 3)},
}


@dataclass(frozen=True, eq=False)
class Case:
    """A network at one configuration, exported, and the file after qonnx's clean-up."""

    model: anyprec.ConvertedModel
    config: anyprec.BitConfig
    images: Tensor
    exported: anyprec.Exported
    clean: Any
    stored: Any


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def case(request: Any, tmp_path_factory: Any) -> Case:
    torch.manual_seed(0)
    network = SmallNet().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    images = torch.randn(8, 3, 16, 16)
    model = anyprec.convert(network, bits=CANDIDATES, example_input=images[:1])
    anyprec.calibrate(model, [images])
    model.set_bits(CONFIGURATIONS[request.param])
    config = model.bits
    assert config is not None
    folder = tmp_path_factory.mktemp("qonnx")
    exported = anyprec.export(model, folder / "net.onnx", target="qonnx")
    clean = folder / "clean.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # qonnx's own
        qonnx_cleanup.cleanup(str(exported.path), out_file=str(clean))
        wrappers = ModelWrapper(str(clean)), ModelWrapper(str(exported.path))
    return Case(model, config, images[:1], exported, *wrappers)


def executed(model: Any, images: Tensor) -> dict[str, Any]:
    """Every tensor of the model as qonnx computes it."""
    values: dict[str, Any] = onnx_exec.execute_onnx(
        model, {model.graph.input[0].name: images.numpy()}, return_full_exec_context=True
    )
    return values


def quants(model: Any, *, of_weights: bool) -> list[Any]:
    """The Quant nodes of a file."""
    found = []
    for node in model.graph.node:
        is_weight = node.op_type == "Quant" and model.get_initializer(node.input[0]) is not None
        if node.op_type == "Quant" and is_weight is of_weights:
            found.append(node)
    return found


class Recorder(fx.Interpreter):
    """Runs a lowered graph and keeps the codes, without zero point, of its activations."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.codes: dict[float, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.target is FAKE_QUANTIZE:
            self.codes[n.args[1]] = np.rint(result.numpy() / np.float32(n.args[1]))
        return result


def test_qonnx_computes_what_set_bits_computes(case: Case) -> None:
    values = executed(case.clean, case.images)
    recorder = Recorder(lower(case.model).graph)
    with torch.no_grad():
        expected = case.model(case.images)
        assert torch.equal(recorder.run(case.images), expected)

    # Each activation has a scale of its own.
    assert len(recorder.codes) == len(case.model.quantized_layers)
    nodes = quants(case.clean, of_weights=False)
    assert len(nodes) == len(recorder.codes)
    for node in nodes:
        scale = values[node.input[1]]
        found, own = np.rint(values[node.output[0]] / scale), recorder.codes[float(scale)]
        # Sums in another order move a value over the middle between two codes now and then.
        assert np.abs(own - found).max() <= 1
        assert (own != found).mean() <= 1e-3
    logits = values[case.clean.graph.output[0].name]
    assert np.abs(logits - expected.numpy()).max() <= 1e-3 * np.abs(expected.numpy()).max()


def test_weights_are_the_same_codes(case: Case) -> None:
    layers = case.model.quantized_layers
    nodes = quants(case.stored, of_weights=True)
    assert len(nodes) == len(layers)
    for node, (path, layer) in zip(nodes, layers.items(), strict=True):
        weight, scale, zero_point, bits = map(case.stored.get_initializer, node.input)
        codes = layer.weight_codes(layer.weight_index).numpy()
        assert zero_point == 0
        assert bits == case.config[path].weight
        assert np.array_equal(np.rint(weight / scale), codes), path


def test_costs_that_qonnx_counts_are_ours(case: Case) -> None:
    found = inference_cost(case.clean, discount_sparsity=False)["total_cost"]
    cost = anyprec.cost_of(case.model)
    assert found["total_macs"] == sum(layer.macs for layer in cost.model.layers.values())
    assert found["total_mem_w_bits"] == cost.size


def test_zero_points_that_no_fpga_has_are_named(case: Case) -> None:
    affine = []
    for path, layer in case.model.quantized_layers.items():
        lowest, highest = layer.input_quantizer.limits(layer.input_index)
        if lowest not in (0, -highest - 1):
            affine.append(path)
    assert 0 < len(affine) < len(case.model.quantized_layers)
    (note,) = case.exported.notes
    expected = f"inputs of {len(affine)} layers have a zero point, which qonnx runs but FINN does "
    assert note == f"{expected}not build: {', '.join(affine)}"

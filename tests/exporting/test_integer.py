"""The integer network: equal to onnxruntime bit for bit, and a module like any other."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import anyprec
from anyprec.errors import BatchError, ExportError, TrainingError
from anyprec.exporting.graphs import ATEN, grid_of
from anyprec.exporting.integer import integer_network
from anyprec.exporting.integer_rewriting import in_codes, quantize_before_views
from anyprec.exporting.integers import IntegerGraph
from anyprec.exporting.operators import FAKE_QUANTIZE
from tests.exporting.networks import graph_of, quantized
from tests.exporting.placed import Mixed, Pools, calibrated, placed

SIZE = 19


@pytest.fixture(scope="module")
def mixed() -> IntegerGraph:
    torch.manual_seed(0)
    return placed(Mixed(), 8)


def images(batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))


def in_onnxruntime(network: IntegerGraph, folder: Path) -> tuple[Tensor, Counter[str]]:
    """What onnxruntime computes from the network's file, and the operators that it runs."""
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    from anyprec.exporting.onnx_file import onnx_model  # noqa: PLC0415 (needs onnx)

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    model = onnx_model(network).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: images().numpy()})
    nodes = onnx.load(folder / "optimised.onnx").graph.node
    return torch.from_numpy(output), Counter(node.op_type for node in nodes)


MANY = {
    "stem": 8,
    "first": (2, 4),
    "depthwise": 4,
    "shortcut": (8, 2),
    "wide": (4, 8),
    "hidden": 2,
    "head": 8,
}


@pytest.mark.parametrize("bits", [8, MANY])
def test_it_equals_onnxruntime(bits: Any, mixed: IntegerGraph, tmp_path: Path) -> None:
    network = mixed if bits == 8 else placed(Mixed(), bits)
    computed, run = in_onnxruntime(network, tmp_path)
    made = integer_network(network)
    assert torch.equal(made(images()), computed)
    assert computed.std() > 0.1
    # Nothing is left in floating point, here or there.
    assert not made.floating_operators
    assert run["QLinearConv"] == 5
    assert run["QGemm"] == 2
    assert run["QLinearAdd"] == run["QLinearAveragePool"] == run["QLinearGlobalAveragePool"] == 1
    assert not {"Conv", "Gemm", "Add", "AveragePool", "GlobalAveragePool"} & set(run)


def test_average_pooling_equals_onnxruntime(tmp_path: Path) -> None:
    network = placed(Pools(), 8)
    computed, run = in_onnxruntime(network, tmp_path)
    assert torch.equal(integer_network(network)(images()), computed)
    assert run["QLinearAveragePool"] == 2


def test_two_quantizers_in_a_row_equal_onnxruntime(tmp_path: Path) -> None:
    network = placed(Pools(), 8)
    graph = network.lowered.graph
    convolution = next(node for node in graph.graph.nodes if "conv2d" in str(node.target))
    first = next(iter(convolution.users))
    grid = grid_of(first)
    # Another grid of eight bits, without limits of its own: onnxruntime would merge the two.
    with graph.graph.inserting_after(first):
        arguments = (first, 1.37 * grid.scale, 0, 0, 255, 8, "again")
        second = graph.graph.call_function(FAKE_QUANTIZE, arguments)
    first.update_arg(3, 0)
    first.update_arg(4, 255)
    second.meta = dict(first.meta)
    first.replace_all_uses_with(second, delete_user_cb=lambda user: user is not second)
    graph.recompile()
    computed, _ = in_onnxruntime(network, tmp_path)
    assert torch.equal(integer_network(network)(images()), computed)


def test_it_is_close_to_the_network_that_it_was_made_from(mixed: IntegerGraph) -> None:
    made = integer_network(mixed)
    with torch.no_grad():
        simulated = mixed.lowered.graph(images())
    # A code that lies on a tie may be the next one, and move what follows.
    assert (made(images()) - simulated).abs().max() < 0.05 * simulated.std()


def test_without_quantizers_behind_layers_sums_are_made_of_numbers() -> None:
    model = calibrated(Mixed())
    made = anyprec.integer(model, (4, 8))
    model.set_bits((4, 8))
    with torch.no_grad():
        expected = model(images())
    assert (made(images()) - expected).abs().max() < 0.05 * expected.std()
    places = {(place.path, place.operator): place for place in made.operators}
    assert len(made.operators) == len(made.integer_operators) + len(made.floating_operators)
    head = places["head", "linear"]
    assert head.runs_in == "integers"
    assert head.reason == "its result is dequantized: no quantizer alone reads it"
    assert places["first", "conv2d"].reason == ""
    (total,) = [place for place in made.operators if place.operator == "add"]
    assert total.runs_in == "floating point"
    assert total.reason == "an operand is not quantized"


def test_layers_that_are_not_quantized_are_named_with_their_reason() -> None:
    model = anyprec.convert(Mixed().eval(), bits=8, exclude="head", example_input=images())
    anyprec.calibrate(model, [images()])
    made = anyprec.integer(model, 8)
    (head,) = [place for place in made.floating_operators if place.path == "head"]
    assert head.operator == "linear"
    assert head.reason == "excluded by 'head'"


def test_batches_of_any_size(mixed: IntegerGraph) -> None:
    made = integer_network(mixed)
    together = made(images(5))
    apart = torch.cat([made(image) for image in images(5).split(1)])
    assert torch.equal(together, apart)


def test_a_batch_of_one_size() -> None:
    made = anyprec.integer(calibrated(Mixed()), 8, example_input=images(3), dynamic_batch=False)
    assert made(images(3)).shape == (3, 10)
    with pytest.raises(BatchError, match=r"made for batches of 3, got one of 2: call integer\(\)"):
        made(images(2))


def test_outputs_are_nested_as_those_of_the_network() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> dict[str, Any]:
            x = self.stem(x)
            return {"features": (x, F.relu(x)), "mean": x.mean()}

    model = calibrated(Several())
    made = anyprec.integer(model, 8)(images())
    model.set_bits(8)
    with torch.no_grad():
        expected = model(images())
    assert list(made) == list(expected) == ["features", "mean"]
    torch.testing.assert_close(made["features"], expected["features"], rtol=0, atol=1e-4)


def test_it_can_be_pickled_copied_and_loaded(mixed: IntegerGraph) -> None:
    made = integer_network(mixed)
    expected = made(images())
    assert torch.equal(pickle.loads(pickle.dumps(made))(images()), expected)
    copied = copy.deepcopy(made)
    state = made.state_dict()
    for tensor in copied.state_dict().values():
        tensor.zero_()
    assert not torch.equal(copied(images()), expected)
    copied.load_state_dict(state)
    assert torch.equal(copied(images()), expected)


def test_its_state_is_codes(mixed: IntegerGraph) -> None:
    state = integer_network(mixed).state_dict()
    assert state["network.first.codes"].dtype == torch.int8
    assert state["network.first.bias"].dtype == torch.int32
    assert state["network.first.multiplier"].shape == (16, 1, 1)
    assert not any(tensor.requires_grad for tensor in state.values())


def test_it_prints_bits_and_scales_by_layer(mixed: IntegerGraph) -> None:
    text = str(integer_network(mixed))
    assert "(first): IntegerProduct(W8A8, conv2d 16x16x3x3, input (codes 0..255, scale" in text
    assert "(head): IntegerProduct(W8A8, linear 10x12" in text
    assert "output float32" in text


def test_the_graph_that_it_is_made_from_stays(mixed: IntegerGraph) -> None:
    before = str(mixed.lowered.graph.graph)
    integer_network(mixed)
    assert str(mixed.lowered.graph.graph) == before


def test_autocast_changes_nothing(mixed: IntegerGraph) -> None:
    made = integer_network(mixed)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made(images()), made(images()).float())
        inside = made(images())
    assert torch.equal(inside, made(images()))


def test_it_cannot_be_trained(mixed: IntegerGraph) -> None:
    made = integer_network(mixed)
    assert made.eval() is made
    assert not made(images().requires_grad_()).requires_grad
    with pytest.raises(TrainingError, match="cannot be trained: train the network that it was"):
        made.train()
    assert not made.training


def test_a_precision_must_be_set() -> None:
    with pytest.raises(ExportError, match="the network runs in floating point: pass bits="):
        anyprec.integer(calibrated(Mixed()), None)


def test_a_quantizer_behind_a_view_rounds_the_sum_before_it() -> None:
    def build(graph: fx.Graph, values: fx.Node) -> fx.Node:
        values = quantized(graph, values, 0.02, 100)
        values = graph.call_function(ATEN.adaptive_avg_pool2d.default, (values, [1, 1]))
        values = graph.call_function(ATEN.flatten.using_ints, (values, 1))
        return quantized(graph, values, 0.01, 120)

    graph = graph_of(build)
    expected = graph(images())
    _, (average,) = in_codes(graph, {})
    assert average.runs_in == "floating point"
    quantize_before_views(graph)
    assert torch.equal(graph(images()), expected)
    made, (average,) = in_codes(graph, {})
    assert average.runs_in == "integers"
    # The average is made of codes now: next to a tie it may be rounded otherwise.
    assert (made(images()) - expected).abs().max() <= 0.01 + 1e-6

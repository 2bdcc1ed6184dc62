from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx

from anyprec.exporting.codes import (
    absorb_clamps,
    drop_repeated_quantizers,
    quantize_before_padding,
    quantize_behind_pools,
    share_quantizers,
    simplify_quantizers,
)
from anyprec.exporting.graphs import ATEN, grid_of, is_call
from anyprec.exporting.operators import FAKE_QUANTIZE
from tests.exporting.networks import graph_of, operators, quantized


@pytest.fixture
def values() -> Tensor:
    # Ties, the limits of clamps, and far beyond them.
    ties = torch.arange(-40, 400) * 0.025
    return torch.cat((ties, torch.randn(1000) * 8, torch.tensor([6.0, -0.0, 1e30, -1e30])))


CLAMPS = {
    "relu": (ATEN.relu.default, ()),
    "relu6": (ATEN.hardtanh.default, (0.0, 6.0)),
    "hardtanh": (ATEN.hardtanh.default, ()),
    "clamp": (ATEN.clamp.default, (0.3, 2.2)),
    "clamp_min": (ATEN.clamp.default, (0.1,)),
    "above the grid": (ATEN.clamp.default, (500.0, 600.0)),
    "below the grid": (ATEN.clamp.default, (-600.0, -500.0)),
}


@pytest.mark.parametrize("name", CLAMPS)
@pytest.mark.parametrize(("zero_point", "bits"), [(0, 8), (100, 8), (5, 4), (0, 2)])
def test_limits_of_codes_do_what_a_clamp_did(
    name: str, zero_point: int, bits: int, values: Tensor
) -> None:
    operator, bounds = CLAMPS[name]

    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        clamped = graph.call_function(operator, (x, *bounds))
        return quantized(graph, clamped, 0.05, zero_point, bits)

    graph = graph_of(build)
    expected = graph(values)
    simplify_quantizers(graph)
    assert operators(graph) == {"fake_quantize": 1}
    assert torch.equal(graph(values), expected)


def test_a_clamp_that_others_read_stays(values: Tensor) -> None:
    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        clamped = graph.call_function(ATEN.relu.default, (x,))
        return graph.call_function(ATEN.add.Tensor, (quantized(graph, clamped, 0.05), clamped))

    graph = graph_of(build)
    expected = graph(values)
    absorb_clamps(graph)
    graph.recompile()
    assert operators(graph)["relu"] == 1
    assert torch.equal(graph(values), expected)


def test_padding_comes_after_the_quantizer() -> None:
    images = torch.randn(2, 3, 5, 5)

    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        padded = graph.call_function(ATEN.pad.default, (x, [0, 1, 0, 1], "constant", 0.0))
        return quantized(graph, padded, 0.02, 128)

    graph = graph_of(build)
    expected = graph(images)
    quantize_before_padding(graph)
    graph.recompile()
    pad = next(node for node in graph.graph.nodes if is_call(node, ATEN.pad.default))
    assert is_call(pad.args[0], FAKE_QUANTIZE)
    assert torch.equal(graph(images), expected)


@pytest.mark.parametrize("value", [0.5, -1.0])
def test_padding_with_another_value_stays(value: float) -> None:
    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        padded = graph.call_function(ATEN.pad.default, (x, [0, 1, 0, 1], "constant", value))
        return quantized(graph, padded, 0.02, 128)

    graph = graph_of(build)
    quantize_before_padding(graph)
    pad = next(node for node in graph.graph.nodes if is_call(node, ATEN.pad.default))
    assert pad.args[0].op == "placeholder"


def test_padding_stays_where_zero_is_no_code_in_use() -> None:
    images = torch.randn(2, 3, 5, 5)

    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        padded = graph.call_function(ATEN.pad.default, (x, [0, 1, 0, 1], "constant", 0.0))
        # A clamp to positive numbers was absorbed: zeros become the lowest of them.
        return graph.call_function(FAKE_QUANTIZE, (padded, 0.02, 100, 120, 255, 8, "layer"))

    graph = graph_of(build)
    expected = graph(images)
    quantize_before_padding(graph)
    graph.recompile()
    assert torch.equal(graph(images), expected)
    assert expected.min() > 0


def test_equal_grids_of_one_value_are_one_quantizer(values: Tensor) -> None:
    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        same = quantized(graph, x, 0.05), quantized(graph, x, 0.05), quantized(graph, x, 0.06)
        return graph.call_function(ATEN.cat.default, (list(same),))

    graph = graph_of(build)
    expected = graph(values)
    share_quantizers(graph)
    graph.recompile()
    assert operators(graph)["fake_quantize"] == 2
    assert torch.equal(graph(values), expected)


def test_values_on_a_grid_are_not_quantized_again() -> None:
    images = torch.randn(2, 3, 6, 6)

    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        first = quantized(graph, x, 0.05, 30)
        pooled = graph.call_function(ATEN.max_pool2d.default, (first, [2, 2]))
        return quantized(graph, pooled, 0.05, 30)

    graph = graph_of(build)
    expected = graph(images)
    drop_repeated_quantizers(graph)
    graph.recompile()
    assert operators(graph) == {"fake_quantize": 1, "max_pool2d": 1}
    assert torch.equal(graph(images), expected)
    quantize_behind_pools(graph)
    graph.recompile()
    assert operators(graph) == {"fake_quantize": 2, "max_pool2d": 1}
    assert torch.equal(graph(images), expected)


def test_a_narrower_grid_quantizes_again(values: Tensor) -> None:
    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        first = quantized(graph, x, 0.05, 30)
        return graph.call_function(FAKE_QUANTIZE, (first, 0.05, 30, 30, 255, 8, "clamped"))

    graph = graph_of(build)
    expected = graph(values)
    drop_repeated_quantizers(graph)
    graph.recompile()
    assert torch.equal(graph(values), expected)
    assert [grid_of(node).low for node in graph.graph.nodes if is_call(node, FAKE_QUANTIZE)] == [
        0,
        30,
    ]

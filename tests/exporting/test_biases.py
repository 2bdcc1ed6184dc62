from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx

from anyprec.exporting.biases import LARGEST_BIAS, RaisedScale, quantize_biases
from anyprec.exporting.graphs import ATEN, is_call
from anyprec.exporting.operators import DEQUANTIZE
from tests.exporting.networks import channel_codes, graph_of, quantized, weight

INPUT_SCALE = 0.0625


def convolution(codes: Tensor, scale: Tensor, bias: Tensor, *, bits: int = 8) -> fx.GraphModule:
    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        operands = weight(graph, bits=bits), graph.get_attr("bias")
        source = quantized(graph, x, INPUT_SCALE, 100)
        return graph.call_function(ATEN.conv2d.default, (source, *operands))

    return graph_of(build, codes=codes, scale=scale, bias=bias)


def parts(graph: fx.GraphModule) -> dict[str, tuple[Tensor, Tensor]]:
    """Codes and scale of the weight and of the bias."""
    return {
        node.args[3]: tuple(graph.get_buffer(held.target) for held in node.args[:2])
        for node in graph.graph.nodes
        if is_call(node, DEQUANTIZE)
    }


def test_a_bias_is_an_int32_code_on_the_scale_of_the_accumulator() -> None:
    codes, scale = channel_codes()
    graph = convolution(codes, scale, torch.tensor([1.0, -0.3, 0.0, 7.7]))
    assert quantize_biases(graph) == []
    bias_codes, bias_scale = parts(graph)["layer.bias"]
    assert bias_codes.dtype == torch.int32
    assert torch.equal(bias_scale, scale.flatten() * INPUT_SCALE)
    expected = torch.tensor([1.0, -0.3, 0.0, 7.7], dtype=torch.float64) / bias_scale.double()
    assert torch.equal(bias_codes, expected.round().int())
    assert torch.equal(parts(graph)["layer"][0], codes)


@pytest.mark.parametrize("tiny", [1e-12, -1e-12, 3e-38, 0.0, -0.0])
def test_a_channel_next_to_nothing_gets_a_scale_on_which_its_bias_fits(tiny: float) -> None:
    codes, scale = channel_codes()
    scale[1] = tiny
    bias = torch.tensor([0.5, -123.0, 0.25, 0.0])
    graph = convolution(codes, scale, bias)
    images = torch.randn(2, 3, 8, 8)
    expected = graph(images)
    (raised,) = quantize_biases(graph)
    assert isinstance(raised, RaisedScale)
    assert (raised.layer, raised.channels) == ("layer", 1)
    weights, biases = parts(graph)["layer"], parts(graph)["layer.bias"]
    assert biases[0].abs().max() <= LARGEST_BIAS
    assert (biases[1] != 0).all()
    others = [0, 2, 3]
    assert torch.equal(weights[0][others], codes[others])
    found = graph(images)
    assert torch.allclose(found[:, 1], expected[:, 1], rtol=1e-6, atol=1e-6)
    # Elsewhere by the rounding of the bias, to half a code.
    assert (found - expected).abs().max() <= 0.51 * INPUT_SCALE * scale.max()


@pytest.mark.parametrize(("bits", "finer"), [(2, 64), (4, 16), (7, 2)])
def test_codes_of_few_bits_make_the_bias_as_exact_as_eight(bits: int, finer: int) -> None:
    codes, scale = channel_codes()
    codes = codes // finer
    bias = torch.tensor([1.0, -0.3, 0.0, 7.7])
    graph = convolution(codes, scale, bias, bits=bits)
    assert quantize_biases(graph) == []
    weights, biases = parts(graph)["layer"], parts(graph)["layer.bias"]
    assert torch.equal(weights[0], codes * finer)
    assert torch.equal(weights[0] * weights[1], codes * scale)
    error = (biases[0] * biases[1].double() - bias).abs()
    assert (error <= 0.5001 * INPUT_SCALE * scale.flatten() / finer).all()


def test_a_bias_for_which_finer_codes_are_too_fine_loses_nothing_by_coarser_ones() -> None:
    codes, scale = channel_codes()
    codes = codes // 16
    scale[1] = 1e-6
    # On the scale of the codes themselves it fits, on the finer one of sixteenths it does not.
    bias = torch.tensor([1.0, 0.5 * LARGEST_BIAS * INPUT_SCALE * 1e-6, 0.0, 7.7])
    graph = convolution(codes, scale, bias, bits=4)
    assert quantize_biases(graph) == []
    weights, biases = parts(graph)["layer"], parts(graph)["layer.bias"]
    assert biases[0].abs().max() <= LARGEST_BIAS
    assert torch.equal(weights[0] * weights[1], codes * scale)
    assert torch.equal(weights[0][1], codes[1] * 2)


def test_a_channel_without_scale_and_bias_stays_zero() -> None:
    codes, scale = channel_codes()
    scale[2] = 0
    graph = convolution(codes, scale, torch.tensor([0.5, -1.0, 0.0, 2.0]))
    images = torch.randn(2, 3, 8, 8)
    quantize_biases(graph)
    assert not graph(images)[:, 2].any()


def test_biases_of_layers_with_a_floating_point_input_stay() -> None:
    codes, scale = channel_codes()

    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        return graph.call_function(ATEN.conv2d.default, (x, weight(graph), graph.get_attr("bias")))

    graph = graph_of(build, codes=codes, scale=scale, bias=torch.ones(4))
    assert quantize_biases(graph) == []
    assert "layer.bias" not in parts(graph)

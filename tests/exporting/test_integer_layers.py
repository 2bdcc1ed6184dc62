"""Layers on codes: sums against int64 arithmetic, at the limits of each way to add up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from anyprec.errors import ExportError
from anyprec.exporting.graphs import Grid
from anyprec.exporting.integer_arithmetic import EXACT_FLOAT32
from anyprec.exporting.integer_layers import Dequantize, IntegerPair, IntegerProduct, Quantize
from anyprec.exporting.integer_pools import IntegerGlobalAverage, IntegerWindowAverage

SOURCE = Grid(0.02, 100, 0, 255, 8)
TARGET = Grid(0.5, 30, 5, 250, 8)


def product(operator: str, codes: Tensor, options: tuple[Any, ...] = (), **given: Any) -> Any:
    outputs = given.pop("outputs", len(codes))
    settings: dict[str, Any] = {
        "scale": torch.rand(outputs) * 0.01 + 0.001,
        "bias": torch.randint(-(2**20), 2**20, (outputs,), dtype=torch.int32),
        "source": SOURCE,
        "target": TARGET,
        "weight_bits": 8,
        "axis": 0,
        "layer": "block.conv",
    }
    return IntegerProduct(operator, options, codes=codes, **settings | given)


def random_codes(*shape: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


def images(*shape: int) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8)


def windows_product(codes: Tensor, layer: IntegerProduct, padding: int) -> Tensor:
    """A convolution in int64: every window times every filter."""
    values = F.pad(codes.long() - layer.source.zero_point, [padding] * 4)
    size = layer.codes.shape[-1]
    seen = values.unfold(2, size, 1).unfold(3, size, 1)
    total = torch.einsum("nchwij,ocij->nohw", seen, layer.codes.long())
    return total if layer.bias is None else total + layer.bias.long().reshape(-1, 1, 1)


@pytest.mark.parametrize("channels", [4, 300])
def test_convolutions_add_up_exactly(channels: int) -> None:
    # All weights of one sign and all codes at one end: sums are as large as they can be.
    codes = random_codes(5, channels, 3, 3).abs().clamp(min=100)
    layer = product("conv2d.default", codes, ([1, 1], [1, 1]))
    inputs = torch.stack([images(channels, 6, 6), torch.full((channels, 6, 6), 255)]).byte()
    expected = windows_product(inputs, layer, 1)
    is_large = expected.abs().max() > EXACT_FLOAT32
    assert is_large == (channels == 300) == (len(layer.parts or ()) > 1)
    assert torch.equal(layer.accumulated(inputs).long(), expected)


def test_bias_codes_beyond_float32_are_added_exactly() -> None:
    bias = torch.tensor([2**29 + 1, -(2**29) - 3], dtype=torch.int32)
    layer = product("conv2d.default", random_codes(2, 3, 1, 1), bias=bias)
    inputs = images(2, 3, 4, 4)
    assert torch.equal(layer.accumulated(inputs).long(), windows_product(inputs, layer, 0))


@pytest.mark.parametrize("features", [30, 2000])
def test_linear_layers_add_up_exactly_on_sequences(features: int) -> None:
    codes = random_codes(7, features).abs().clamp(min=90)
    layer = product("linear.default", codes)
    inputs = images(2, 5, features).clamp(min=200)
    expected = (inputs.long() - SOURCE.zero_point) @ codes.long().t() + layer.bias.long()
    assert torch.equal(layer.accumulated(inputs).long(), expected)


def test_groups_and_transposed_convolutions_add_up_exactly() -> None:
    grouped = product("conv2d.default", random_codes(4, 1, 9, 9), ([1, 1], [0, 0], [1, 1], 4))
    inputs = images(1, 4, 12, 12)
    expected = F.conv2d(
        inputs.double() - 100, grouped.codes.double(), grouped.bias.double(), groups=4
    )
    assert torch.equal(grouped.accumulated(inputs).double(), expected)
    weight = torch.full((700, 2, 2, 2), 127, dtype=torch.int8)
    upward = product("conv_transpose2d.input", weight, ([2, 2],), outputs=2, axis=1)
    inputs = torch.full((1, 700, 3, 3), 255, dtype=torch.uint8)
    expected = F.conv_transpose2d(
        inputs.double() - 100, weight.double(), upward.bias.double(), stride=2
    )
    assert expected.max() > EXACT_FLOAT32 / 2
    assert torch.equal(upward.accumulated(inputs).double(), expected)


def test_results_are_rounded_once_from_the_accumulator() -> None:
    layer = product("conv2d.default", random_codes(3, 4, 1, 1), weight_bits=8)
    inputs = images(2, 4, 8, 8)
    accumulated = windows_product(inputs, layer, 0).numpy()
    multiplier = layer.multiplier.numpy()
    expected = (accumulated.astype("float32") * multiplier).round() + 30
    assert torch.equal(layer(inputs), torch.from_numpy(expected.clip(5, 250)).byte())
    numbers = product("conv2d.default", layer.codes, scale=torch.full((3,), 0.25), target=None)
    numbers.bias = layer.bias
    float32 = torch.tensor(accumulated, dtype=torch.float32) * torch.tensor(0.02) * 0.25
    torch.testing.assert_close(numbers(inputs), float32, rtol=3e-7, atol=0)


def test_accumulators_beyond_int32_are_refused() -> None:
    codes = torch.full((1, 120_000), 127, dtype=torch.int8)
    with pytest.raises(ExportError, match=r"layer 'block.conv' can reach 23\d+, .* int32 holds"):
        product("linear.default", codes, bias=None)


def test_quantize_and_dequantize_are_fake_quantization() -> None:
    values = torch.randn(1000) * 4
    grid = Grid(0.037, 90, 40, 200, 8)
    emitted = torch.ops.anyprec.fake_quantize(values, 0.037, 90, 40, 200, 8, "")
    codes = Quantize(grid)(values)
    assert codes.dtype == torch.uint8
    assert (int(codes.min()), int(codes.max())) == (40, 200)
    assert torch.equal(Dequantize(grid)(codes), emitted)


@pytest.mark.parametrize("keepdim", [True, False])
def test_global_averages_keep_the_mean(keepdim: bool) -> None:
    inputs = images(3, 6, 5, 7)
    layer = IntegerGlobalAverage(keepdim=keepdim, source=SOURCE, target=Grid(0.01, 128, 0, 255, 8))
    mean = ((inputs.double() - 100) * 0.02).mean(dim=(2, 3), keepdim=keepdim)
    codes = layer(inputs)
    assert codes.shape == mean.shape
    assert (codes - (mean / 0.01 + 128).clamp(0, 255)).abs().max() <= 0.5 + 1e-4


@pytest.mark.parametrize("ceil_mode", [True, False])
@pytest.mark.parametrize("size", [(7, 8), (9, 5), (6, 6)])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(2, 2, 0), (3, 2, 1), (3, 1, 1), (2, 3, 0)]
)
def test_window_averages_are_those_of_torch(
    ceil_mode: bool,
    size: tuple[int, int],
    kernel: int,
    stride: int,
    padding: int,
) -> None:
    inputs = images(2, 3, *size)
    layer = IntegerWindowAverage(
        kernel=(kernel, kernel),
        stride=(stride, stride),
        padding=(padding, padding),
        ceil_mode=ceil_mode,
        counts_padding=not ceil_mode,
        source=SOURCE,
        target=Grid(0.02, 128, 0, 255, 8),
    )
    values = (inputs.double() - 100) * 0.02
    mean = F.avg_pool2d(
        values, kernel, stride, padding, ceil_mode=ceil_mode, count_include_pad=not ceil_mode
    )
    codes = layer(inputs)
    assert codes.shape == mean.shape
    assert (codes - (mean / 0.02 + 128).clamp(0, 255)).abs().max() <= 0.5 + 1e-4


def test_pairs_broadcast() -> None:
    pair = IntegerPair("add", first=SOURCE, second=SOURCE, target=Grid(0.04, 100, 0, 255, 8))
    first, second = images(2, 3, 4, 4), images(2, 3, 1, 1)
    exact = (first.double() + second.double() - 200) / 2 + 100
    assert (pair(first, second) - exact).abs().max() <= 0.5

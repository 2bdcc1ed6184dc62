"""Grouped transposed convolutions: a step size for each output channel, as for any convolution.

The oracle is the ordinary layout: the same weights with a row for each output channel.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import anyprec
from anyprec.nn.channels import GroupedAxis, from_rows, rows_of_channels, sum_of_channels
from anyprec.nn.functional import dequantize, fake_quantize, fake_quantize_with, integer_codes
from anyprec.nn.moments import match_moments, moments
from anyprec.training.losses import quantization_error
from anyprec.training.scheduler import unstable_fractions

SHAPES = [((6, 2, 3), 3), ((4, 1, 3, 3), 4), ((8, 3, 2, 2), 2), ((4, 5, 2, 1, 2), 2)]


def rows_by_hand(weight: Tensor, groups: int) -> Tensor:
    """One output channel after the other, in plain loops."""
    inputs = weight.shape[0] // groups
    return torch.stack(
        [
            weight[group * inputs : (group + 1) * inputs, output].flatten()
            for group in range(groups)
            for output in range(weight.shape[1])
        ]
    )


@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_a_row_is_what_makes_one_output_channel(shape: tuple[int, ...], groups: int) -> None:
    weight, axis = torch.randn(shape), GroupedAxis(groups)
    rows = rows_of_channels(weight, axis)
    assert torch.equal(rows, rows_by_hand(weight, groups))
    assert torch.equal(from_rows(rows, shape, axis), weight)
    assert torch.equal(sum_of_channels(weight, axis), rows.sum(dim=1))


@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_values_and_gradients_are_those_of_the_rows(shape: tuple[int, ...], groups: int) -> None:
    axis, grid = GroupedAxis(groups), {"qmin": -4, "qmax": 3}
    weight = torch.randn(shape, requires_grad=True)
    step = torch.rand(groups * shape[1]).add_(0.1).requires_grad_()
    upstream = torch.randn(shape)
    rows = rows_by_hand(weight, groups)
    expected = fake_quantize(rows, step, axis=0, **grid)
    expected_gradients = torch.autograd.grad(
        expected, (weight, step), rows_by_hand(upstream, groups)
    )
    limits = {name: torch.tensor([float(value)]) for name, value in grid.items()}
    one = torch.tensor([1.0])
    for quantized in (
        fake_quantize(weight, step, axis=axis, **grid),
        fake_quantize_with(weight, step, axis=axis, gradient_scale=one, **limits),
    ):
        assert torch.equal(rows_by_hand(quantized, groups), expected)
        gradients = torch.autograd.grad(quantized, (weight, step), upstream)
        assert torch.equal(gradients[0], expected_gradients[0])
        torch.testing.assert_close(gradients[1], expected_gradients[1])  # sums in another order
    codes = integer_codes(weight, step, axis=axis, **grid)
    again = dequantize(codes, step, axis=axis, dtype=torch.float32)
    assert torch.equal(rows_by_hand(again, groups), expected)


@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_moments_and_the_terms_of_training_are_those_of_the_rows(
    shape: tuple[int, ...], groups: int
) -> None:
    weight, axis = torch.randn(shape), GroupedAxis(groups)
    channels = groups * shape[1]
    grouped = anyprec.WeightQuantizer((2, 4), channels=channels, axis=axis)
    plain = anyprec.WeightQuantizer((2, 4), channels=channels)
    rows = rows_by_hand(weight, groups)
    grouped.initialize(weight)
    plain.initialize(rows)
    torch.testing.assert_close(grouped.step, plain.step)
    for ours, expected in zip(moments(weight, axis=axis), moments(rows, axis=0), strict=True):
        torch.testing.assert_close(ours, expected)
    matched = match_moments(grouped(weight, 0), weight, axis=axis)
    expected = match_moments(plain(rows, 0), rows, axis=0)
    torch.testing.assert_close(rows_by_hand(matched, groups), expected)
    assert unstable_fractions(weight, grouped, margin=0.2) == unstable_fractions(
        rows, plain, margin=0.2
    )
    grid = {"qmin": -2, "qmax": 1}
    torch.testing.assert_close(
        quantization_error(weight, grouped.step[0], axis=axis, **grid),
        quantization_error(rows, plain.step[0], axis=0, **grid),
    )


class FunctionalUpsampling(nn.Module):
    """A bare parameter in a grouped transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(8, 2, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv_transpose2d(x, self.kernel, stride=2, groups=4)


UPSAMPLINGS = [
    lambda: nn.ConvTranspose2d(8, 8, 2, stride=2, groups=8, bias=False),
    lambda: nn.ConvTranspose2d(8, 8, 2, stride=2, groups=2, bias=False),
    lambda: nn.ConvTranspose2d(8, 12, 2, stride=2, groups=4),
    lambda: nn.ConvTranspose2d(8, 4, 2, stride=2),
    FunctionalUpsampling,
]


def make_net(upsampling: Any, *, norm: str = "shared-affine") -> tuple[nn.Module, Tensor, int]:
    """A network with uneven output channels; the weight as its layer has it, and the groups."""
    up = upsampling()
    weight = up.kernel if isinstance(up, FunctionalUpsampling) else up.weight
    groups = 4 if isinstance(up, FunctionalUpsampling) else up.groups
    with torch.no_grad():
        outputs = groups * weight.shape[1]
        scale = torch.logspace(-2, 0, outputs).reshape(groups, 1, -1, 1, 1)
        weight.copy_((weight.reshape(groups, -1, *weight.shape[1:]) * scale).reshape(weight.shape))
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), up, nn.BatchNorm2d(outputs), nn.ReLU(),
        nn.Conv2d(outputs, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    ).eval()  # fmt: skip
    images = torch.randn(4, 3, 8, 8)
    model = anyprec.convert(net, bits=(2, 4, 8), norm=norm, example_input=images[:1])
    anyprec.calibrate(model, [images])
    return model, weight, groups


@pytest.mark.parametrize("upsampling", UPSAMPLINGS)
def test_every_output_channel_has_a_small_error_however_uneven_they_are(upsampling: Any) -> None:
    model, weight, groups = make_net(upsampling)
    path = next(path for path in model.quantized_layers if path.startswith("2"))
    quantizer = model.quantized_layers[path].weight_quantizer
    rows = rows_by_hand(weight.detach(), groups)
    assert quantizer.step.shape[1] == len(rows)
    quantized = rows_by_hand(quantizer(weight, quantizer.candidates.index(4)).detach(), groups)
    relative = (quantized - rows).norm(dim=1) / rows.norm(dim=1)
    assert float(relative.max()) < 0.13


@pytest.mark.parametrize("upsampling", UPSAMPLINGS[:4])
def test_a_shared_norm_gets_the_latent_moments_of_every_output_channel(upsampling: Any) -> None:
    model, weight, groups = make_net(upsampling, norm="shared")
    layer = model.quantized_layers["2"]
    model.set_bits(4)
    quantized = rows_by_hand(layer.quantized_weight(weight).detach(), groups)
    rows = rows_by_hand(weight.detach(), groups)
    torch.testing.assert_close(quantized.mean(dim=1), rows.mean(dim=1))
    torch.testing.assert_close(quantized.std(dim=1), rows.std(dim=1))

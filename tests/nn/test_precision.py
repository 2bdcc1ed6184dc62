"""Half precision and tiny weights: step sizes keep 32 bits, and no weight is too small."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import anyprec
from anyprec.calibration.least_squares import input_grid, weight_steps
from anyprec.kernels import kernels_off
from anyprec.nn.functional import (
    STEP_FLOOR,
    dequantize,
    fake_quantize,
    fake_quantize_with,
    integer_codes,
)
from anyprec.nn.moments import match_moments, moments
from anyprec.nn.packed import PackedOperand
from anyprec.nn.powers import power_of_two
from anyprec.nn.quantizers import InputQuantizer, WeightQuantizer

HALVES = [torch.float16, torch.bfloat16]


def quantizers() -> list[nn.Module]:
    weights = WeightQuantizer((2, 8), channels=3)
    weights.initialize(torch.randn(3, 20) * torch.tensor([[1.0], [1e-9], [1e-30]]))
    inputs = InputQuantizer((2, 8), nonnegative=False)
    inputs.set_grid(torch.tensor([0.1, 1e-9]), torch.tensor([2, 128]))
    return [weights, inputs]


@pytest.mark.parametrize(
    "move",
    [
        nn.Module.half,
        nn.Module.bfloat16,
        lambda module: module.to(torch.float16),
        lambda module: module.to("cpu", torch.bfloat16),
        lambda module: module.double().half(),
        lambda module: copy.deepcopy(module.half()),
    ],
)
def test_step_sizes_keep_their_values_in_a_network_of_half_precision(move: Any) -> None:
    for quantizer in quantizers():
        before = quantizer.step.detach().clone()
        moved = move(nn.ModuleList([quantizer, nn.Linear(2, 2)]))
        assert moved[1].weight.dtype in (torch.float16, torch.bfloat16)
        assert moved[0].step.dtype == torch.float32
        assert torch.equal(moved[0].step, before)
        assert moved[0].step.requires_grad


def test_step_sizes_follow_to_double_and_to_other_devices() -> None:
    for quantizer in quantizers():
        assert quantizer.double().step.dtype == torch.float64
        assert quantizer.to("meta", torch.float16).step.is_meta
        assert quantizer.to_empty(device="cpu").step.dtype == torch.float32


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_a_state_of_half_precision_is_loaded_into_step_sizes_of_32_bits(
    dtype: torch.dtype, assign: bool
) -> None:
    for quantizer in quantizers():
        state = {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in quantizer.state_dict().items()
        }
        quantizer.load_state_dict(state, assign=assign)
        assert quantizer.step.dtype == torch.float32
        assert torch.equal(quantizer.step, state["step"].float())


@pytest.mark.parametrize("dtype", HALVES)
def test_step_sizes_made_under_a_default_of_half_precision_have_32_bits(dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    try:
        for quantizer in (
            WeightQuantizer((4,), channels=2),
            InputQuantizer((4,), nonnegative=True),
        ):
            assert quantizer.step.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("size", [1.0, 1e-5, 1e-7, 0.0])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("by", ["kernel", "torch"])
def test_16_bits_are_quantized_as_float32_and_rounded_once(
    axis: int | None, size: float, dtype: torch.dtype, by: str
) -> None:
    values = (torch.randn(4, 300) * size).to(dtype)
    step = torch.full((4 if axis == 0 else 1,), max(size, 1e-30) / 50)
    grid = {"qmin": -128, "qmax": 127}
    expected = fake_quantize(values.float(), step, axis=axis, **grid).to(dtype)
    limits = {name: torch.tensor([float(value)]) for name, value in grid.items()}
    one = torch.tensor([1.0])
    with kernels_off() if by == "torch" else nullcontext():
        assert torch.equal(fake_quantize(values, step, axis=axis, **grid), expected)
    assert torch.equal(
        fake_quantize_with(values, step, axis=axis, gradient_scale=one, **limits), expected
    )
    codes = integer_codes(values, step, axis=axis, **grid)
    assert torch.equal(codes, integer_codes(values.float(), step, axis=axis, **grid))
    assert torch.equal(dequantize(codes, step, axis=axis, dtype=dtype), expected)


@pytest.mark.parametrize("narrow", HALVES)
@pytest.mark.parametrize("by", ["kernel", "torch"])
def test_gradients_in_16_bits_are_those_of_float32(narrow: torch.dtype, by: str) -> None:
    values, step = torch.randn(64, 50).to(narrow), torch.tensor([0.07], requires_grad=True)
    upstream = (torch.randn(64, 50) * 100).to(narrow)  # their sums do not fit into float16
    gradients = []
    for dtype in (narrow, torch.float32):
        input_ = values.to(dtype).requires_grad_()
        with kernels_off() if by == "torch" else nullcontext():
            quantized = fake_quantize(input_, step, qmin=-8, qmax=7)
            gradients.append(torch.autograd.grad(quantized, (input_, step), upstream.to(dtype)))
    assert torch.equal(gradients[0][0].float(), gradients[1][0])
    assert torch.equal(gradients[0][1], gradients[1][1])


def test_a_code_beyond_the_largest_float16_is_the_largest() -> None:
    largest = torch.tensor([65504.0, -65504.0]).half()
    for step in (torch.tensor([8.7e3]), torch.tensor(8.7e3)):
        quantized = fake_quantize(largest, step, qmin=-8, qmax=7)
        assert torch.isfinite(quantized).all()
    per_channel = fake_quantize(largest, torch.full((2,), 8.7e3), qmin=-8, qmax=8, axis=0)
    assert torch.isfinite(per_channel).all()


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_a_step_of_zero_makes_nothing_that_is_not_finite(dtype: torch.dtype) -> None:
    for axis, shape in ((None, ()), (0, (3,))):
        step = torch.zeros(shape, dtype=dtype, requires_grad=True)
        values = torch.tensor([[0.0, 1e-7, 1.0]] * 3, dtype=dtype, requires_grad=True)
        quantized = fake_quantize(values, step, qmin=-2, qmax=1, axis=axis)
        quantized.sum().backward()
        for tensor in (quantized, values.grad, step.grad):
            assert torch.isfinite(tensor).all()


# --- Networks


def tiny_net(size: float) -> nn.Module:
    """A channel whose weights are of this size, which the norm behind it makes as large as any."""
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6, eps=0.0), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 4),
    )  # fmt: skip
    with torch.no_grad():
        net[2].weight[1] *= size
        net[3].running_var.fill_(0.1)
        net[3].running_var[1] *= size * size
    return net.eval()


@pytest.mark.parametrize("norm", ["shared-affine", "per-pair"])
@pytest.mark.parametrize("exponent", [-8, -17])
def test_weights_that_a_norm_enlarges_are_quantized_as_well_as_others(
    norm: str, exponent: int
) -> None:
    """By a power of two: then all numbers are the same, but for their exponents."""
    images = torch.randn(8, 3, 8, 8)
    outputs = []
    for size in (1.0, 4.0**exponent):
        model = anyprec.convert(tiny_net(size), bits=(2, 4, 8), norm=norm)
        anyprec.calibrate(model, [images])
        with torch.no_grad():
            outputs.append([model.set_bits(bits) or model(images) for bits in (8, 4)])
    for ordinary, tiny in zip(*outputs, strict=True):
        torch.testing.assert_close(tiny, ordinary, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("exponent", [-60, -100])
def test_step_sizes_of_tiny_weights_are_those_of_larger_ones_times_the_size(exponent: int) -> None:
    size = 2.0**exponent
    weight = torch.randn(4, 50)
    quantizer = WeightQuantizer((2, 4, 8), channels=4)
    assert torch.equal(
        weight_steps(weight * size, quantizer), weight_steps(weight, quantizer) * size
    )
    inputs = InputQuantizer((2, 4, 8), nonnegative=False)
    sample = nn.functional.silu(torch.randn(500))
    steps, zeros = input_grid(sample, inputs)
    tiny_steps, tiny_zeros = input_grid(sample * size, inputs)
    assert torch.equal(tiny_steps, steps * size)
    assert torch.equal(tiny_zeros, zeros)


@pytest.mark.parametrize("exponent", [-70, -100, 80])
def test_moments_of_tiny_and_huge_weights_are_those_of_others_times_the_size(exponent: int) -> None:
    size = 2.0**exponent
    weight = torch.randn(3, 40) + 0.2
    for ours, expected in zip(moments(weight * size, axis=0), moments(weight, axis=0), strict=True):
        assert torch.equal(ours, expected * size)
    quantized = (weight * 2).round() / 2
    matched = match_moments(quantized * size, weight * size, axis=0)
    torch.testing.assert_close(matched / size, match_moments(quantized, weight, axis=0))


def test_a_power_of_two_is_at_most_a_factor_of_two_below() -> None:
    values = torch.tensor([1.0, 1.999, 2.0, 3e-20, 7e20])
    powers = power_of_two(values)
    ratio = values / powers
    assert ((ratio >= 1) & (ratio < 2)).all()
    assert torch.equal(torch.frexp(powers).mantissa, torch.full((5,), 0.5))
    assert torch.isfinite(1 / power_of_two(torch.tensor([0.0, STEP_FLOOR, 3e38]))).all()


def test_one_code_everywhere_is_not_stretched_though_its_mean_is_rounded() -> None:
    codes = torch.linspace(0.1, 0.9, 50)[:, None]
    quantized = codes.expand(-1, 63).contiguous()
    assert (quantized.mean(dim=1, keepdim=True) != codes).any()
    weight = quantized + 1e-3 * torch.randn(50, 63)
    matched = match_moments(quantized, weight, axis=0)
    means = weight.mean(dim=1, keepdim=True).expand_as(weight)
    torch.testing.assert_close(matched, means, rtol=1e-6, atol=0)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("norm", ["shared-affine", "shared"])
@pytest.mark.parametrize("dtype", HALVES)
def test_a_network_in_half_precision_says_what_it_says_in_float32(
    dtype: torch.dtype, norm: str, packed: bool, tmp_path: Any
) -> None:
    net = tiny_net(1.0)
    with torch.no_grad():
        net[2].weight[1], net[2].weight[2] = 0.0, 1e-8
        net[3].eps = 1e-5
    images = torch.randn(8, 3, 8, 8)
    model = anyprec.convert(copy.deepcopy(net), bits=(2, 4, 8), norm=norm)
    anyprec.calibrate(model, [images])
    half = copy.deepcopy(model)
    if packed:
        anyprec.save(model, tmp_path / "net", packed=True)
        half = anyprec.load(tmp_path / "net", net)
    half.to(dtype)
    for module in half.modules():
        if isinstance(module, PackedOperand) and norm == "shared" and module.mean is not None:
            assert module.mean.dtype == module.spread.dtype == torch.float32
    for bits in (8, 4, (8, 4)):
        model.set_bits(bits)
        half.set_bits(bits)
        with torch.no_grad():
            expected, output = model(images), half(images.to(dtype))
        assert output.dtype == dtype
        assert float((output.float() - expected).norm() / expected.norm()) < 0.05


@pytest.mark.parametrize("dtype", HALVES)
def test_training_in_half_precision_gives_finite_gradients_at_every_bit_width(
    dtype: torch.dtype,
) -> None:
    net = tiny_net(1.0)
    with torch.no_grad():
        net[2].weight[1], net[2].weight[2] = 0.0, 1e-8
        net[3].eps = 1e-5
    model = anyprec.convert(net, bits=(2, 4, 8), first_last_bits=None)
    images = torch.randn(8, 3, 8, 8)
    anyprec.calibrate(model, [images])
    model.to(dtype).train()
    for bits in (2, 4, 8):
        model.set_bits(bits)
        model(images.to(dtype)).float().square().sum().backward()
    gradients: list[Tensor] = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    for gradient in gradients:
        assert torch.isfinite(gradient).all()

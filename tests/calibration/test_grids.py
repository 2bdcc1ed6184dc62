"""Calibration on the grids that are allowed: zero points, and the best power of two."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import anyprec
from anyprec.calibration.least_squares import input_grid
from anyprec.nn.grids import GridRule
from anyprec.nn.quantizers import InputQuantizer
from tests.calibration.test_signs import Shifting

_GENERATOR = torch.Generator().manual_seed(5)
_NORMAL = torch.randn(3000, generator=_GENERATOR)
SAMPLES = {
    "positive": torch.rand(3000, generator=_GENERATOR) * 3,
    "lopsided": nn.functional.silu(1.5 * _NORMAL),
    "heavy": _NORMAL**5,
    "tiny": 1e-6 * _NORMAL,
    "constant": torch.full((50,), 0.75),
}


def squared_error(sample: np.ndarray, step: float, low: int, high: int) -> float:
    codes = np.clip(np.round(sample / step), low, high)
    return float(((codes * step - sample) ** 2).sum())


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", SAMPLES)
def test_the_power_of_two_is_the_best_of_all(kind: str, bits: int) -> None:
    sample = SAMPLES[kind]
    nonnegative = kind in ("positive", "constant")
    rule = GridRule("symmetric", "power-of-two")
    quantizer = InputQuantizer((bits,), nonnegative=nonnegative, rule=rule)
    steps, zeros = input_grid(sample, quantizer)
    zero = 0 if nonnegative else 2 ** (bits - 1)
    assert zeros.tolist() == [zero]
    numbers = sample.double().numpy()
    errors = {}
    for exponent in range(-40, 12):
        errors[2.0**exponent] = squared_error(numbers, 2.0**exponent, -zero, 2**bits - 1 - zero)
    chosen = float(steps[0])
    assert errors[chosen] <= min(errors.values()) * (1 + 1e-4)


@pytest.mark.parametrize("grid", ["symmetric", "signed"])
def test_step_sizes_are_sought_on_the_allowed_grid_alone(grid: str) -> None:
    sample = SAMPLES["lopsided"]
    quantizer = InputQuantizer((4, 8), nonnegative=False, rule=GridRule(grid))
    steps, zeros = input_grid(sample, quantizer)
    assert zeros.tolist() == [8, 128]
    numbers = sample.double().numpy()
    best = min(squared_error(numbers, k / 2000, -8, 7) for k in range(20, 4000, 2))
    # The search is local, and ends within a percent or so.
    assert squared_error(numbers, float(steps[0]), -8, 7) <= 1.02 * best


def test_an_input_that_is_never_negative_is_signed_where_that_is_demanded() -> None:
    quantizer = InputQuantizer((2, 8), nonnegative=True, rule=GridRule("signed"))
    steps, zeros = input_grid(SAMPLES["positive"], quantizer)
    assert zeros.tolist() == [2, 128]
    # The upper half of the codes covers the range up to 3.
    assert float(steps[1]) == pytest.approx(3 / 127, rel=0.02)


def test_an_input_that_is_always_zero_gets_a_power_of_two() -> None:
    quantizer = InputQuantizer((2, 8), nonnegative=True, rule=GridRule(scale="power-of-two"))
    steps, _ = input_grid(torch.zeros(10), quantizer)
    assert np.log2(steps.numpy()).tolist() == [round(np.log2(1 / 3)), -8.0]


@pytest.mark.parametrize("grid", ["affine", "symmetric", "signed"])
def test_a_calibrated_network_has_the_grid_that_was_asked_for(
    float_net: nn.Module, images: Tensor, grid: str
) -> None:
    expected = float_net(images)
    model = anyprec.convert(
        float_net,
        bits=(2, 8),
        activation_grid=grid,
        activation_scale="power-of-two",
        example_input=images,
    )
    anyprec.calibrate(model, [images])
    kinds = {path: layer.input_quantizer.kind for path, layer in model.quantized_layers.items()}
    # The joint norm's SiLU is lopsided, a ReLU feeds the depthwise convolution.
    assert kinds["depthwise"] == {"signed": "signed"}.get(grid, "unsigned")
    assert kinds["head"] == {"affine": "affine"}.get(grid, "signed")
    for layer in model.quantized_layers.values():
        logarithms = torch.log2(layer.input_quantizer.step.detach())
        assert torch.equal(logarithms, logarithms.round())
    assert torch.equal(model(images), expected)
    with model.using_bits(8):
        assert (model(images) - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_a_refuted_sign_moves_the_symmetric_zero_point_to_the_middle() -> None:
    images = torch.randn(16, 6)
    model = anyprec.convert(
        Shifting().eval(), bits=(4, 8), activation_grid="symmetric", example_input=images
    )
    assert model.b.input_quantizer.zero_points == (0, 0)
    model.shift = 0.5
    with pytest.warns(anyprec.NegativeInputWarning, match="layer 'b'"):
        anyprec.calibrate(model, [images])
    assert model.b.input_quantizer.zero_points == (8, 128)

"""Grids of inputs under a rule: zero points, powers of two, and what keeps to the rule."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from anyprec.errors import CalibrationError
from anyprec.nn.functional import STEP_FLOOR, effective_step
from anyprec.nn.grids import ACTIVATION_GRIDS, GridRule
from anyprec.nn.powers import power_of_two_step
from anyprec.nn.quantizers import InputQuantizer

POWERS = GridRule(scale="power-of-two")


@pytest.mark.parametrize(
    ("grid", "nonnegative", "expected"),
    [
        ("affine", True, [(0, 3), (0, 15)]),
        ("affine", False, [(-2, 1), (-8, 7)]),
        ("symmetric", True, [(0, 3), (0, 15)]),
        ("symmetric", False, [(-2, 1), (-8, 7)]),
        ("signed", True, [(-2, 1), (-8, 7)]),
        ("signed", False, [(-2, 1), (-8, 7)]),
    ],
)
def test_codes_before_calibration(
    grid: str, nonnegative: bool, expected: list[tuple[int, int]]
) -> None:
    quantizer = InputQuantizer((2, 4), nonnegative=nonnegative, rule=GridRule(grid))
    assert [quantizer.limits(index) for index in range(2)] == expected


@pytest.mark.parametrize("grid", ACTIVATION_GRIDS)
def test_a_rule_permits_the_zero_points_of_its_grid_alone(grid: str) -> None:
    permitted = [zero for zero in range(-1, 17) if GridRule(grid).permits(zero, 4)]
    assert permitted == {"affine": list(range(16)), "symmetric": [0, 8], "signed": [8]}[grid]


def test_a_zero_point_that_the_rule_does_not_allow_is_refused_and_changes_nothing() -> None:
    quantizer = InputQuantizer((2, 4), nonnegative=False, rule=GridRule("symmetric"))
    quantizer.set_grid(torch.tensor([0.5, 0.1]), torch.tensor([2, 0]))
    with pytest.raises(
        CalibrationError,
        match=r"zero point 3 at 4 bits .* activation_grid='symmetric', which allows 0 or 8",
    ):
        quantizer.set_grid(torch.tensor([1.0, 1.0]), torch.tensor([2, 3]))
    assert quantizer.zero_points == (2, 0)
    assert quantizer.step.tolist() == pytest.approx([0.5, 0.1])


def test_a_state_of_another_grid_does_not_load() -> None:
    affine = InputQuantizer((2, 4), nonnegative=False)
    affine.set_grid(torch.tensor([0.5, 0.1]), torch.tensor([2, 3]))
    signed = InputQuantizer((2, 4), nonnegative=False, rule=GridRule("signed"))
    before = copy.deepcopy(signed.state_dict())
    with pytest.raises(RuntimeError, match="zero point 3 at 4 bits does not fit activation_grid"):
        signed.load_state_dict(affine.state_dict())
    torch.testing.assert_close(signed.state_dict(), before, equal_nan=True)


def rounded(value: float) -> float:
    """The oracle: of the two powers of two around a number, the nearer in logarithm."""
    low = 2.0 ** math.floor(math.log2(value))
    return low if value * value < low * 2 * low else 2 * low


@given(st.floats(2.0**-119, 2.0**120, width=32))
def test_steps_become_the_nearest_power_of_two_in_logarithm(value: float) -> None:
    expected = rounded(value)
    nearness = abs(value / (math.sqrt(2) * 2.0 ** math.floor(math.log2(value))) - 1)
    if nearness > 1e-6:  # between two powers float32 may decide either way
        assert float(power_of_two_step(torch.tensor(value))) == expected
        assert float(power_of_two_step(torch.tensor(-value))) == expected


@pytest.mark.parametrize("exponent", range(-119, 127, 7))
def test_a_power_of_two_stays_as_it_is(exponent: int) -> None:
    step = torch.tensor([2.0**exponent])
    assert torch.equal(power_of_two_step(step), step)


def test_extreme_steps_give_usable_powers_and_nan_stays_nan() -> None:
    steps = torch.tensor([0.0, 1e-44, 3e38, math.nan])
    powers = power_of_two_step(steps)
    assert powers[:2].tolist() == [STEP_FLOOR] * 2
    assert float(powers[2]) == 2.0**127
    assert torch.isnan(powers[3])


def test_the_gradient_of_the_rounding_is_passed_straight_through() -> None:
    """The oracle differentiates the elementary chain, with the rounding as a constant offset."""
    steps = torch.tensor([0.11, 0.8, -3.1, 20.0], dtype=torch.float64, requires_grad=True)
    logarithms = torch.log2(steps.abs())
    offset = (torch.round(logarithms) - logarithms).detach()
    weights = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)
    (expected,) = torch.autograd.grad((weights * torch.exp2(logarithms + offset)).sum(), steps)
    (found,) = torch.autograd.grad((weights * power_of_two_step(steps)).sum(), steps)
    torch.testing.assert_close(found, expected)


def calibrated(step: float) -> InputQuantizer:
    quantizer = InputQuantizer((2, 4), nonnegative=False, rule=POWERS)
    quantizer.set_grid(torch.tensor([1.0, step]), torch.tensor([2, 5]))
    return quantizer


def chain(values: Tensor, step: float) -> Tensor:
    """Fake quantization at 4 bits with the zero point 5, in elementary operations."""
    return torch.clamp(torch.round(values / step), -5, 10) * step


@pytest.mark.parametrize("compiled", [False, True])
def test_inputs_are_quantized_with_the_power_of_two(compiled: bool) -> None:
    quantizer = calibrated(0.2)
    values = torch.randn(4, 100)
    index = torch.tensor([1]) if compiled else 1
    run = quantizer.forward_selected if compiled else quantizer
    result = run(values, index)
    assert torch.equal(result, chain(values, 0.25))
    assert not torch.equal(result, chain(values, 0.2))
    assert float(quantizer.step_in_use(1)) == 0.25
    (gradient,) = torch.autograd.grad(result.square().sum(), quantizer.step)
    plain = InputQuantizer((2, 4), nonnegative=False)
    plain.set_grid(torch.tensor([1.0, 0.25]), torch.tensor([2, 5]))
    (at_power,) = torch.autograd.grad(plain(values, 1).square().sum(), plain.step)
    torch.testing.assert_close(gradient[1], at_power[1] * 0.25 / 0.2)


def test_without_a_rule_the_step_in_use_is_the_effective_one() -> None:
    quantizer = InputQuantizer((2, 4), nonnegative=False)
    quantizer.set_grid(torch.tensor([0.7, -0.2]), torch.tensor([2, 8]))
    assert torch.equal(quantizer.step_in_use(1), effective_step(quantizer.step[1]))
    assert not quantizer.step_in_use(1).requires_grad

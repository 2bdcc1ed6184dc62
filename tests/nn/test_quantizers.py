"""Step sizes and grids of the quantizers."""

from __future__ import annotations

import math

import pytest
import torch

from anyprec.nn.functional import fake_quantize
from anyprec.nn.quantizers import InputQuantizer, WeightQuantizer, usable_steps


def test_weight_grids_are_signed_and_one_lower_at_the_bottom() -> None:
    quantizer = WeightQuantizer((2, 3, 8), channels=None)
    assert [quantizer.limits(index) for index in range(3)] == [(-2, 1), (-4, 3), (-128, 127)]


def test_weight_steps_start_as_in_lsq() -> None:
    quantizer = WeightQuantizer((2, 4), channels=3)
    weight = torch.randn(3, 5, 2)
    quantizer.initialize(weight)
    for index, qmax in enumerate((1, 7)):
        expected = torch.stack([2 * row.abs().mean() / math.sqrt(qmax) for row in weight])
        torch.testing.assert_close(quantizer.step[index], expected)


def test_a_dead_channel_gets_the_mean_step_of_the_living_and_a_dead_layer_a_finite_one() -> None:
    quantizer = WeightQuantizer((4,), channels=3)
    weight = torch.randn(3, 5)
    weight[1] = 0
    quantizer.initialize(weight)
    torch.testing.assert_close(quantizer.step[0, 1], quantizer.step[0, [0, 2]].mean())
    quantizer.initialize(torch.zeros(3, 5))
    assert (quantizer.step > 0).all()


@pytest.mark.parametrize("channels", [None, 3])
def test_a_dead_layer_gets_the_deviation_of_a_he_initialised_weight(channels: int | None) -> None:
    quantizer = WeightQuantizer((2, 4), channels=channels)
    weight = torch.zeros(3, 4, 5, 5)
    quantizer.initialize(weight)
    deviation = math.sqrt(2 / (4 * 5 * 5))  # He et al. 2015: fan-in of a 5x5 kernel over 4 channels
    torch.testing.assert_close(quantizer.step, torch.full((2, channels or 1), deviation))
    twice = usable_steps(torch.zeros(channels or 1), torch.zeros(3, 8, 5, 5))
    torch.testing.assert_close(twice, torch.full((channels or 1,), deviation / math.sqrt(2)))


def test_an_input_quantizer_is_uncalibrated_until_it_has_a_grid_also_after_loading() -> None:
    quantizer = InputQuantizer((2, 4), nonnegative=False)
    assert not quantizer.calibrated
    assert torch.isnan(quantizer.step).all()
    other = InputQuantizer((2, 4), nonnegative=False)
    other.load_state_dict(quantizer.state_dict())
    assert not other.calibrated
    quantizer.set_grid(torch.tensor([0.5, 0.1]), torch.tensor([1, 3]))
    other.load_state_dict(quantizer.state_dict())
    assert other.calibrated
    assert other.limits(1) == (-3, 12)
    other.forget()
    assert not other.calibrated


@pytest.mark.parametrize(
    ("zeros", "kind"),
    [([0, 0], "unsigned"), ([2, 8], "signed"), ([1, 8], "affine"), ([0, 3], "affine")],
)
def test_zero_points_say_the_kind(zeros: list[int], kind: str) -> None:
    quantizer = InputQuantizer((2, 4), nonnegative=False)
    quantizer.set_grid(torch.tensor([0.5, 0.1]), torch.tensor(zeros))
    assert quantizer.kind == kind


def test_real_zero_is_always_a_code() -> None:
    quantizer = InputQuantizer((2, 4), nonnegative=False)
    quantizer.set_grid(torch.tensor([0.37, 0.11]), torch.tensor([1, 3]))
    for index in range(2):
        assert quantizer(torch.zeros(2, 3), index).count_nonzero() == 0


@pytest.mark.parametrize("zero", [0, 1])
def test_ranges_learn_at_about_the_same_relative_speed_at_every_bit_width(zero: int) -> None:
    """Of values beyond the range, whose gradient LSQ multiplies by the largest code."""
    weights, inputs = (
        WeightQuantizer((2, 4, 6, 8), channels=None),
        InputQuantizer((2, 4, 6, 8), nonnegative=not zero),
    )
    inputs.set_grid(
        torch.tensor([1.0, 0.2, 0.05, 0.012]), torch.tensor([zero, 2 * zero, 8 * zero, 32 * zero])
    )
    values = torch.full((4, 100), 1e3)
    for quantizer in (weights, inputs):
        speeds = []
        for index in range(4):
            top = quantizer.limits(index)[1]
            with torch.no_grad():
                quantizer.step[index] = 3 / top
            (gradient,) = torch.autograd.grad(quantizer(values, index).sum(), quantizer.step)
            speeds.append(float(gradient[index] / quantizer.step.detach()[index]))
        assert max(speeds) < 2 * min(speeds)


def test_at_two_bits_the_gradient_of_a_step_size_is_that_of_lsq() -> None:
    quantizer = WeightQuantizer((2,), channels=3)
    weight = torch.randn(3, 40)
    quantizer.initialize(weight)
    quantizer(weight, 0).square().sum().backward()
    found = quantizer.step.grad.clone()
    plain = quantizer.step.detach().clone().requires_grad_()
    fake_quantize(
        weight, plain[0], qmin=-2, qmax=1, axis=0, gradient_scale=40**-0.5
    ).square().sum().backward()
    torch.testing.assert_close(found, plain.grad)


def test_selected_candidates_learn_as_fast_as_numbered_ones() -> None:
    weights, inputs = (
        WeightQuantizer((2, 4, 8), channels=3),
        InputQuantizer((2, 4, 8), nonnegative=False),
    )
    values = torch.randn(3, 40)
    weights.initialize(values)
    inputs.set_grid(torch.tensor([0.9, 0.3, 0.02]), torch.tensor([1, 5, 80]))
    for quantizer in (weights, inputs):
        for index in range(3):
            choice = torch.tensor([index])
            gradients = []
            for result in (quantizer(values, index), quantizer.forward_selected(values, choice)):
                gradients += torch.autograd.grad(result.square().sum(), quantizer.step)
            torch.testing.assert_close(gradients[0], gradients[1])

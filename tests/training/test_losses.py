"""The terms of the loss against straightforward implementations, and where their gradients go."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from anyprec.training.losses import feature_distance, quantization_error


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize(("bits", "lowest"), [(2, 2), (4, 2), (5, 3), (8, 2)])
def test_quantization_error_counts_codes_that_the_lowest_bit_width_has(
    bits: int, lowest: int, axis: int | None
) -> None:
    weight = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    step = torch.tensor(0.3) if axis is None else 0.2 + 0.1 * torch.arange(weight.shape[axis]) / 6
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    shared = {
        code * 2 ** (bits - lowest) for code in range(-(2 ** (lowest - 1)), 2 ** (lowest - 1))
    }
    values = weight.detach()
    total, gradient = 0.0, torch.zeros(4, 6, dtype=torch.float64)
    for row in range(4):
        for column in range(6):
            value = float(values[row, column])
            s = float(step) if axis is None else float(step[(row, column)[axis]])
            code = min(max(round(value / s), low), high)
            clipped = min(max(value, low * s), high * s)
            if code in shared:
                total += (clipped - code * s) ** 2
                gradient[row, column] = 2 * (clipped - code * s)
    rest = 24 / (6 if axis == 1 else 4)
    found = quantization_error(
        weight, step, qmin=low, qmax=high, axis=axis, coarser=2 ** (bits - lowest)
    )
    assert found.item() == pytest.approx(total / rest, rel=1e-5)
    found.backward()
    torch.testing.assert_close(weight.grad, gradient / rest, rtol=1e-4, atol=1e-7)


def test_the_quantization_error_moves_no_step_size() -> None:
    step = torch.tensor(0.5, requires_grad=True)
    quantization_error(torch.randn(3, 3, requires_grad=True), step, qmin=-2, qmax=1).backward()
    assert step.grad is None


def test_feature_distance_is_a_mean_squared_error_to_a_fixed_target() -> None:
    feature, target = (
        torch.randn(2, 3, 4, requires_grad=True),
        torch.randn(2, 3, 4, requires_grad=True),
    )
    plain = feature_distance(feature, target, relative=False)
    torch.testing.assert_close(plain, F.mse_loss(feature, target))
    scaled = feature_distance(feature, target, relative=True)
    torch.testing.assert_close(scaled, ((feature - target) ** 2).sum() / (target**2).sum())
    (plain + scaled).backward()
    assert feature.grad.any()
    assert target.grad is None

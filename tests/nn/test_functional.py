"""Fake quantization against a chain of elementary operations that autograd differentiates."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

from anyprec.nn.functional import fake_quantize, integer_codes
from anyprec.nn.moments import match_moments
from anyprec.nn.straight_through import PerChannel, PerTensor

GRIDS = [(-2, 1), (-8, 7), (0, 3), (0, 255), (-5, 10)]


def chain(values: Tensor, step: Tensor, qmin: int, qmax: int) -> Tensor:
    """LSQ by elementary operations: rounding is passed straight through, clamping has a gradient.

    The ratio is clamped with strict bounds as in Esser et al. (equation 3), where the gradient is
    zero on the border.
    """
    ratio = values / step
    inside = (ratio > qmin) & (ratio < qmax)
    clamped = torch.where(inside, ratio, ratio.detach().clamp(qmin, qmax))
    rounded = clamped + (clamped.round() - clamped).detach()
    return rounded * step


@pytest.mark.parametrize(("qmin", "qmax"), GRIDS)
def test_gradients_equal_those_of_the_elementary_chain_in_float64(qmin: int, qmax: int) -> None:
    values = (torch.randn(3, 4, 5, 6, dtype=torch.float64) * 3).requires_grad_()
    step = torch.tensor(0.37, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    expected = chain(values, step, qmin, qmax)
    expected_gradients = torch.autograd.grad(expected, (values, step), upstream)
    found = fake_quantize(values, step, qmin=qmin, qmax=qmax)
    gradients = torch.autograd.grad(found, (values, step), upstream)
    assert torch.equal(found, expected)
    # Sums of 360 products in another order: a few units of rounding.
    for one, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("axis", [0, 1])
def test_per_channel_gradients_equal_those_of_the_elementary_chain(axis: int) -> None:
    values = torch.randn(3, 4, 5, dtype=torch.float64).requires_grad_()
    channels = values.shape[axis]
    step = torch.rand(channels, dtype=torch.float64).add_(0.1).requires_grad_()
    upstream = torch.randn(3, 4, 5, dtype=torch.float64)
    shape = [channels if dim == axis else 1 for dim in range(3)]
    expected = torch.autograd.grad(
        chain(values, step.reshape(shape), -4, 3), (values, step), upstream
    )
    found = torch.autograd.grad(
        fake_quantize(values, step, qmin=-4, qmax=3, axis=axis), (values, step), upstream
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_the_step_gradient_is_scaled_and_the_value_gradient_is_not() -> None:
    values, step = torch.randn(50, requires_grad=True), torch.tensor(0.3, requires_grad=True)
    plain = torch.autograd.grad(fake_quantize(values, step, qmin=-2, qmax=1).sum(), (values, step))
    scaled = torch.autograd.grad(
        fake_quantize(values, step, qmin=-2, qmax=1, gradient_scale=0.25).sum(), (values, step)
    )
    assert torch.equal(plain[0], scaled[0])
    assert torch.equal(plain[1] * 0.25, scaled[1])


@pytest.mark.parametrize("axis", [None, 0])
def test_the_sign_of_a_step_does_not_matter_and_its_gradient_turns_with_it(
    axis: int | None,
) -> None:
    values = torch.randn(2, 30)
    size = torch.tensor([0.3, 0.5]) if axis == 0 else torch.tensor([0.3])
    positive, negative = size.clone().requires_grad_(), (-size).requires_grad_()
    first = fake_quantize(values, positive, qmin=-2, qmax=1, axis=axis)
    second = fake_quantize(values, negative, qmin=-2, qmax=1, axis=axis)
    assert torch.equal(first, second)
    first.square().sum().backward()
    second.square().sum().backward()
    assert torch.equal(positive.grad, -negative.grad)


def test_a_step_of_zero_leaves_everything_finite() -> None:
    step = torch.zeros((), requires_grad=True)
    result = fake_quantize(torch.randn(9), step, qmin=-2, qmax=1)
    result.sum().backward()
    assert torch.isfinite(result).all()
    assert torch.isfinite(step.grad)


def test_halves_round_to_even() -> None:
    values = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    assert integer_codes(values, torch.tensor(1.0), qmin=-8, qmax=7).tolist() == [0, 2, 2, 0, -2]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_memory_layout_changes_nothing_and_is_kept(layout: torch.memory_format) -> None:
    base = torch.randn(2, 6, 5, 4)
    reference, step = base.clone().requires_grad_(), torch.tensor(0.2, requires_grad=True)
    fake_quantize(reference, step, qmin=-4, qmax=3).square().sum().backward()
    values, other = (
        base.clone(memory_format=layout).requires_grad_(),
        torch.tensor(0.2, requires_grad=True),
    )
    result = fake_quantize(values, other, qmin=-4, qmax=3)
    result.square().sum().backward()
    assert result.is_contiguous(memory_format=layout)
    assert torch.equal(values.grad, reference.grad)
    torch.testing.assert_close(other.grad, step.grad)  # the same sum in another order


def test_values_are_not_changed() -> None:
    values = torch.randn(20)
    before = values.clone()
    fake_quantize(values, torch.tensor(0.1), qmin=-2, qmax=1)
    assert torch.equal(values, before)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    bits=st.integers(2, 8),
    zero=st.integers(0, 255),
    step=st.floats(1e-3, 1e3),
    values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20),
)
def test_every_code_is_a_fixed_point(
    bits: int, zero: int, step: float, values: list[float]
) -> None:
    zero = min(zero, 2**bits - 1)
    qmin, qmax = -zero, 2**bits - 1 - zero
    grid = {"qmin": qmin, "qmax": qmax}
    size = torch.tensor(step)
    once = fake_quantize(torch.tensor(values), size, **grid)
    codes = integer_codes(torch.tensor(values), size, **grid)
    assert torch.equal(fake_quantize(once, size, **grid), once)
    assert torch.equal(codes * size, once)
    assert qmin <= int(codes.min()) <= int(codes.max()) <= qmax


@pytest.mark.parametrize("axis", [0, 1])
def test_matched_moments_are_those_of_the_latent_weight(axis: int) -> None:
    weight = torch.randn(5, 4, 3, 3) + 0.5
    quantized = (torch.round(weight * 2) / 3).requires_grad_()
    matched = match_moments(quantized, weight, axis=axis)
    dims = [dim for dim in range(4) if dim != axis]
    torch.testing.assert_close(matched.mean(dims), weight.mean(dims))
    torch.testing.assert_close(matched.std(dims), weight.std(dims))
    matched.sum().backward()
    stretch = weight.std(dims) / quantized.detach().std(dims)
    torch.testing.assert_close(quantized.grad.mean(dims), stretch)


def test_a_channel_that_rounds_to_one_code_keeps_its_mean_and_is_not_stretched() -> None:
    weight = torch.tensor([[0.1, 0.2, 0.3]])
    matched = match_moments(torch.zeros(1, 3), weight, axis=0)
    torch.testing.assert_close(matched, torch.full((1, 3), 0.2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_result_that_is_not_kept_may_change_in_place(dtype: torch.dtype) -> None:
    start = torch.randn(2, 3, 8, 8).to(dtype)
    upstream = torch.randn(2, 3, 8, 8).to(dtype)
    gradients = []
    for keep_result in (True, False):
        values = start.clone().requires_grad_()
        step = torch.tensor(0.05, requires_grad=True)
        result = fake_quantize(values, step, qmin=-20, qmax=20, keep_result=keep_result)
        if not keep_result:
            result.add_(1.0)
        gradients.append(torch.autograd.grad(result, (values, step), upstream))
    for kept, computed in zip(*gradients, strict=True):
        assert torch.equal(kept, computed)


@pytest.mark.parametrize("axis", [None, 0])
def test_without_gradients_autograd_has_no_part_in_it(
    axis: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = torch.randn(4, 6)
    step = torch.rand(2, 1 if axis is None else 4, requires_grad=True)
    expected = fake_quantize(values, step, qmin=-8, qmax=7, row=1, axis=axis)
    assert expected.requires_grad
    for function in (PerTensor, PerChannel):
        monkeypatch.setattr(function, "apply", None)
    with torch.no_grad():
        found = fake_quantize(values, step, qmin=-8, qmax=7, row=1, axis=axis)
    assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # of torch's own, at first use
def test_a_derivative_forwards_is_never_dropped() -> None:
    values, tangent = torch.randn(2, 6)
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(values, tangent)
        with pytest.raises(RuntimeError, match="jvp"):
            fake_quantize(dual, torch.tensor(0.1), qmin=-8, qmax=7)

"""The C kernel against torch's operations, bit for bit, and its sums against float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from anyprec.kernels import describe, kernels_off
from anyprec.nn.channels import GroupedAxis
from anyprec.nn.functional import STEP_FLOOR, fake_quantize
from tests.kernels.oracle import step_gradient

GRIDS = [(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for bits in range(2, 9)]
GRIDS += [(0, 2**bits - 1) for bits in range(2, 9)] + [(-3, 252), (-100, 155)]
SIZES = [1, 2, 15, 16, 17, 31, 64, 1000, 4096, 4097, 70_001]

pytestmark = pytest.mark.skipif(
    not describe("cpu").startswith("c:"), reason="no C kernel on this machine"
)


def bits_of(tensor: Tensor) -> Tensor:
    """Bit patterns, so that NaN equals NaN and 0 is not -0."""
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def run(
    values: Tensor, step: Tensor, upstream: Tensor, **arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, the gradient of the values and that of the step sizes."""
    values, step = values.detach().requires_grad_(), step.detach().clone().requires_grad_()
    result = fake_quantize(values, step, **arguments)
    return (result.detach(), *torch.autograd.grad(result, (values, step), upstream))


def run_both(values: Tensor, step: Tensor, upstream: Tensor, **arguments: Any) -> tuple[Any, Any]:
    """By the kernel, and by torch's operations."""
    mine = run(values, step, upstream, **arguments)
    with kernels_off():
        return mine, run(values, step, upstream, **arguments)


def require_same(mine: Any, theirs: Any) -> None:
    assert mine[0].stride() == theirs[0].stride()
    for one, other in zip(mine[:2], theirs[:2], strict=True):
        assert torch.equal(bits_of(one), bits_of(other))
    # torch's sums are of differences of large numbers; those of the kernel are tried below.
    torch.testing.assert_close(mine[2], theirs[2], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("qmin", "qmax"), GRIDS)
def test_results_and_gradients_are_bit_equal_at_every_candidate(qmin: int, qmax: int) -> None:
    for count in SIZES:
        values = torch.randn(count) * qmax / 2
        upstream = torch.randn(count)
        step = torch.tensor([0.7, -0.3, 1.1])
        mine, theirs = run_both(values, step, upstream, row=1, qmin=qmin, qmax=qmax)
        require_same(mine, theirs)


def special_values(step: float, qmin: int, qmax: int) -> Tensor:
    """Ties, borders and their neighbours, zeros of both signs, the smallest and the largest."""
    ties = (torch.arange(qmin - 2, qmax + 3) + 0.5) * step
    borders = torch.tensor([qmin * step, qmax * step])
    around = [torch.nextafter(borders, torch.tensor(to)) for to in (-math.inf, math.inf)]
    tiny = [0.0, -0.0, 1e-45, -1e-45, 1e-39, -1e-39, -0.1 * step, 0.1 * step]
    huge = [math.inf, -math.inf, 3e38, -3e38, 2.0**23 * step, -(2.0**22 + 0.5) * step]
    return torch.cat([ties, borders, *around, torch.tensor(tiny + huge)])


@pytest.mark.parametrize(("qmin", "qmax"), GRIDS)
@pytest.mark.parametrize("step", [0.25, 0.1, 0.037, 1e-38, 2.0**-130, 0.0, 1e36])
def test_special_values_are_bit_equal(step: float, qmin: int, qmax: int) -> None:
    values = special_values(max(step, STEP_FLOOR), qmin, qmax)
    # Whole vectors only: torch's own gradient of NaN differs in the rest.
    values = torch.cat([values, values.new_zeros(-len(values) % 64)])
    upstream = torch.randn(len(values))
    for axis, steps, shape in ((None, 1, (-1,)), (0, 2, (2, -1))):
        size = torch.full((1, steps), step) if axis is None else torch.full((1, 2), step)
        arguments = {"row": 0, "qmin": qmin, "qmax": qmax, "axis": axis}
        laid = values.reshape(shape), size, upstream.reshape(shape)
        mine, theirs = run_both(*laid, **arguments)
        for one, other in zip(mine[:2], theirs[:2], strict=True):
            assert torch.equal(bits_of(one), bits_of(other))


def test_nan_stays_nan_and_gets_no_gradient() -> None:
    values = torch.tensor([math.nan, 1.0] * 32)
    for axis, steps in ((None, 1), (0, 64)):
        result, of_values, of_step = run(
            values, torch.ones(steps), torch.ones(64), qmin=-2, qmax=3, axis=axis
        )
        assert result.isnan().tolist() == [True, False] * 32
        assert of_values.tolist() == [0.0, 1.0] * 32
        assert of_step.isnan().any()


@pytest.mark.parametrize("count", SIZES)
@pytest.mark.parametrize(("qmin", "qmax"), GRIDS[:7])
def test_the_gradient_of_a_step_is_that_of_float64(qmin: int, qmax: int, count: int) -> None:
    values, upstream = torch.randn(count) * qmax / 2, torch.randn(count)
    for size in (0.3, -0.3):
        step = torch.tensor([9.0, size])
        _, _, of_step = run(values, step, upstream, row=1, qmin=qmin, qmax=qmax)
        expected, magnitudes = step_gradient(upstream, values, step[1], qmin, qmax)
        assert of_step[0] == 0
        # Half a unit of rounding for each step of a sum, and of its terms.
        assert (of_step[1] - expected).abs() <= 1e-6 * magnitudes


WEIGHTS = [
    ((8, 3, 3, 3), 0),
    ((32, 1, 3, 3), 0),
    ((5, 700), 0),
    ((4, 6, 2, 2), 1),
    ((3, 5, 7), 2),
    ((3, 5, 7), -2),
    ((6,), 0),
    ((6, 2, 3), GroupedAxis(3)),
    ((8, 3, 2, 2), GroupedAxis(2)),
]


@pytest.mark.parametrize(("shape", "axis"), WEIGHTS)
@pytest.mark.parametrize(("qmin", "qmax"), GRIDS[:7])
def test_channels_are_bit_equal_and_their_sums_those_of_float64(
    shape: tuple[int, ...], axis: Any, qmin: int, qmax: int
) -> None:
    is_grouped = isinstance(axis, GroupedAxis)
    channels = axis.groups * shape[1] if is_grouped else shape[axis]
    step = torch.rand(3, channels) * torch.tensor([1.0, -1.0, 1.0])[:, None] + 0.01
    values, upstream = torch.randn(shape) * qmax / 2, torch.randn(shape)
    arguments = {"row": 1, "qmin": qmin, "qmax": qmax, "axis": axis}
    mine, theirs = run_both(values, step, upstream, **arguments)
    require_same(mine, theirs)
    assert mine[2].shape == step.shape
    assert not mine[2][[0, 2]].any()
    if is_grouped:
        return
    for channel in range(channels):
        expected, magnitudes = step_gradient(
            upstream.select(axis, channel),
            values.select(axis, channel),
            step[1, channel],
            qmin,
            qmax,
        )
        assert (mine[2][1, channel] - expected).abs() <= 1e-6 * magnitudes


def layouts() -> list[Tensor]:
    """Tensors that lie in memory in other orders, or with gaps."""
    images, tokens = torch.randn(3, 5, 6, 7), torch.randn(4, 37, 24)
    return [
        images.contiguous(memory_format=torch.channels_last),
        images[:, ::2],
        images.transpose(1, 3),
        images[:, :, 1:4, 2:5].contiguous(memory_format=torch.channels_last),
        tokens[:, 0],  # a class token: each of them a row, far from the next one
        tokens.permute(2, 0, 1),
        tokens[:, :1].expand(-1, 5, -1),
        tokens[::2, ::3, 1::4],
        torch.randn(()),
    ]


@pytest.mark.parametrize("number", range(len(layouts())))
def test_every_layout_in_memory_is_read_and_kept(number: int) -> None:
    torch.manual_seed(number)
    values = layouts()[number]
    for upstream in (
        torch.randn(values.shape),
        torch.ones(()).expand(values.shape),
        torch.randn_like(values),
    ):
        mine, theirs = run_both(values, torch.tensor(0.2), upstream, qmin=-4, qmax=3)
        require_same(mine, theirs)


@pytest.mark.parametrize("axis", [0, 1])
def test_weights_in_channels_last_are_bit_equal(axis: int) -> None:
    values = torch.randn(4, 6, 3, 3).contiguous(memory_format=torch.channels_last)
    step = torch.rand(values.shape[axis]) + 0.1
    for upstream in (torch.randn(4, 6, 3, 3), torch.randn_like(values)):
        mine, theirs = run_both(values, step, upstream, qmin=-4, qmax=3, axis=axis)
        require_same(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("axis", [None, 0])
def test_narrow_values_are_bit_equal(dtype: torch.dtype, axis: int | None) -> None:
    values, upstream = torch.randn(64, 50).to(dtype), torch.randn(64, 50).to(dtype)
    step = torch.rand(64 if axis == 0 else 1) * 0.02 + 0.01
    mine, theirs = run_both(values, step, upstream, qmin=-128, qmax=127, axis=axis)
    assert mine[0].dtype == mine[1].dtype == dtype
    require_same(mine, theirs)


def test_threads_share_large_tensors_and_change_nothing() -> None:
    values, upstream = torch.randn(3, 700_001), torch.randn(3, 700_001)
    single = run(values, torch.tensor(0.1), upstream, qmin=-8, qmax=7)
    channels = run(values, torch.full((3,), 0.1), upstream, qmin=-8, qmax=7, axis=0)
    threads = torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        shared = run(values, torch.tensor(0.1), upstream, qmin=-8, qmax=7)
        shared_channels = run(values, torch.full((3,), 0.1), upstream, qmin=-8, qmax=7, axis=0)
    finally:
        torch.set_num_threads(threads)
    for one, other in ((single, shared), (channels, shared_channels)):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
        # Block by block the same sums in float32; these are added in float64.
        torch.testing.assert_close(one[2], other[2], rtol=1.2e-7, atol=0)

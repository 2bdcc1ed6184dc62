"""Which kernel runs where, what a mode sees of it, and where torch's operations run instead."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from anyprec.kernels import describe, kernel_for, kernels_off, use_kernels
from anyprec.nn.functional import fake_quantize
from anyprec.nn.quantizers import InputQuantizer, WeightQuantizer

NO_LAUNCH = {"empty", "empty_like", "new_empty", "detach", "view", "reshape", "alias"}

has_c = pytest.mark.skipif(
    not describe("cpu").startswith("c:"), reason="no C kernel on this machine"
)


class Counting(TorchDispatchMode):
    """Counts operations that a GPU would launch."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if name not in NO_LAUNCH:
            self.launches[name] += 1
        return func(*args, **(kwargs or {}))


class Watched(Tensor):
    """A tensor of another class, as libraries make them."""


def quantizers() -> list[tuple[nn.Module, Tensor]]:
    per_tensor = WeightQuantizer((2, 4, 8), channels=None)
    per_channel = WeightQuantizer((2, 4, 8), channels=6)
    inputs = InputQuantizer((2, 4, 8), nonnegative=False)
    weight = torch.randn(6, 5, 3, 3)
    per_tensor.initialize(weight)
    per_channel.initialize(weight)
    inputs.set_grid(torch.rand(3) + 0.1, torch.tensor([1, 8, 128]))
    return [(per_tensor, weight), (per_channel, weight), (inputs, weight)]


@pytest.mark.parametrize(("number", "backward_launches"), [(0, 2), (1, 1), (2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_would_launch_once_forward_and_twice_backward(
    number: int, backward_launches: int, dtype: torch.dtype
) -> None:
    quantizer, values = quantizers()[number]
    quantizer.to("meta")
    values = values.to("meta", dtype).requires_grad_()
    with Counting() as forward:
        result = quantizer(values, 1)
    with Counting() as backward:
        gradients = torch.autograd.grad(result, (values, quantizer.step), torch.empty_like(result))
    assert sum(forward.launches.values()) == 1
    assert sum(backward.launches.values()) == backward_launches
    assert result.dtype == gradients[0].dtype == dtype
    assert gradients[1].shape == quantizer.step.shape


def test_on_the_meta_device_a_class_token_costs_a_copy_in_each_direction() -> None:
    quantizer, _ = quantizers()[2]
    quantizer.to("meta")
    tokens = torch.empty(4, 197, 36, device="meta", requires_grad=True)
    with Counting() as forward:
        result = quantizer(tokens[:, 0], 1)
    assert forward.launches == {"select": 1, "tensor": 1, "copy_": 1}
    assert result.stride() == (36, 1)


def test_off_torchs_operations_run_on_every_device() -> None:
    quantizer, values = quantizers()[2]
    quantizer.to("meta")
    with kernels_off(), Counting() as counting:
        quantizer(values.to("meta"), 1)
    assert counting.launches["round_"] == 1
    assert counting.launches["tensor"] == 0


def test_the_option_holds_until_it_is_changed_and_is_described() -> None:
    values, step = torch.randn(3, device="meta"), torch.ones(1, device="meta")
    assert kernel_for(values, step) is not None
    use_kernels(enabled=False)
    try:
        assert kernel_for(values, step) is None
        assert describe("meta").startswith("aten: kernels are off")
    finally:
        use_kernels(enabled=True)
    assert kernel_for(values, step) is not None
    assert describe("meta").startswith("meta:")
    assert describe("mps") == "aten: there is no kernel for devices of type 'mps'"


def test_kernels_are_on_again_after_an_exception() -> None:
    values, step = torch.randn(3, device="meta"), torch.ones(1, device="meta")
    with pytest.raises(KeyError), kernels_off():
        assert kernel_for(values, step) is None
        raise KeyError
    assert kernel_for(values, step) is not None


@has_c
def test_plain_tensors_have_a_kernel_and_others_have_none() -> None:
    values, step = torch.randn(4, 5), torch.ones(3)
    assert kernel_for(values, step) is not None
    assert kernel_for(nn.Parameter(values), nn.Parameter(step)) is not None
    with torch.inference_mode():
        assert kernel_for(values + 1, step) is not None
    for unusual in (
        values.double(),
        values.to("meta"),
        values.to_sparse(),
        values[:0],
        values.as_subclass(Watched),
        torch._neg_view(values),
        torch._efficientzerotensor((4, 5)),
    ):
        assert kernel_for(unusual, step) is None
    for unusual in (values.to_sparse(), values.as_subclass(Watched), torch._neg_view(values)):
        assert kernel_for(values, step, unusual) is None
    for unusual in (step.double(), step.half(), torch.ones(6)[::2], step.as_subclass(Watched)):
        assert kernel_for(values, unusual) is None
    with FakeTensorMode() as mode:
        assert kernel_for(mode.from_tensor(values), mode.from_tensor(step)) is None


@has_c
def test_whoever_watches_operations_sees_torchs() -> None:
    values = torch.randn(4, 5, requires_grad=True)
    step = torch.tensor([0.3], requires_grad=True)
    plain = fake_quantize(values, step, qmin=-8, qmax=7)
    with Counting() as forward:
        watched = fake_quantize(values, step, qmin=-8, qmax=7)
    assert {"div", "round_", "clamp_", "mul_"} <= set(forward.launches)
    assert torch.equal(watched, plain)
    # What ran forward with a kernel is watched backward, and the other way round.
    with Counting() as backward:
        first = torch.autograd.grad(plain, (values, step), torch.ones(4, 5))
    assert "hardtanh_backward" in backward.launches
    second = torch.autograd.grad(watched, (values, step), torch.ones(4, 5))
    assert torch.equal(first[0], second[0])
    torch.testing.assert_close(first[1], second[1])


@pytest.mark.parametrize("axis", [None, 0])
def test_values_with_the_sign_turned_by_a_view_are_read_right(axis: int | None) -> None:
    values, step = torch.randn(4, 5), torch.rand(4 if axis == 0 else 1) + 0.1
    turned = torch._neg_view(values)
    expected = fake_quantize(-values, step, qmin=-8, qmax=7, axis=axis)
    assert torch.equal(fake_quantize(turned, step, qmin=-8, qmax=7, axis=axis), expected)


@pytest.mark.parametrize("axis", [None, 0])
def test_only_the_gradients_that_are_asked_for_are_returned(axis: int | None) -> None:
    for wants_values, wants_step in ((True, False), (False, True)):
        for off in (False, True):
            values = torch.randn(4, 5, requires_grad=wants_values)
            step = torch.full((4 if axis == 0 else 1,), 0.3, requires_grad=wants_step)
            if off:
                with kernels_off():
                    fake_quantize(values, step, qmin=-8, qmax=7, axis=axis).sum().backward()
            else:
                fake_quantize(values, step, qmin=-8, qmax=7, axis=axis).sum().backward()
            assert (values.grad is not None) == wants_values
            assert (step.grad is not None) == wants_step


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("off", [False, True])
def test_a_tensor_changed_between_the_passes_is_noticed(axis: int | None, off: bool) -> None:
    for changed in (0, 1):
        values = torch.randn(4, 5, requires_grad=True)
        step = torch.full((2, 4 if axis == 0 else 1), 0.3, requires_grad=True)
        with kernels_off() if off else torch.enable_grad():
            result = fake_quantize(values * 1, step, row=0, qmin=-8, qmax=7, axis=axis)
            with torch.no_grad():
                (result.grad_fn.saved_tensors[0] if changed == 0 else step[1:]).add_(1)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                result.sum().backward()


@pytest.mark.parametrize("axis", [None, 0])
def test_gradients_are_not_differentiable_and_say_so(axis: int | None) -> None:
    values = torch.randn(4, 5, requires_grad=True)
    step = torch.full((4 if axis == 0 else 1,), 0.3, requires_grad=True)
    result = fake_quantize(values, step, qmin=-8, qmax=7, axis=axis)
    upstream = torch.ones(4, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(result, values, upstream, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("axis", [None, 0])
def test_an_empty_tensor_has_an_empty_result(axis: int | None) -> None:
    values = torch.randn(0, 5, requires_grad=True)
    step = torch.ones(0 if axis == 0 else 1, requires_grad=True)
    fake_quantize(values, step, qmin=-8, qmax=7, axis=axis).sum().backward()
    assert values.grad.shape == (0, 5)
    assert not step.grad.any()


@pytest.mark.parametrize("row", [-1, 2])
def test_a_row_that_is_not_there_is_never_read(row: int) -> None:
    values, step = torch.randn(4, 5), torch.rand(2, 4)
    for axis, sizes in ((0, step), (None, step[:, 0].contiguous())):
        if row < 0:
            expected = fake_quantize(values, sizes, row=1, qmin=-8, qmax=7, axis=axis)
            result = fake_quantize(values, sizes, row=row, qmin=-8, qmax=7, axis=axis)
            assert torch.equal(result, expected)
        else:
            with pytest.raises(IndexError):
                fake_quantize(values, sizes, row=row, qmin=-8, qmax=7, axis=axis)


def test_too_few_step_sizes_are_never_read_beyond_their_end() -> None:
    with pytest.raises(RuntimeError):
        fake_quantize(torch.randn(4, 5), torch.rand(3), qmin=-8, qmax=7, axis=0)


@pytest.mark.parametrize(("axis", "learns"), [(None, True), (0, False)])
def test_batched_gradients_do_not_reach_a_kernel(axis: int | None, learns: bool) -> None:
    values = torch.randn(4, 5, requires_grad=True)
    step = torch.full((2, 4 if axis == 0 else 1), 0.3, requires_grad=learns)
    wanted = (values, step) if learns else (values,)
    result = fake_quantize(values, step, row=1, qmin=-8, qmax=7, axis=axis)
    upstream = torch.randn(3, 4, 5)
    batched = torch.autograd.grad(
        result, wanted, upstream, is_grads_batched=True, retain_graph=True
    )
    for number in range(3):
        single = torch.autograd.grad(result, wanted, upstream[number], retain_graph=True)
        for many, one in zip(batched, single, strict=True):
            torch.testing.assert_close(many[number], one)

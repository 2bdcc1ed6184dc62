"""Counting calls, and the quantizers of what they return."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anyprec.nn.counting import CountingMode, counted_name, uncounted
from anyprec.nn.outputs import (
    OutputOwner,
    OutputPoint,
    OutputQuantizer,
    add_output_quantizer,
    own_outputs,
    restore_outputs,
)
from anyprec.nn.shared import SharedInputQuantizer, input_quantizer_of

PAIR = (torch.ones(2), torch.ones(2))


def _quantizer(step: float, *, nonnegative: bool = False) -> OutputQuantizer:
    quantizer = OutputQuantizer(nonnegative=nonnegative)
    zero_point = 0 if nonnegative else 128
    quantizer.set_grid(torch.tensor([step]), torch.tensor([zero_point], dtype=torch.int32))
    return quantizer


@pytest.mark.parametrize(
    ("form", "name"),
    [
        (F.relu, "relu"), (torch.relu_, "relu"), (Tensor.relu, "relu"), (F.hardtanh_, "hardtanh"),
        (Tensor.__iadd__, "add"), (torch.add, "add"), (Tensor.mean, "mean"), (F.linear, "linear"),
        (torch.ops.aten.conv2d.default, "conv2d"), (F.avg_pool2d, "avg_pool2d"),
        (torch.sub, None), (Tensor.shape.__get__, None), (F.max_pool2d, None),
    ],
)  # fmt: skip
def test_forms_of_a_function_have_one_name(form: object, name: str | None) -> None:
    assert counted_name(form, PAIR, {}) == name


def test_only_sums_of_two_real_tensors_are_counted() -> None:
    batches = torch.tensor(3)
    for args, kwargs in (((batches, 1), {}), ((PAIR[0], 1.0), {}), ((PAIR[0], batches), {})):
        assert counted_name(Tensor.add_, args, kwargs) is None
    assert counted_name(torch.add, PAIR[:1], {"other": PAIR[1]}) == "add"


def test_uncounted_pauses_every_mode_that_is_active() -> None:
    outer, inner = CountingMode(), CountingMode()
    with outer, inner:
        with uncounted(), uncounted():
            assert (outer.pauses, inner.pauses) == (2, 2)
        with pytest.raises(ZeroDivisionError), uncounted():
            _ = 1 / 0
        assert (outer.pauses, inner.pauses) == (0, 0)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor, times: int = 2) -> Tensor:
        for _ in range(times):
            x = self.relu(x) - 0.25
        return x


def _owner(index: int) -> Twice:
    owner = Twice()
    quantizer = add_output_quantizer(owner.relu, "3", nonnegative=True, device=torch.device("cpu"))
    quantizer.set_grid(torch.tensor([0.5]), torch.zeros(1, dtype=torch.int32))
    own_outputs(owner, (OutputPoint("relu", index, (2,), "relu.output_quantizers.3"),))
    return owner


def test_the_call_of_that_number_is_quantized() -> None:
    values = torch.tensor([-1.0, 0.3, 1.9, 200.0])
    for index in (0, 1):
        owner = _owner(index)
        assert torch.equal(owner(values), Twice()(values))
        owner.switch_outputs(active=True)
        expected = values
        for number in range(2):
            expected = expected.relu()
            if number == index:
                expected = (expected / 0.5).round().clamp(0, 255) * 0.5
            expected = expected - 0.25
        assert torch.equal(owner(values), expected)


def test_other_numbers_of_calls_are_refused() -> None:
    owner = _owner(0)
    owner.switch_outputs(active=True)
    for times in (0, 1, 3):
        with pytest.raises(ValueError, match="Twice calls 'relu'"):
            owner(torch.ones(3), times=times)


def test_owners_are_restored() -> None:
    owner = _owner(0)
    assert isinstance(owner, OutputOwner)
    restore_outputs(owner)
    assert type(owner) is Twice
    assert vars(owner).keys() == vars(Twice()).keys()
    assert not owner.state_dict()


def test_a_shared_grid_has_no_step_size_of_its_own() -> None:
    trunk = _quantizer(0.1)
    reader = SharedInputQuantizer((2, 4, 8), nonnegative=False, trunk=trunk)
    assert reader.step.shape == reader.zero_point.shape == (2,)
    assert not reader.calibrated
    reader.set_grid(torch.tensor([1.0, 0.4]), torch.tensor([2, 8], dtype=torch.int32))
    assert reader.calibrated
    assert list(reader.children()) == []
    assert reader.limits(2) == (-128, 127)
    assert reader.grid(2)[0] == trunk.step[0]
    values = trunk(torch.randn(50))
    for index in range(3):
        chosen = reader.forward_selected(values, torch.tensor([index]))
        assert torch.equal(chosen, reader(values, index))
    assert torch.equal(reader(values, 2), values)


def test_a_reader_of_8_bits_alone_only_passes_values_on() -> None:
    trunk = _quantizer(0.1, nonnegative=True)
    reader = input_quantizer_of((8,), nonnegative=True, trunk=trunk)
    assert reader.step.shape == (0,)
    assert reader.kind == "unsigned"
    values = torch.randn(5)
    assert reader(values, 0) is values
    assert reader.forward_selected(values, torch.tensor([0])) is values


@pytest.mark.parametrize(("candidates", "has_trunk"), [((2, 4), True), ((2, 8), False)])
def test_readers_without_8_bits_or_trunk_share_nothing(
    candidates: tuple[int, ...], has_trunk: bool
) -> None:
    trunk = _quantizer(0.1) if has_trunk else None
    reader = input_quantizer_of(candidates, nonnegative=False, trunk=trunk)
    assert not isinstance(reader, SharedInputQuantizer)
    assert reader.step.shape == (2,)

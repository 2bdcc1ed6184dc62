"""The stand-in for a weight that is not there."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from anyprec.errors import PackedError
from anyprec.nn.functional import fake_quantize
from anyprec.nn.packed import PackedOperand, PackedWeight, stand_in


@pytest.fixture
def weight() -> nn.Parameter:
    return stand_in((6, 4), torch.float32, "cpu", derives=False)


def test_it_has_shape_type_and_device_but_no_memory(weight):
    assert isinstance(weight, nn.Parameter)
    assert isinstance(weight, PackedWeight)
    assert (tuple(weight.shape), weight.dtype, weight.device.type) == ((6, 4), torch.float32, "cpu")
    assert not weight.requires_grad
    assert weight.data_ptr() == 0
    assert repr(weight) == "PackedWeight(shape=(6, 4), dtype=torch.float32, device=cpu)"


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_views_know_where_they_lie_in_the_whole(weight, context):
    with context():
        rows, turned, part = weight[2:], weight.t(), weight.chunk(3)[1]
    for view in (rows, turned, part):
        assert isinstance(view, PackedWeight)
        assert view._base is weight
    assert (rows.storage_offset(), tuple(rows.shape)) == (8, (4, 4))
    assert (turned.stride(), tuple(turned.shape)) == ((1, 4), (4, 6))
    assert (part.storage_offset(), tuple(part.shape)) == (8, (2, 4))


@pytest.mark.parametrize(
    "use",
    [
        lambda weight: weight.sum(),
        lambda weight: weight + 1,
        lambda weight: weight.data.mul_(2),
        lambda weight: F.linear(torch.zeros(1, 4), weight),
        lambda weight: weight[0, 0].item(),
        lambda weight: weight.copy_(torch.zeros(6, 4)),
        lambda weight: torch.zeros(6, 4).copy_(weight),
        lambda weight: bool(weight[0, 0] > 0),
    ],
)
def test_whatever_needs_a_value_raises(weight, use):
    with pytest.raises(
        PackedError,
        match=r"needs the values of a weight; this network was loaded from a packed file",
    ):
        use(weight)


def test_a_weight_that_is_standardised_gives_a_stand_in_that_no_operator_takes():
    weight = stand_in((6, 4), torch.float32, "cpu", derives=True)
    derived = (weight - weight.mean(dim=1, keepdim=True)) * torch.ones(6, 1, requires_grad=True)
    assert isinstance(derived, PackedWeight)
    assert derived.shape == (6, 4)
    for use in (
        lambda: F.linear(torch.zeros(1, 4), derived),
        derived.sum().item,
        lambda: float(derived.sum()),
    ):
        with pytest.raises(PackedError, match="needs the values of a weight"):
            use()


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda weight: pickle.loads(pickle.dumps(weight))]
)
def test_copies_are_parameters_of_the_same_kind(again):
    weight = stand_in((6, 4), torch.float16, "cpu", derives=True)
    other = again(weight)
    assert other is not weight
    assert isinstance(other, nn.Parameter)
    assert (other.shape, other.dtype, other.derives) == (weight.shape, weight.dtype, True)


def test_a_module_can_change_its_type(weight):
    layer = nn.Linear(4, 6)
    layer.weight = weight
    layer.to(torch.bfloat16)
    assert isinstance(layer.weight, PackedWeight)
    assert layer.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("axis", [None, 0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_operand_is_what_fake_quantization_makes_of_the_latent_weight(axis, dtype):
    step = (torch.rand(1 if axis is None else (6, 4)[axis]) * 0.1 + 0.1).to(dtype)
    codes = torch.randint(-8, 8, (6, 4))
    scale = (
        step.float()
        if axis is None
        else step.float().reshape([-1 if place == axis else 1 for place in range(2)])
    )
    latent = (codes * scale).to(dtype)
    operand = PackedOperand(
        codes.to(torch.int8),
        torch.ones(1, len(step)),
        axis=axis,
        listed=torch.empty(0, dtype=torch.int64),
        listed_codes=torch.empty((1, 0), dtype=torch.int8),
        moments=None,
    )
    expected = fake_quantize(latent, step, qmin=-8, qmax=7, axis=axis)
    assert torch.equal(operand.weight(0, step, qmin=-8, qmax=7, dtype=dtype), expected)


def test_ratios_survive_a_change_of_number_format():
    ratios = torch.rand(2, 3)
    operand = PackedOperand(
        torch.zeros(3, 2, dtype=torch.int16),
        ratios,
        axis=0,
        listed=torch.empty(0, dtype=torch.int64),
        listed_codes=torch.empty((2, 0), dtype=torch.int8),
        moments=None,
    )
    assert torch.equal(operand.half().ratio_bits.view(torch.float32), ratios)


def test_listed_codes_win_over_points():
    operand = PackedOperand(
        torch.tensor([[5, -5]], dtype=torch.int16),
        torch.ones(1, 1),
        axis=None,
        listed=torch.tensor([1]),
        listed_codes=torch.tensor([[3]], dtype=torch.int8),
        moments=None,
    )
    assert operand.codes(0, qmin=-8, qmax=7).tolist() == [[5.0, 3.0]]

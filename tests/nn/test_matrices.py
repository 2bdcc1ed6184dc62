"""Bare parameters as quantized layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from anyprec.bits import Bits, LayerCandidates
from anyprec.nn.functional import fake_quantize
from anyprec.nn.matrices import QuantizedParameter, quantize_parameter, restore_parameters

CANDIDATES = LayerCandidates((2, 4), (4, 8))


@pytest.fixture
def holder() -> Any:
    holder = nn.MultiheadAttention(8, 2).eval()
    quantize_parameter(holder, "in_proj_weight", CANDIDATES, axis=0)
    return holder


@torch.no_grad()
def test_the_quantized_weight_is_computed_once_until_the_parameter_changes_in_place(
    holder: Any,
) -> None:
    layer = holder.matrices["in_proj_weight"]
    layer.switch(Bits(4, 8))
    first = layer.quantized_weight(layer.weight)
    assert layer.quantized_weight(layer.weight) is first
    holder.in_proj_weight.mul_(1.5)
    second = layer.quantized_weight(layer.weight)
    step = layer.weight_quantizer.step[1]
    expected = fake_quantize(holder.in_proj_weight, step, qmin=-8, qmax=7, axis=0)
    assert torch.equal(second, expected)
    assert not torch.equal(second, first)
    assert layer.quantized_weight(layer.weight) is second


def test_restoring_leaves_the_holder_as_it_was(holder: Any) -> None:
    assert isinstance(holder.matrices["in_proj_weight"], QuantizedParameter)
    restore_parameters(holder)
    assert list(holder.state_dict()) == list(nn.MultiheadAttention(8, 2).state_dict())

"""Observers of layers and norms: several at once, each gone with its block."""

from __future__ import annotations

import copy
import pickle
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anyprec.bits import Bits, LayerCandidates
from anyprec.nn.layers import quantize_layer
from anyprec.nn.norms import switch_norm
from anyprec.nn.observers import Observers


def quantized_linear() -> Any:
    layer = nn.Linear(6, 5)
    quantize_layer(layer, LayerCandidates((2, 4), (4, 8)), nonnegative=False, axis=0)
    layer.input_quantizer.set_grid(torch.tensor([0.4, 0.02]), torch.tensor([8, 128]))
    layer.switch(Bits(4, 8))
    return layer


def test_two_observers_at_once_see_the_same_operands_and_are_gone_after_an_exception() -> None:
    layer, x = quantized_linear(), torch.randn(4, 6)
    first: list[tuple[Tensor, Tensor]] = []
    second: list[tuple[Tensor, Tensor]] = []
    with (
        pytest.raises(RuntimeError, match="stop"),
        layer.operand_observers.including(lambda *operands: first.append(operands)),
        layer.operand_observers.including(lambda *operands: second.append(operands)),
    ):
        layer(x)
        raise RuntimeError("stop")
    layer(x)
    for observed in (first, second):
        ((input_, weight),) = observed
        assert input_ is x
        assert weight is layer.weight
    assert not layer.operand_observers


def test_operands_are_observed_in_floating_point_too() -> None:
    layer, inputs = quantized_linear(), []
    layer.switch(None)
    with layer.operand_observers.including(lambda input_, _weight: inputs.append(input_)):
        assert layer.is_intercepted
        layer(torch.randn(4, 6))
    assert len(inputs) == 1
    assert not layer.is_intercepted


@pytest.mark.parametrize("kind", ["layer", "norm"])
def test_two_observers_at_once_see_the_same_output_and_are_gone_after_an_exception(
    kind: str,
) -> None:
    module: Any = quantized_linear()
    x = torch.randn(4, 6)
    if kind == "norm":
        module = nn.BatchNorm1d(6)
        switch_norm(module, 2)
        module.switch(1)
    first: list[Tensor] = []
    second: list[Tensor] = []
    with (
        pytest.raises(RuntimeError, match="stop"),
        module.output_observers.including(first.append),
        module.output_observers.including(second.append),
    ):
        output = module(x)
        raise RuntimeError("stop")
    module(x)
    assert len(first) == len(second) == 1
    assert first[0] is second[0]
    assert torch.equal(first[0], output)
    assert not module.output_observers


def test_observers_may_end_in_any_order() -> None:
    observers = Observers()
    values: dict[str, list[int]] = {"first": [], "second": []}
    first, second = ExitStack(), ExitStack()
    first.enter_context(observers.including(values["first"].append))
    second.enter_context(observers.including(values["second"].append))
    observers.notify(1)
    first.close()
    observers.notify(2)
    second.close()
    observers.notify(3)
    assert values == {"first": [1], "second": [1, 2]}


@pytest.mark.parametrize("again", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_is_not_observed(again: Any) -> None:
    layer, x, inputs = quantized_linear(), torch.randn(4, 6), []
    with layer.operand_observers.including(lambda input_, _weight: inputs.append(input_)):
        twin = again(layer)
        twin(x)
        assert inputs == []
        assert not twin.operand_observers
        layer(x)
    assert len(inputs) == 1

"""The walk through nested values that finds their tensors."""

from __future__ import annotations

from collections import OrderedDict

import torch

from anyprec.nn.operators import tensors_in


def test_tensors_are_found_in_order_however_deep_in_collections() -> None:
    first, second, third, fourth, fifth = torch.arange(5).unbind()
    values = [first, "text", (second, [None, {"key": third}]), OrderedDict(a=({fourth},)), fifth]
    tensors = list(tensors_in(values))
    assert list(map(int, tensors)) == [0, 1, 2, 3, 4]
    assert tensors[3] is fourth


def test_other_objects_are_not_searched() -> None:
    linear = torch.nn.Linear(1, 1)
    assert not list(tensors_in([linear, "text", 3, None, range(3)]))

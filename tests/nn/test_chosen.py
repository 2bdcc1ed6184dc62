"""The active indices as data: one memory of which every layer and norm has its part."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from anyprec.nn.chosen import Chosen, ChosenTable


class Operations(TorchDispatchMode):
    """Notes the names of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


class Holder(nn.Module):
    def __init__(self, devices: tuple[str, ...]) -> None:
        super().__init__()
        self.chosen = nn.ModuleList()
        for device in devices:
            self.chosen.append(Chosen("weight", "input", device=torch.device(device)))

    def indices(self) -> list[int]:
        return [int(index) for chosen in self.chosen for index in (chosen.weight, chosen.input)]

    def table(self) -> ChosenTable:
        return ChosenTable(self.chosen)


@pytest.fixture
def holder() -> Holder:
    return Holder(("cpu", "cpu", "cpu"))


def memories(holder: nn.Module) -> set[int]:
    return {buffer.untyped_storage().data_ptr() for buffer in holder.buffers()}


def test_one_copy_writes_all_indices(holder: Holder) -> None:
    table = holder.table()
    table.write([1, 2, 3, 4, 5, 6])
    with Operations() as operations:
        table.write([6, 5, 4, 3, 2, 1])
    assert operations.names == ["copy_.default"]
    assert holder.indices() == [6, 5, 4, 3, 2, 1]
    assert all(buffer.data_ptr() % 16 == 0 for buffer in holder.buffers())


def test_each_index_can_be_set_by_itself_in_between(holder: Holder) -> None:
    table = holder.table()
    table.write([1, 2, 3, 4, 5, 6])
    holder.chosen[1].choose(input=0)
    assert holder.indices() == [1, 2, 3, 0, 5, 6]
    table.write([1, 2, 3, 4, 5, 6])
    assert holder.indices() == [1, 2, 3, 4, 5, 6]


def shared(buffer: Tensor) -> None:
    buffer.data = buffer.data.clone()  # as FSDP does


def reloaded(holder: Holder) -> None:
    for chosen in holder.chosen:
        for name, buffer in list(chosen.named_buffers()):
            setattr(chosen, name, buffer.clone())


@pytest.mark.parametrize(
    "move",
    [
        lambda holder: shared(holder.chosen[1].input),
        reloaded,
        lambda holder: holder.to_empty(device="cpu"),
        lambda holder: holder.share_memory(),
        lambda holder: holder.double(),
    ],
)
def test_indices_that_moved_are_written_where_they_are(holder: Holder, move: Any) -> None:
    table = holder.table()
    table.write([1, 2, 3, 4, 5, 6])
    move(holder)
    for indices in ([2, 2, 2, 2, 2, 2], [3, 4, 5, 6, 7, 8]):
        table.write(indices)
        assert holder.indices() == indices
    assert len(memories(holder)) == 1


def test_each_device_has_a_memory_of_its_own() -> None:
    holder = Holder(("cpu", "meta", "cpu"))
    table = holder.table()
    table.write([1, 2, 3, 4, 5, 6])
    with Operations() as operations:
        table.write([6, 5, 4, 3, 2, 1])
    assert operations.names == ["copy_.default"] * 2
    assert int(holder.chosen[0].input) == 5
    assert int(holder.chosen[2].weight) == 2
    assert holder.chosen[1].weight.is_meta


@pytest.mark.parametrize("again", [copy.deepcopy, lambda h: pickle.loads(pickle.dumps(h))])
def test_copies_have_indices_of_their_own(holder: Holder, again: Any) -> None:
    table = holder.table()
    table.write([1, 2, 3, 4, 5, 6])
    other = again(holder)
    assert other.indices() == [1, 2, 3, 4, 5, 6]
    table.write([0, 0, 0, 0, 0, 0])
    assert other.indices() == [1, 2, 3, 4, 5, 6]
    other.table().write([7, 7, 7, 7, 7, 7])
    assert holder.indices() == [0, 0, 0, 0, 0, 0]


def test_tensors_of_another_class_are_written_one_by_one(holder: Holder) -> None:
    class Special(Tensor):
        pass

    special = torch.zeros(1, dtype=torch.int64).as_subclass(Special)
    holder.chosen[1].weight = special
    table = holder.table()
    for indices in ([1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]):
        table.write(indices)
        assert holder.indices() == indices
    assert holder.chosen[1].weight is special


def test_what_was_put_in_place_under_inference_mode_is_written_outside_of_it(
    holder: Holder,
) -> None:
    table = holder.table()
    with torch.inference_mode():
        table.write([1, 2, 3, 4, 5, 6])
    table.write([6, 5, 4, 3, 2, 1])
    assert holder.indices() == [6, 5, 4, 3, 2, 1]

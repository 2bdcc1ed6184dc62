"""Values on their way between the host and a device."""

from __future__ import annotations

import torch

from anyprec.runtime.transfers import Transfer, numbers_of, to_device
from benchmarks.speed.operations import Waits


def test_numbers_are_read_together_and_exactly() -> None:
    values = torch.tensor([0.1, -3.0, 1e-30])
    assert numbers_of(list(values)) == [float(value) for value in values]
    assert numbers_of([torch.tensor(2), torch.tensor(3)]) == [2, 3]
    assert numbers_of([torch.tensor(True), torch.tensor(False)]) == [True, False]
    assert numbers_of([]) == []
    with Waits() as waits:
        numbers_of(list(values.to("meta")))
    assert waits.count == 1


def test_a_transfer_has_the_values_and_no_graph() -> None:
    value = torch.tensor([1.0, 2.0], requires_grad=True) * 3
    transferred = Transfer(value).result()
    assert transferred.tolist() == [3.0, 6.0]
    assert not transferred.requires_grad


def test_a_transfer_is_queued() -> None:
    with Waits() as waits:
        transferred = Transfer(torch.zeros(2, device="meta")).result()
    assert (waits.count, waits.queued) == (0, 1)
    assert transferred.device.type == "cpu"


def test_what_is_on_the_device_already_is_not_copied() -> None:
    value = torch.zeros(2)
    assert to_device(value, torch.device("cpu")) is value
    assert to_device(value, torch.device("meta")).device.type == "meta"

"""Which functions read each value of a forward pass.

A value is what a storage holds between two writes: a view of it is the same value. Operations are
seen in torch's dispatcher, below everything that could hide them. An operation that only moves
numbers (max pooling, zero padding, a copy) hands its value on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from anyprec.network.calls import Call
from anyprec.network.values import reference_of
from anyprec.nn.operators import tensors_in

_MOVING = {
    "clone", "contiguous", "roll", "flip", "repeat", "pixel_shuffle", "pixel_unshuffle",
    "channel_shuffle", "native_channel_shuffle", "index_select", "upsample_nearest1d",
    "upsample_nearest2d", "upsample_nearest3d", "max_pool2d_with_indices",
    "max_pool3d_with_indices", "adaptive_max_pool2d", "adaptive_max_pool3d",
    "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d",
    "replication_pad2d", "replication_pad3d",
}  # fmt: skip
"""Operations whose first result holds only numbers of their first argument."""


@dataclass(frozen=True)
class Read:
    """One operation that read a value.

    Attributes:
        function: Number of the function that ran it; None outside of any.
        handed_on: The value with the same numbers that it made; None if it computed with them.
    """

    function: int | None
    handed_on: int | None


class Trail:
    """Numbers the values of one forward pass.

    Attributes:
        function: Number of the function that is running; set by whoever watches functions.
        stale: Values that were read under the name that a tensor had before an operation in place.
    """

    def __init__(self) -> None:
        self.function: int | None = None
        self.stale: set[int] = set()
        self._numbers: dict[Any, int] = {}
        self._count = 0
        self._reads: dict[int, list[Read]] = {}
        # Tensors are keys by identity, and are not kept alive.
        self._old_names: Any = WeakIdKeyDictionary()

    def number(self, tensor: Tensor) -> int | None:
        """Number of the value that `tensor` holds; None if it has no storage of its own."""
        reference = reference_of(tensor)
        if reference is None:
            return None
        if reference not in self._numbers:
            self._numbers[reference] = self._new()
        return self._numbers[reference]

    def reads(self, number: int) -> list[Read]:
        """What read a value."""
        return self._reads.get(number, [])

    def handed_on(self, number: int) -> Iterator[int]:
        """This value and all others that hold the same numbers."""
        yield number
        for read in self.reads(number):
            if read.handed_on is not None:
                yield from self.handed_on(read.handed_on)

    def renamed(self, tensor: Tensor) -> Tensor:
        """Another name for what an operation in place has returned.

        Whoever reads the value under its old name would not notice if it were replaced.
        """
        with torch._C.DisableTorchFunction():  # noqa: SLF001 (torch has no public name for it)
            alias = tensor.view_as(tensor)
        self._old_names[tensor] = self.number(tensor)
        return alias

    def operation_ran(self, call: Call, result: object) -> None:
        """Note an operation, after it."""
        sources = list(call.sources())
        for tensor in call.tensors():
            old = self._old_names.get(tensor)
            if old is not None and old == self.number(tensor):
                self.stale.add(old)
        written = list(call.written())
        before = {reference_of(tensor) for tensor in call.tensors()}
        results = list(tensors_in([result]))
        made = [tensor for tensor in results if reference_of(tensor) not in before]
        if results and not made and not written:
            return  # views, which read nothing
        numbers = [self.number(tensor) for tensor in sources]
        for tensor in (*made, *written):
            reference = reference_of(tensor)
            if reference is not None:
                self._numbers[reference] = self._new()
        handed_on = None
        if made and not written and _moves(call):
            handed_on = self.number(made[0])
            numbers = numbers[:1]
        for number in dict.fromkeys(numbers):
            if number is not None:
                self._reads.setdefault(number, []).append(Read(self.function, handed_on))

    def _new(self) -> int:
        self._count += 1
        return self._count


def _moves(call: Call) -> bool:
    """Whether the first result of an operation holds only numbers of its first argument, or 0."""
    arguments = call.arguments
    if call.operation == "constant_pad_nd":
        return bool(arguments["value"] == 0)
    if call.operation == "_to_copy":
        return arguments["dtype"] in (None, arguments["self"].dtype)
    return call.operation in _MOVING

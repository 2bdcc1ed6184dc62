"""Which candidate is active, as data: what compiled networks read instead of Python numbers.

A number would be part of the compiled program, so that each precision would compile one of its own.
Networks in eager mode read none of it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class Chosen(nn.Module):
    """Indices of what is active, a buffer of shape `(1,)` for each name.

    It is a child of the layer or norm whose choice it holds, and no part of the quantizers or
    copies that it chooses from: the views of a network share those, and each has its own precision.

    Args:
        names: Of the indices, which are 0 at first.
        device: Where they are.
    """

    # Of a layer.
    weight: Tensor
    input: Tensor
    # Of a norm.
    row: Tensor
    statistics: Tensor

    def __init__(self, *names: str, device: torch.device) -> None:
        super().__init__()
        for name in names:
            index = torch.zeros(1, dtype=torch.int64, device=device)
            self.register_buffer(name, index, persistent=False)

    def choose(self, **indices: int) -> None:
        """Set these indices, by name."""
        for name, index in indices.items():
            # Past nn.Module.__getattr__, which is slow.
            self._buffers[name].fill_(index)  # type: ignore[union-attr]


_Buffers = dict[str, Tensor | None]

_STRIDE = 2
"""Numbers for each index: compilers expect tensors to begin at multiples of 16 bytes."""


@dataclass(frozen=True, eq=False)
class _Block:
    """The indices on one device.

    Attributes:
        memory: All of them, `_STRIDE` numbers each.
        positions: Where each is among all indices of the network.
    """

    memory: Tensor
    positions: list[int]

    def write(self, indices: list[int]) -> None:
        """Set them to these, of all indices of the network."""
        if len(self.positions) < len(indices):
            indices = [indices[position] for position in self.positions]
        numbers = [0] * (_STRIDE * len(indices))
        numbers[::_STRIDE] = indices
        # Some times as fast as torch.tensor.
        written = torch.frombuffer(array("q", numbers), dtype=torch.int64)
        if self.memory.is_cuda:
            # torch leaves pinned memory alone until the copy is done, so nobody has to wait for it.
            written = written.pin_memory()
        self.memory.copy_(written, non_blocking=self.memory.is_cuda)


class ChosenTable:
    """All indices of a network: on each device one memory, of which every buffer is a view.

    So another precision takes one copy. Buffers that were moved or copied since have memory of
    their own; the next `write` notices.

    Args:
        chosen: Where the indices are, in the order in which `write` takes them.
    """

    def __init__(self, chosen: Iterable[Chosen]) -> None:
        self._places: list[tuple[_Buffers, str]] = []
        for module in chosen:
            buffers = module._buffers  # noqa: SLF001 (past nn.Module.__getattr__, which is slow)
            self._places += [(buffers, name) for name in buffers]
        self._blocks: list[_Block] = []
        # Each place with the view that was put there, and its address.
        self._views: list[tuple[_Buffers, str, Tensor, int]] = []

    def write(self, indices: list[int]) -> None:
        """Set all indices."""
        if not self._is_in_place():
            self._put_in_place()
        for block in self._blocks:
            block.write(indices)
        if len(self._views) < len(indices):
            self._write_others(indices)

    def _is_in_place(self) -> bool:
        if len(self._views) != len(self._places):
            return False
        for buffers, name, view, address in self._views:
            # The address too, since FSDP moves a tensor by its `data`.
            if buffers[name] is not view or view.data_ptr() != address:
                return False
        return True

    def _put_in_place(self) -> None:
        positions: dict[torch.device, list[int]] = {}
        for position, (buffers, name) in enumerate(self._places):
            buffer = buffers[name]
            # Of other classes (DTensor) each has to be written by itself.
            if type(buffer) is Tensor:
                positions.setdefault(buffer.device, []).append(position)
        self._blocks, self._views = [], []
        # Outside inference mode, so that the memory can be written in any mode.
        with torch.inference_mode(mode=False):
            for device, on_device in positions.items():
                memory = torch.zeros(_STRIDE * len(on_device), dtype=torch.int64, device=device)
                self._blocks.append(_Block(memory, on_device))
                for number, position in enumerate(on_device):
                    buffers, name = self._places[position]
                    start = _STRIDE * number
                    buffers[name] = memory[start : start + 1]
        if sum(map(len, positions.values())) == len(self._places):
            for buffers, name in self._places:
                view: Tensor = buffers[name]  # type: ignore[assignment]
                self._views.append((buffers, name, view, view.data_ptr()))

    def _write_others(self, indices: list[int]) -> None:
        for (buffers, name), index in zip(self._places, indices, strict=True):
            buffer = buffers[name]
            if buffer is not None and type(buffer) is not Tensor:
                buffer.fill_(index)

"""Running a network's forward for what it shows, with nothing of what it leaves behind.

A forward pass may remember anything: the last feature map, a grid for the last size, a counter, in
attributes, buffers, lists, caches and global variables. After the block all of this is what it was
before. What is reached from the network, and how each kind of object is restored, is in
`memory.py` and `notes.py`; here are the values of tensors and the states of random generators.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from anyprec.network.calls import EXPOSING, Call, reference_to, storage_of
from anyprec.network.memory import Memory
from anyprec.nn.modes import FunctionMode, OperationMode


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Run a block that may call `model`, and then restore whatever that changed.

    That is every object within reach of the network and of the functions that it runs, bit for bit,
    and the global random generators, also after an exception. Out of reach are the insides of
    extensions, and what is not in this process.

    Parameters are copied only if something writes to them.
    """
    memory = Memory(model)
    tensors = [*memory.tensors, *model.parameters(), *model.buffers()]
    values = _Values(tensors)
    with ExitStack() as restored:
        # In this order: a tensor gets its memory back before what that holds.
        restored.callback(values.restore)
        restored.callback(memory.restore)
        restored.enter_context(_unchanged_random_states(tensors))
        with _ExposureGuard(values), _WriteGuard(values):
            yield


class _Values:
    """The numbers in the storages of some tensors, copied just before they are written to."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._storages: dict[StorageWeakRef, torch.UntypedStorage] = {}
        self._copies: dict[StorageWeakRef, torch.UntypedStorage] = {}
        for tensor in tensors:
            storage = _memory_of(tensor)
            if storage is not None:
                self._storages[reference_to(storage)] = storage

    def save(self, tensor: Tensor) -> None:
        """Copy the storage of `tensor`, if it is one of these and has not been copied yet."""
        storage = _memory_of(tensor)
        if storage is None:
            return
        reference = reference_to(storage)
        if reference in self._storages and reference not in self._copies:
            self._copies[reference] = storage.clone()

    def restore(self) -> None:
        """Write back what was copied."""
        for reference, copy in self._copies.items():
            storage = self._storages[reference]
            if storage.nbytes() != copy.nbytes():
                storage.resize_(copy.nbytes())
            storage.copy_(copy)


class _WriteGuard(OperationMode):
    """Copies what an operation is about to write to."""

    def __init__(self, values: _Values) -> None:
        super().__init__()
        self._values = values

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        for tensor in Call(func, args, kwargs).written():
            self._values.save(tensor)
        return func(*args, **kwargs)


class _ExposureGuard(FunctionMode):
    """Copies what a function gives to code outside of torch (`numpy()`), which may write to it."""

    def __init__(self, values: _Values) -> None:
        super().__init__()
        self._values = values

    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in EXPOSING and isinstance(args[0], Tensor):
            self._values.save(args[0])
        return func(*args, **kwargs)


@contextmanager
def _unchanged_random_states(tensors: list[Tensor]) -> Iterator[None]:
    """Restore the global generators of torch, Python and NumPy."""
    devices = {tensor.device for tensor in tensors if tensor.is_cuda}
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(sorted(devices, key=str)):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _memory_of(tensor: Tensor) -> torch.UntypedStorage | None:
    """Its storage; None if that holds no values (on the meta device), or there is none."""
    storage = storage_of(tensor)
    return None if storage is None or storage.device.type == "meta" else storage

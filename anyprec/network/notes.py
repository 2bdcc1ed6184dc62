"""How the content of each kind of object is noted, and restored later.

Every function here takes an object, notes what it holds and returns what gives it that back. Which
objects are noted is the matter of `memory.py`, and the numbers in tensors that of `preserving.py`.
"""

from __future__ import annotations

import array
import functools
import random
import sys
import sysconfig
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from types import CellType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anyprec.network.calls import same_storage

Restore = Callable[[], None]

MISSING = object()
"""Stands for an attribute or a variable that does not exist."""

_INSTALLED = tuple(
    sysconfig.get_paths()[kind] for kind in ("stdlib", "platstdlib", "purelib", "platlib")
)
"""Folders of installed packages."""


def note_dict(visited: dict[Any, Any]) -> Restore:
    """Note the entries of a dictionary, in their order."""
    # A derived class may do other things than keep what it is given.
    kind = OrderedDict if isinstance(visited, OrderedDict) else dict
    content = list(kind.items(visited))

    def restore() -> None:
        if not _same_pairs(content, kind.items(visited)):
            kind.clear(visited)
            for key, value in content:
                kind.__setitem__(visited, key, value)

    return restore


def _note_list(visited: list[Any]) -> Restore:
    content = list(visited)
    return lambda: list.__setitem__(visited, slice(None), content)


def _note_set(visited: set[Any]) -> Restore:
    content = set(visited)

    def restore() -> None:
        set.clear(visited)
        set.update(visited, content)

    return restore


def _note_deque(visited: deque[Any]) -> Restore:
    content = list(visited)

    def restore() -> None:
        deque.clear(visited)
        deque.extend(visited, content)

    return restore


def _note_numbers(visited: Any) -> Restore:
    content = visited[:]
    return lambda: visited.__setitem__(slice(None), content)


def _note_ndarray(visited: np.ndarray[Any, Any]) -> Restore:
    content = visited.copy()

    def restore() -> None:
        if visited.flags.writeable:
            visited[...] = content

    return restore


def _note_cell(visited: CellType) -> Restore:
    content = content_of(visited)

    def restore() -> None:
        if content is not MISSING:
            visited.cell_contents = content
        elif content_of(visited) is not MISSING:
            del visited.cell_contents

    return restore


def _note_tensor(visited: Tensor) -> Restore:
    # Past torch functions: a parameter without a shape yet would refuse.
    with torch._C.DisableTorchFunction():  # noqa: SLF001 (torch has no public name for it)
        layout, requires_grad = visited.detach(), visited.requires_grad

    def restore() -> None:
        if not _same_layout(visited, layout):
            visited.data = layout
        if visited.requires_grad != requires_grad and visited.is_leaf:
            visited.requires_grad_(requires_grad)

    return restore


def _note_type(visited: type) -> Restore:
    if not is_of_user(visited.__module__):
        return _nothing
    content = dict(vars(visited))

    def restore() -> None:
        present = dict(vars(visited))
        for name, value in content.items():
            if present.pop(name, MISSING) is not value:
                type.__setattr__(visited, name, value)
        for name in present:
            type.__delattr__(visited, name)

    return restore


def _note_cache(visited: Any) -> Restore:
    misses = visited.cache_info().misses

    def restore() -> None:
        # What it has learned since cannot be told from what it knew; it will learn that again.
        if visited.cache_info().misses != misses:
            visited.cache_clear()

    return restore


def _note_torch_generator(visited: torch.Generator) -> Restore:
    state = visited.get_state()

    def restore() -> None:
        visited.set_state(state)

    return restore


def _note_python_generator(visited: random.Random) -> Restore:
    state = visited.getstate()
    return lambda: visited.setstate(state)


def _note_numpy_generator(visited: np.random.Generator) -> Restore:
    state = visited.bit_generator.state
    return lambda: setattr(visited.bit_generator, "state", state)


def _note_numpy_state(visited: np.random.RandomState) -> Restore:
    state = visited.get_state()
    return lambda: visited.set_state(state)


def note_class(visited: Any) -> Restore:
    """Note the class of an object."""
    kind = type(visited)

    def restore() -> None:
        # A module or parameter that is initialised by its first input becomes another class.
        if type(visited) is not kind:
            visited.__class__ = kind

    return restore


def note_slot(visited: Any, slot: str, value: object) -> Restore:
    """Note that a slot of an object holds this value, or `MISSING`."""

    def restore() -> None:
        if getattr(visited, slot, MISSING) is value:
            return
        if value is MISSING:
            object.__delattr__(visited, slot)
        else:
            object.__setattr__(visited, slot, value)

    return restore


def note_names(namespace: dict[str, Any], names: Iterable[str]) -> Restore:
    """Note some variables of a namespace; those that it lacks are removed again."""
    content = {name: namespace.get(name, MISSING) for name in names}

    def restore() -> None:
        for name, value in content.items():
            if value is not MISSING:
                namespace[name] = value
            else:
                namespace.pop(name, None)

    return restore


def _nothing() -> None:
    pass


NOTES: tuple[tuple[Any, Callable[[Any], Restore]], ...] = (
    (Tensor, _note_tensor),
    (dict, note_dict),
    (list, _note_list),
    (set, _note_set),
    (deque, _note_deque),
    ((bytearray, array.array), _note_numbers),
    (np.ndarray, _note_ndarray),
    (CellType, _note_cell),
    (type, _note_type),
    (functools._lru_cache_wrapper, _note_cache),  # noqa: SLF001 (the type has no other name)
    (torch.Generator, _note_torch_generator),
    (random.Random, _note_python_generator),
    (np.random.Generator, _note_numpy_generator),
    (np.random.RandomState, _note_numpy_state),
)
"""How the content of each kind of object is noted."""


def content_of(cell: CellType) -> object:
    """What a cell of a closure holds, or `MISSING`."""
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return MISSING


def _same_pairs(before: list[tuple[Any, Any]], after: Iterable[tuple[Any, Any]]) -> bool:
    pairs = list(after)
    if len(pairs) != len(before):
        return False
    for (old_key, old_value), (key, value) in zip(before, pairs, strict=True):
        if old_key is not key or old_value is not value:
            return False
    return True


def _same_layout(tensor: Tensor, layout: Tensor) -> bool:
    """Whether two tensors are the same part of the same storage."""
    # By the methods of plain tensors: a parameter without a shape yet refuses the question.
    with torch._C.DisableTorchFunction():  # noqa: SLF001 (torch has no public name for it)
        if tensor.layout != torch.strided or tensor.dtype != layout.dtype:
            return False
        for question in (Tensor.size, Tensor.stride, Tensor.storage_offset):
            if question(tensor) != question(layout):
                return False
    return same_storage(tensor, layout)


def is_of_user(module: str | None) -> bool:
    """Whether a module is neither built in nor of an installed package."""
    package = str(module).partition(".")[0]
    if package in sys.builtin_module_names or package in ("builtins", "anyprec"):
        return False
    # Interactive code and `__main__` may have no file.
    file = getattr(sys.modules.get(str(module)), "__file__", None)
    return file is None or not file.startswith(_INSTALLED)

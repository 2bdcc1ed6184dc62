"""Everything within reach of a network that its forward may change, and how to restore it.

A walk over objects: modules, containers, plain objects, their classes, the functions of all these,
and the global variables that the functions name. The content of each is noted as it is; what it
refers to is visited too. Not followed are the insides of torch, of the standard library and of
extensions, and the classes and global variables of installed packages. The numbers in tensors are
the matter of `preserving.py`.
"""

from __future__ import annotations

import array
import functools
import random
import sys
import sysconfig
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

Restore = Callable[[], None]

_ATOMS = (
    type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device,
    torch.memory_format,
)  # fmt: skip
"""Types of objects that never change."""

_HOLDERS = {"argparse", "collections", "types", "weakref", "_weakrefset"}
"""Modules of the standard library whose objects hold what they are given."""

_OPAQUE_PACKAGES = {"torch", "numpy", *sys.stdlib_module_names} - _HOLDERS
"""Packages whose objects keep nothing of a network's, beside modules, tensors and containers."""

_INSTALLED = tuple(
    sysconfig.get_paths()[kind] for kind in ("stdlib", "platstdlib", "purelib", "platlib")
)
"""Folders of installed packages."""

_MISSING = object()


class Memory:
    """The present content of all objects within reach of a network.

    Args:
        model: The network.

    Attributes:
        tensors: All tensors among them.
    """

    def __init__(self, model: nn.Module) -> None:
        self.tensors: list[Tensor] = []
        self._restores: list[Restore] = []
        # Objects by id, held so that no other one gets its id.
        visited: dict[int, object] = {}
        waiting: list[object] = [model]
        while waiting:
            candidate = waiting.pop()
            if not isinstance(candidate, _ATOMS) and id(candidate) not in visited:
                visited[id(candidate)] = candidate
                waiting.extend(self._visit(candidate))

    def restore(self) -> None:
        """Give every object the content that it had."""
        for restore in self._restores:
            restore()

    def _visit(self, visited: Any) -> Iterator[object]:
        """Note the content of an object; yields the objects that it refers to."""
        if isinstance(visited, Tensor):
            self.tensors.append(visited)
        for kinds, note in _NOTES:
            if isinstance(visited, kinds):
                self._restores.append(note(visited))
                break
        for kinds, referred in _REFERENCES:
            if isinstance(visited, kinds):
                yield from referred(visited)
                break
        if isinstance(visited, FunctionType):
            for namespace, names in _namespaces(visited):
                self._restores.append(_note_names(namespace, names))
                yield from (namespace[name] for name in names if name in namespace)
        elif not isinstance(visited, type):
            yield from self._visit_attributes(visited)

    def _visit_attributes(self, visited: Any) -> Iterator[object]:
        """The same for what a plain object has in attributes, and for its class."""
        kind = type(visited)
        is_opaque = kind.__module__.partition(".")[0] in _OPAQUE_PACKAGES
        if is_opaque and not isinstance(visited, (nn.Module, Tensor)):
            return
        self._restores.append(_note_class(visited))
        yield kind
        attributes = getattr(visited, "__dict__", None)
        if isinstance(attributes, dict):
            self._restores.append(_note_dict(attributes))
            yield from attributes.values()
        for slot in _slots_of(kind):
            value = getattr(visited, slot, _MISSING)
            self._restores.append(_note_slot(visited, slot, value))
            yield value


# --- What objects hold: each function notes it and returns what restores it


def _note_dict(visited: dict[Any, Any]) -> Restore:
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
    content = _content_of(visited)

    def restore() -> None:
        if content is not _MISSING:
            visited.cell_contents = content
        elif _content_of(visited) is not _MISSING:
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
    if not _is_of_user(visited.__module__):
        return _nothing
    content = dict(vars(visited))

    def restore() -> None:
        present = dict(vars(visited))
        for name, value in content.items():
            if present.pop(name, _MISSING) is not value:
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
    return lambda: visited.set_state(state) and None


def _note_python_generator(visited: random.Random) -> Restore:
    state = visited.getstate()
    return lambda: visited.setstate(state)


def _note_numpy_generator(visited: np.random.Generator) -> Restore:
    state = visited.bit_generator.state
    return lambda: setattr(visited.bit_generator, "state", state)


def _note_numpy_state(visited: np.random.RandomState) -> Restore:
    state = visited.get_state()
    return lambda: visited.set_state(state)


def _note_class(visited: Any) -> Restore:
    kind = type(visited)

    def restore() -> None:
        # A module or parameter that is initialised by its first input becomes another class.
        if type(visited) is not kind:
            visited.__class__ = kind

    return restore


def _note_slot(visited: Any, slot: str, value: object) -> Restore:
    def restore() -> None:
        if getattr(visited, slot, _MISSING) is value:
            return
        if value is _MISSING:
            object.__delattr__(visited, slot)
        else:
            object.__setattr__(visited, slot, value)

    return restore


def _note_names(namespace: dict[str, Any], names: Iterable[str]) -> Restore:
    content = {name: namespace.get(name, _MISSING) for name in names}

    def restore() -> None:
        for name, value in content.items():
            if value is not _MISSING:
                namespace[name] = value
            else:
                namespace.pop(name, None)

    return restore


def _nothing() -> None:
    pass


_NOTES: tuple[tuple[Any, Callable[[Any], Restore]], ...] = (
    (Tensor, _note_tensor),
    (dict, _note_dict),
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


# --- What objects refer to


def _of_type(visited: type) -> Iterator[object]:
    if _is_of_user(visited.__module__):
        yield from vars(visited).values()
        yield from visited.__bases__


def _of_function(visited: FunctionType) -> Iterator[object]:
    yield visited.__defaults__
    yield visited.__kwdefaults__
    yield visited.__closure__
    yield visited.__dict__


_REFERENCES: tuple[tuple[Any, Callable[[Any], Iterable[object]]], ...] = (
    (dict, lambda visited: [*visited.keys(), *visited.values()]),
    ((list, tuple, set, frozenset, deque), list),
    (CellType, lambda visited: [_content_of(visited)]),
    (type, _of_type),
    (FunctionType, _of_function),
    (MethodType, lambda visited: [visited.__self__, visited.__func__]),
    (
        functools.partial,
        lambda visited: [visited.func, visited.args, visited.keywords],
    ),
    ((staticmethod, classmethod), lambda visited: [visited.__func__]),
    (property, lambda visited: [visited.fget, visited.fset]),
    (functools._lru_cache_wrapper, lambda visited: [visited.__wrapped__]),  # noqa: SLF001
)
"""What each kind of object refers to, beside its attributes."""


def _namespaces(function: FunctionType) -> Iterator[tuple[dict[str, Any], set[str]]]:
    """Where a function finds global variables, and the names that it may look up there."""
    if not _is_of_user(function.__module__):
        return
    names = set(_names_in(function.__code__))
    yield function.__globals__, names
    for name in names:
        value = function.__globals__.get(name)
        if isinstance(value, ModuleType) and _is_of_user(value.__name__):
            yield vars(value), names


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)


def _slots_of(kind: type) -> Iterator[str]:
    for base in kind.__mro__:
        slots = vars(base).get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            if slot not in ("__dict__", "__weakref__"):
                yield slot


def _is_of_user(module: str | None) -> bool:
    """Whether a module is neither built in nor of an installed package."""
    package = str(module).partition(".")[0]
    if package in sys.builtin_module_names or package in ("builtins", "anyprec"):
        return False
    # Interactive code and `__main__` may have no file.
    file = getattr(sys.modules.get(str(module)), "__file__", None)
    return file is None or not file.startswith(_INSTALLED)


def _content_of(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return _MISSING


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
        return StorageWeakRef(tensor.untyped_storage()) == StorageWeakRef(layout.untyped_storage())

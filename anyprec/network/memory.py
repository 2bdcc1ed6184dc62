"""Everything within reach of a network that its forward may change, and how to restore it.

A walk over objects: modules, containers, plain objects, their classes, the functions of all these,
and the global variables that the functions name. The content of each is noted as it is; what it
refers to is visited too. Not followed are the insides of torch, of the standard library and of
extensions, and the classes and global variables of installed packages. How the content of each
kind of object is noted is in `notes.py`; the numbers in tensors are the matter of `preserving.py`.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from anyprec.network.notes import (
    MISSING,
    NOTES,
    Restore,
    content_of,
    is_of_user,
    note_class,
    note_dict,
    note_names,
    note_slot,
)

_ATOMS = {
    type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device,
    torch.memory_format,
}  # fmt: skip
"""Types of objects that never change."""

_HOLDERS = {"argparse", "collections", "types", "weakref", "_weakrefset"}
"""Modules of the standard library whose objects hold what they are given."""

_OPAQUE_PACKAGES = {"torch", "numpy", *sys.stdlib_module_names} - _HOLDERS
"""Packages whose objects keep nothing of a network's, beside modules, tensors and containers."""


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
        # Most dictionaries of a network are those of hooks that it does not have.
        self._empty: list[dict[Any, Any]] = []
        self._kinds: dict[type, _Kind] = {}
        # Objects by id, held so that no other one gets its id.
        visited: dict[int, object] = {}
        waiting: list[object] = [model]
        while waiting:
            candidate = waiting.pop()
            if type(candidate) in _ATOMS or id(candidate) in visited:
                continue
            visited[id(candidate)] = candidate
            if type(candidate) in (dict, OrderedDict) and not candidate:
                self._empty.append(candidate)  # type: ignore[arg-type]
            else:
                waiting.extend(self._visit(candidate))

    def restore(self) -> None:
        """Give every object the content that it had."""
        for restore in self._restores:
            restore()
        for emptied in self._empty:
            emptied.clear()

    def _visit(self, visited: Any) -> Iterator[object]:
        """Note the content of an object; yields the objects that it refers to."""
        kind = self._kinds.get(type(visited))
        if kind is None:
            kind = self._kinds[type(visited)] = _Kind.of(type(visited))
        if kind.is_tensor:
            self.tensors.append(visited)
        if kind.note is not None:
            self._restores.append(kind.note(visited))
        if kind.references is not None:
            yield from kind.references(visited)
        if isinstance(visited, FunctionType):
            yield from self._visit_globals(visited)
        elif kind.has_attributes:
            yield from self._visit_attributes(visited, kind)

    def _visit_globals(self, function: FunctionType) -> Iterator[object]:
        """The same for the global variables that a function names."""
        for namespace, names in _namespaces(function):
            self._restores.append(note_names(namespace, names))
            for name in names:
                yield namespace.get(name)

    def _visit_attributes(self, visited: Any, kind: _Kind) -> Iterator[object]:
        """The same for what a plain object has in attributes, and for its class."""
        self._restores.append(note_class(visited))
        yield type(visited)
        attributes = getattr(visited, "__dict__", None)
        if isinstance(attributes, dict):
            self._restores.append(note_dict(attributes))
            yield from attributes.values()
        for slot in kind.slots:
            value = getattr(visited, slot, MISSING)
            self._restores.append(note_slot(visited, slot, value))
            yield value


@dataclass(frozen=True)
class _Kind:
    """How objects of one class are visited.

    Attributes:
        note: Notes what such an object holds.
        references: Yields what it refers to, beside its attributes.
        has_attributes: Whether its attributes and class are visited.
        slots: Attributes that stand in no dictionary.
        is_tensor: Whether it is a tensor.
    """

    note: Callable[[Any], Restore] | None
    references: Callable[[Any], Iterable[object]] | None
    has_attributes: bool
    slots: tuple[str, ...]
    is_tensor: bool

    @staticmethod
    def of(kind: type) -> _Kind:
        is_opaque = kind.__module__.partition(".")[0] in _OPAQUE_PACKAGES
        is_of_torch = issubclass(kind, (nn.Module, Tensor))
        return _Kind(
            note=_entry_for(kind, NOTES),
            references=_entry_for(kind, _REFERENCES),
            has_attributes=is_of_torch or not (is_opaque or issubclass(kind, type)),
            slots=tuple(_slots_of(kind)),
            is_tensor=issubclass(kind, Tensor),
        )


# --- What objects refer to


def _of_type(visited: type) -> Iterator[object]:
    if is_of_user(visited.__module__):
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
    (CellType, lambda visited: [content_of(visited)]),
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
    if not is_of_user(function.__module__):
        return
    names = set(_names_in(function.__code__))
    yield function.__globals__, names
    for name in names:
        value = function.__globals__.get(name)
        if isinstance(value, ModuleType) and is_of_user(value.__name__):
            yield vars(value), names


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)


def _entry_for(kind: type, table: Iterable[tuple[Any, Any]]) -> Any:
    """The first entry of a table for a base of this class, or None."""
    for bases, entry in table:
        if issubclass(kind, bases):
            return entry
    return None


def _slots_of(kind: type) -> Iterator[str]:
    for base in kind.__mro__:
        slots = vars(base).get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            # A subclass may have a property of this name, which computes what it gives.
            hidden = isinstance(inspect.getattr_static(kind, slot, None), property)
            if slot not in ("__dict__", "__weakref__") and not hidden:
                yield slot

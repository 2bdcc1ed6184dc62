"""Undoing a change of a network that failed half-way, whatever it had done by then.

Weights are not copied: this is for changes of classes, attributes and children.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def restored_on_error(model: nn.Module) -> Iterator[None]:
    """Make every module of `model` what it was, if the block fails; Ctrl-C is a failure, too."""
    states = [_ModuleState(module) for module in model.modules()]
    try:
        yield
    except BaseException:
        for state in states:
            state.restore()
        raise


class _ModuleState:
    """Class, attributes, parameters, buffers and children of one module."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._class: Any = type(module)
        self._attributes = dict(vars(module))
        self._tables: list[tuple[dict[str, Any], dict[str, Any]]] = []
        for table in (module._parameters, module._buffers, module._modules):  # noqa: SLF001
            self._tables.append((table, dict(table)))

    def restore(self) -> None:
        self._module.__class__ = self._class
        attributes = vars(self._module)
        attributes.clear()
        attributes.update(self._attributes)
        # The tables themselves stay: others may hold them.
        for table, entries in self._tables:
            table.clear()
            table.update(entries)

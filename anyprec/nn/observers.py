"""Callbacks that see values of a layer or norm as they pass, for the length of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from anyprec.nn.counting import uncounted

Observer = Callable[..., None]


class Observers:
    """The observers of one kind of value; any number can be active at the same time.

    A copy has none, since an observer belongs to the module that it was set on. The same holds
    after pickling.

    Example:
        >>> observers, values = Observers(), []
        >>> with observers.including(values.append):
        ...     observers.notify(1)
        >>> observers.notify(2)
        >>> values
        [1]
    """

    def __init__(self) -> None:
        self._active: list[Observer] = []

    def __bool__(self) -> bool:
        """Whether anybody observes."""
        return bool(self._active)

    @contextmanager
    def including(self, observer: Observer) -> Iterator[None]:
        """Call `observer` with every value in the block.

        It is removed on the way out, also after an exception.
        """
        self._active.append(observer)
        try:
            yield
        finally:
            self._active.remove(observer)

    def notify(self, *values: Any) -> None:
        """Call every observer with these values, in the order in which they came."""
        if not self._active:
            return
        with uncounted():
            for observer in self._active:
                observer(*values)

    def __reduce__(self) -> tuple[type[Observers], tuple[()]]:
        """Copy and pickle as one without observers."""
        return Observers, ()

"""Reading the fields of an untrusted JSON document: each with its type and range, and a message that names it."""

from __future__ import annotations

import math
import reprlib
from typing import Any

from anyprec.bits import MAX_BITS, MIN_BITS
from anyprec.errors import CheckpointError

_MAX_DEPTH = 16
_MAX_INTEGER = 2**63 - 1


class Fields:
    """A JSON object whose fields are taken with their type."""

    def __init__(self, raw: Any, where: str) -> None:
        if not isinstance(raw, dict):
            msg = f"the checkpoint's {where} is not a JSON object"
            raise CheckpointError(msg)
        self._raw = raw
        self._where = where

    def take(self, name: str, *kinds: type) -> Any:
        """The value of `name`, which must be of one of `kinds`."""
        if name not in self._raw:
            msg = f"the checkpoint's {self._where} has no field {name!r}"
            raise CheckpointError(msg)
        value = self._raw[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            expected = " or ".join(kind.__name__ for kind in kinds)
            msg = f"the checkpoint's {self._where}.{name} is {reprlib.repr(value)}, expected {expected}"
            raise CheckpointError(msg)
        return value

    def has(self, name: str) -> bool:
        """Whether the object has this field."""
        return name in self._raw

    def take_or(self, name: str, *kinds: type, default: Any) -> Any:
        """As `take`, of a field that older files of this format lack."""
        return self.take(name, *kinds) if name in self._raw else default

    def items(self, name: str, kind: type) -> tuple[Any, ...]:
        """A list whose entries are all of one kind."""
        entries = self.take(name, list)
        if not all(isinstance(entry, kind) and not isinstance(entry, bool) for entry in entries):
            msg = f"the checkpoint's {self._where}.{name} is {reprlib.repr(entries)}, expected a list of {kind.__name__}"
            raise CheckpointError(msg)
        return tuple(entries)

    def count(self, name: str) -> int:
        """A number that cannot be negative."""
        value: int = self.take(name, int)
        if value < 0:
            msg = f"the checkpoint's {self._where}.{name} is {value}, expected 0 or more"
            raise CheckpointError(msg)
        return value

    def bit_width(self, name: str) -> int:
        """A bit-width."""
        value: int = self.take(name, int)
        if not MIN_BITS <= value <= MAX_BITS:
            msg = f"the checkpoint's {self._where}.{name} is {value}, expected {MIN_BITS} to {MAX_BITS}"
            raise CheckpointError(msg)
        return value

    def bit_widths(self, name: str) -> tuple[int, ...]:
        """A list of candidate bit-widths, ascending."""
        widths = self.items(name, int)
        if (
            not widths
            or list(widths) != sorted(set(widths))
            or not all(MIN_BITS <= w <= MAX_BITS for w in widths)
        ):
            msg = f"the checkpoint's {self._where}.{name} is {reprlib.repr(widths)}, expected ascending bit-widths from "
            msg += f"{MIN_BITS} to {MAX_BITS}"
            raise CheckpointError(msg)
        return widths


def strings(raw: Any, where: str) -> dict[str, str]:
    """An object whose values are all strings."""
    if not isinstance(raw, dict) or not all(isinstance(value, str) for value in raw.values()):
        msg = f"the checkpoint's {where} is not an object of strings"
        raise CheckpointError(msg)
    return raw


def is_count(value: Any) -> bool:
    """Whether it is an integer that is not negative."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def require_tame(raw: Any) -> None:
    """Refuse what JSON allows but neither a message nor another program could handle: depth and endless numbers."""
    level = [raw]
    for _ in range(_MAX_DEPTH):
        numbers = [value for value in level if isinstance(value, (int, float))]
        if not all(math.isfinite(number) and abs(number) <= _MAX_INTEGER for number in numbers):
            msg = "the checkpoint's metadata holds a number that is not finite, or of more than 63 bits"
            raise CheckpointError(msg)
        level = [
            inner
            for value in level
            if isinstance(value, (dict, list))
            for inner in (value.values() if isinstance(value, dict) else value)
        ]
        if not level:
            return
    msg = f"the checkpoint's metadata is nested deeper than {_MAX_DEPTH} levels"
    raise CheckpointError(msg)

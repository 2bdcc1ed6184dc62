"""Whether a class of modules keeps what its forward reads in plain attributes."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn


@functools.cache
def keeps_attributes(kind: Any, names: tuple[str, ...]) -> bool:
    """Whether objects of a class keep these attributes, and compute none of them.

    Then a forward that reads them reads the same of an object with the same attributes.
    """
    if any(hasattr(kind, name) for name in names):
        return False
    if kind.__getattribute__ is not object.__getattribute__:
        return False
    return kind.__getattr__ is nn.Module.__getattr__

"""Counting the calls of torch's functions in a module's forward, and what is not to be counted.

A call has no name. It is known by what it calls and by how often that was called before, inside one
call of a module. So all that our own code computes there, and what belongs to another module, must
be left out: see `uncounted`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from anyprec.nn.operators import OPERATORS
from anyprec.nn.products import PRODUCTS

SUMS = frozenset({"add"})
"""Names of functions that add two tensors, here and below without the marks of their form."""

POOLINGS = frozenset(
    {
        "avg_pool1d", "avg_pool2d", "avg_pool3d", "mean",
        "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
    }
)  # fmt: skip
"""Functions that average over space."""

CLAMPS = frozenset({"relu", "relu6", "hardtanh", "clamp", "clip", "clamp_min", "clamp_max"})
"""Functions that limit each number, and change no other."""

NORM = "batch_norm"

_ARITHMETIC = {"iadd": "add", "radd": "add", "rmatmul": "matmul"}
"""The forms that Python's operators have."""


class CountingMode(TorchFunctionMode):
    """A mode that counts calls, unless it is told not to.

    Attributes:
        pauses: How many reasons there are not to count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pauses = 0


class uncounted:  # noqa: N801 (used like a function)
    """In the block, no counting mode that was entered before counts."""

    _modes: list[CountingMode]

    def __enter__(self) -> None:
        # torch has no public name for the modes that are active.
        modes = _get_current_function_mode_stack()
        self._modes = [mode for mode in modes if isinstance(mode, CountingMode)]
        for mode in self._modes:
            mode.pauses += 1

    def __exit__(self, *_error: object) -> None:
        for mode in self._modes:
            mode.pauses -= 1


def counted_name(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any] | None
) -> str | None:
    """What a call is counted as: one name for all forms of a function; None if it is not counted.

    `torch.relu_`, `F.relu` and `Tensor.relu` are `"relu"`. Sums are counted where both summands are
    real tensors: a norm counts its batches in training mode alone.
    """
    name = str(getattr(func, "__name__", "")).partition(".")[0].strip("_")
    name = _ARITHMETIC.get(name, name)
    if name not in _COUNTED:
        return None
    if name in SUMS and not _are_two_real((*args, *(kwargs or {}).values())):
        return None
    return name


def _are_two_real(summands: tuple[Any, ...]) -> bool:
    number = 0
    for summand in summands:
        if isinstance(summand, Tensor) and summand.is_floating_point():
            number += 1
    return number == 2


def _names_of_multiplications() -> frozenset[str]:
    names = set()
    for func in (*OPERATORS, *PRODUCTS):
        name = str(getattr(func, "__name__", "")).partition(".")[0].strip("_")
        names.add(_ARITHMETIC.get(name, name))
    return frozenset(names)


_COUNTED = SUMS | POOLINGS | CLAMPS | {NORM, "deform_conv2d"} | _names_of_multiplications()

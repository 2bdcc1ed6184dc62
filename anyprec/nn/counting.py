"""Counting the calls of torch's functions in a module's forward, and what is not to be counted.

A call has no name. It is known by what it calls and by how often that was called before, inside one
call of a module. So all that our own code computes there, and what belongs to another module, must
be left out: see `uncounted`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack

from anyprec.nn.modes import FunctionMode
from anyprec.nn.operators import OPERATORS, aten_forms
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


class CountingMode(FunctionMode):
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


def run_body(
    mode: FunctionMode,
    body: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Run a function operator by operator, seen by `mode` alone: to others it is one call."""
    with uncounted():
        return _run_under(mode, body, args, kwargs)


def _run_under(
    mode: FunctionMode,
    body: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    # A function of its own, since the compiler takes no block inside another one.
    with mode:
        return body(*args, **kwargs)


def counted_name(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any] | None
) -> str | None:
    """What a call is counted as: one name for all forms of a function; None if it is not counted.

    `torch.relu_`, `F.relu` and `Tensor.relu` are `"relu"`. Sums are counted where both summands are
    real tensors: a norm counts its batches in training mode alone.
    """
    name = _NAMES.get(func)
    if name is not None and name in SUMS and not _are_two_real((*args, *(kwargs or {}).values())):
        return None
    return name


def _are_two_real(summands: tuple[Any, ...]) -> bool:
    number = 0
    for summand in summands:
        if isinstance(summand, Tensor) and summand.is_floating_point():
            number += 1
    return number == 2


def _names() -> dict[Callable[..., Any], str]:
    """What each form of a counted function is counted as."""
    names: dict[Callable[..., Any], str] = {}
    for name in (*SUMS, *POOLINGS, *CLAMPS, NORM):
        for holder in (torch, F, Tensor):
            for attribute in (name, f"{name}_"):
                form = getattr(holder, attribute, None)
                if form is not None:
                    names[form] = name
        for form in (*aten_forms(name), *aten_forms(f"{name}_")):
            names[form] = name
    for form in (Tensor.__add__, Tensor.__radd__, Tensor.__iadd__, operator.add, operator.iadd):
        names[form] = "add"
    for func in (*OPERATORS, *PRODUCTS):
        names[func] = str(func.__name__).partition(".")[0].strip("_").replace("rmatmul", "matmul")
    return names


_NAMES = _names()

"""Counts what a network asks of its device: launches of kernels, and waits for a result.

No accelerator is needed. On the meta device a network runs the branch that accelerators run, and
nothing is computed. There is no value that could be read: so whatever reads one is seen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ALLOCATIONS = frozenset(
    {
        "alias", "detach", "empty", "empty_like", "empty_permuted", "empty_strided",
        "lift_fresh", "new_empty", "new_empty_strided", "_local_scalar_dense",
    }
)  # fmt: skip
"""Operators that launch nothing: they allocate, or give another object for the same memory."""

UNMARKED_VIEWS = frozenset({"_reshape_alias", "_unsafe_view", "as_strided"})
"""Views whose schema does not say so."""

READS = frozenset({"_local_scalar_dense", "equal", "masked_select", "nonzero"})
"""Operators whose result, or its shape, depends on values: the host waits for the device."""


class Launches(TorchDispatchMode):
    """Counts the operators in its block that launch a kernel of a device, the CPU aside.

    Attributes:
        names: How often each was called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    @property
    def count(self) -> int:
        """All of them."""
        return self.names.total()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if launches(func) and any(map(_is_on_device, tree_leaves((args, kwargs, result)))):
            self.names[func.overloadpacket.__name__] += 1
        return result


class Waits(TorchDispatchMode):
    """Counts in its block how often the host waits for values of the meta device.

    Reading them is not an error as it would be otherwise: every value is 1. Copies to the CPU that
    are queued (`non_blocking`) are counted apart, since the device goes on meanwhile.

    Attributes:
        names: How often each operator made the host wait.
        queued: Copies to the CPU without a wait.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.queued = 0

    @property
    def count(self) -> int:
        """All of them."""
        return self.names.total()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        source = _first_on_meta(args)
        if source is None:
            return func(*args, **kwargs)
        if name == "_to_copy" and _is_cpu(kwargs.get("device")):
            return self._copy(source, **kwargs)
        if name == "copy_" and args[0].device.type == "cpu":
            self.names[name] += 1
            return args[0].fill_(1)
        if name not in READS:
            return func(*args, **kwargs)
        self.names[name] += 1
        answer = func(*map(_with_values, args), **kwargs)
        return answer.to("meta") if isinstance(answer, Tensor) else answer

    def _copy(self, source: Tensor, **kwargs: Any) -> Tensor:
        if kwargs.get("non_blocking"):
            self.queued += 1
        else:
            self.names["to_cpu"] += 1
        return torch.ones(source.shape, dtype=kwargs.get("dtype") or source.dtype)


@contextmanager
def accepting_meta() -> Iterator[None]:
    """Let calibration, search and `fit` take networks without values, which they refuse."""
    with mock.patch("anyprec.calibration.passes.require_values"):  # noqa: SIM117 (reads as a list)
        with mock.patch("anyprec.searching.measuring.evaluator.require_values"):
            with mock.patch("anyprec.training.fit.require_values"):
                yield


def launches(operator: Any) -> bool:
    """Whether an operator starts a kernel: it is no view, and does not only allocate."""
    name = operator.overloadpacket.__name__
    if name in ALLOCATIONS or name in UNMARKED_VIEWS:
        return False
    returns = [result.alias_info for result in operator._schema.returns]  # noqa: SLF001
    is_view = bool(returns) and all(alias is not None and not alias.is_write for alias in returns)
    return not is_view


def _is_on_device(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type != "cpu"


def _first_on_meta(args: tuple[Any, ...]) -> Tensor | None:
    for value in args:
        if isinstance(value, Tensor) and value.device.type == "meta":
            return value
    return None


def _is_cpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cpu"


def _with_values(value: Any) -> Any:
    if isinstance(value, Tensor) and value.device.type == "meta":
        return torch.ones(value.shape, dtype=value.dtype)
    return value

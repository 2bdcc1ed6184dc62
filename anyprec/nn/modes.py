"""Bases of what watches or changes calls in a block: of torch's functions, and of its operations.

torch hands a mode the types of the arguments, which none here needs, and perhaps no keyword
arguments. A derived class has one method, `run`, which stands in the place of the call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload  # torch has no public name for it
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class FunctionMode(TorchFunctionMode):
    """Gets the calls of torch's functions while it is active.

    torch switches it off for the length of a call: `with self` switches it on again.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a call of `func` with these arguments returns."""
        raise NotImplementedError


class OperationMode(TorchDispatchMode):
    """Gets the operations that reach torch's dispatcher while it is active."""

    # Operations of higher order (flex attention) would otherwise refuse to run under a mode.
    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # What a mode asks of tensors is no function that the network's own code calls.
        with torch._C.DisableTorchFunction():  # noqa: SLF001 (as torch's documentation has it)
            if torch.is_inference_mode_enabled() and isinstance(func, OpOverload):
                # Only there do operations arrive that consist of others.
                with self:
                    result = func.decompose(*args, **kwargs)
                if result is not NotImplemented:
                    return result
            return self.run(func, args, kwargs)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `func`, an operation, returns on these arguments."""
        raise NotImplementedError

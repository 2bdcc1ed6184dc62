"""Which modules are activations, which functions pass their input on.

Modules are tried out on the real line, which covers every subclass and every variant of timm, where
a list of classes would miss some.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from anyprec.network.preserving import left_as_it_was
from anyprec.nn.outputs import OutputQuantizer
from anyprec.runtime.modes import evaluating

_IDENTITY_FUNCTIONS = {"contiguous", "dropout", "clone", "float"}

_REAL_LINE = torch.linspace(-100.0, 100.0, 4001)


def function_is_identity(node: fx.Node) -> bool:
    """Whether a call of a function returns the values of its input."""
    target = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    return name in _IDENTITY_FUNCTIONS


def is_activation(module: nn.Module) -> bool:
    """Whether a module changes every number by itself, always in the same way, in eval mode."""
    values = _on_real_line(module)
    reversed_values = _on_real_line(module, reverse=True)
    if values is None or reversed_values is None:
        return False
    # Otherwise the value of a number depends on where it stands, or on its neighbours.
    elementwise = values.shape == _REAL_LINE.shape and torch.equal(values, reversed_values.flip(0))
    return elementwise and not torch.equal(values, _REAL_LINE)


def _has_parameters(module: nn.Module) -> bool:
    """Whether a module has any besides step sizes of what it returns."""
    for part in module.modules():
        if not isinstance(part, OutputQuantizer) and any(
            True for _ in part.parameters(recurse=False)
        ):
            return True
    return False


def _on_real_line(module: nn.Module, *, reverse: bool = False) -> Tensor | None:
    """What a module makes of the real line; None if it has parameters or takes no plain vector."""
    if _has_parameters(module):
        return None
    probe = _REAL_LINE.flip(0) if reverse else _REAL_LINE.clone()
    try:
        with torch.no_grad(), evaluating(module), left_as_it_was(module):
            result = module(probe)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError, AttributeError):
        return None
    return result if isinstance(result, Tensor) else None

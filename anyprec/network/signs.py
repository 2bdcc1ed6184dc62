"""Which modules and functions return no negative number, which keep signs, which are activations.

A quantizer of an input that cannot be negative needs no codes for negative numbers. Functions are
looked up in tables by name. Modules are tried out on the real line, which covers every subclass and
every variant of timm, where a list of classes would miss some.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx, nn

IDENTITY_MODULES = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.Dropout3d)
"""Modules that change nothing in eval mode."""

SIGN_KEEPING_MODULES = (
    *IDENTITY_MODULES,
    nn.Flatten,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d,
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.ChannelShuffle, nn.PixelShuffle, nn.PixelUnshuffle, nn.ZeroPad2d,
)  # fmt: skip
"""Modules that return no negative number if no input is one."""

_IDENTITY_FUNCTIONS = {"contiguous", "dropout", "clone", "float"}
_ARITHMETIC = {"add", "iadd", "mul", "imul", "add_", "mul_"}
_SIGN_KEEPING_FUNCTIONS = {
    *_IDENTITY_FUNCTIONS, *_ARITHMETIC,
    "flatten", "reshape", "view", "permute", "transpose", "unsqueeze", "squeeze", "expand",
    "repeat", "roll", "cat", "stack", "chunk", "split", "getitem", "unbind", "flip", "narrow",
    "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "max_pool1d",
    "avg_pool1d", "boolean_dispatch", "mean", "sum", "amax", "max", "pad", "pad_same", "upsample",
}  # fmt: skip
_NONNEGATIVE_FUNCTIONS = {
    "relu", "relu_", "relu6", "sigmoid", "sigmoid_", "hardsigmoid", "softmax", "abs", "square",
    "exp", "softplus",
}  # fmt: skip
_CLAMPING_FUNCTIONS = {"clamp", "clamp_", "clip", "hardtanh"}

_REAL_LINE = torch.linspace(-100.0, 100.0, 4001)


def function_is_nonnegative(node: fx.Node) -> bool:
    """Whether a call of a function never returns a negative number."""
    name = _function_name(node)
    if name in _CLAMPING_FUNCTIONS:
        return _lower_limit(node) >= 0
    return name in _NONNEGATIVE_FUNCTIONS


def function_keeps_signs(node: fx.Node) -> bool:
    """Whether a call of a function returns no negative number if no tensor in it is negative."""
    name = _function_name(node)
    if name in _ARITHMETIC and any(map(_is_negative_number, node.args)):
        return False
    return name in _SIGN_KEEPING_FUNCTIONS


def function_is_identity(node: fx.Node) -> bool:
    """Whether a call of a function returns the values of its input."""
    return _function_name(node) in _IDENTITY_FUNCTIONS


def module_is_nonnegative(module: nn.Module) -> bool:
    """Whether a module never returns a negative number."""
    values = _on_real_line(module)
    return values is not None and bool((values >= 0).all())


def is_activation(module: nn.Module) -> bool:
    """Whether a module changes every number by itself, always in the same way."""
    values = _on_real_line(module)
    reversed_values = _on_real_line(module, reverse=True)
    if values is None or reversed_values is None:
        return False
    # Otherwise the value of a number depends on where it stands, or on its neighbours.
    elementwise = values.shape == _REAL_LINE.shape and torch.equal(values, reversed_values.flip(0))
    return elementwise and not torch.equal(values, _REAL_LINE)


def _on_real_line(module: nn.Module, *, reverse: bool = False) -> Tensor | None:
    """What a module makes of the real line; None if it has parameters or takes no plain vector."""
    if any(True for _ in module.parameters()):
        return None
    probe = _REAL_LINE.flip(0) if reverse else _REAL_LINE.clone()
    try:
        with torch.no_grad():
            result = module(probe)
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
        return None
    return result if isinstance(result, Tensor) else None


def _function_name(node: fx.Node) -> str:
    target = node.target
    return target if isinstance(target, str) else getattr(target, "__name__", "")


def _is_negative_number(argument: object) -> bool:
    return isinstance(argument, (int, float)) and argument < 0


def _lower_limit(node: fx.Node) -> float:
    """The lower limit of a call of `clamp` or `hardtanh`."""
    limit = node.kwargs.get("min", node.kwargs.get("min_val"))
    if len(node.args) > 1:
        limit = node.args[1]
    if isinstance(limit, (int, float)):
        return float(limit)
    return -math.inf

"""Norms whose original forward runs on a stand-in with the values of a copy.

The stand-in is an object like the norm, whose parameters and statistics are those of a copy. The
norm itself stays as it is, so that several threads may use it. There are two kinds of such norms:

- Those whose forward computes with the module's attributes, and not by `F.batch_norm` alone, as
  `nn.SyncBatchNorm` does between processes, and norms that users write by hand (`standing_in`).
- Those whose forward is known to read the values, and to set nothing: to intercept its
  `F.batch_norm` would give the same and take longer (`reading_stand_in`).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from anyprec.errors import ConversionError, TrainingError
from anyprec.nn.attributes import keeps_attributes
from anyprec.nn.modes import FunctionMode
from anyprec.nn.observers import Observers

_Store = dict[str, Tensor | None]
"""Parameters or buffers of a module, by name."""

_PASSING_ON = {
    ("torch.nn.modules.batchnorm", "_BatchNorm.forward"),
    ("torch.nn.modules.batchnorm", "SyncBatchNorm.forward"),  # unless it synchronises
    ("timm.layers.norm_act", "BatchNormAct2d.forward"),
    ("timm.layers.norm_act", "SyncBatchNormAct.forward"),
}
"""Module and name of the forward methods that pass their values to `F.batch_norm`, no more."""

_READING = {
    ("torch.nn.modules.batchnorm", "_BatchNorm.forward"): True,
    ("timm.layers.norm_act", "BatchNormAct2d.forward"): False,
}
"""Those of them that read the norm's values, and change nothing but its count of batches: whether
they return what `F.batch_norm` does."""

_VALUES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")

_READ = (*_VALUES, "eps", "momentum", "training", "track_running_stats", "drop", "act")
"""What these forwards read of a norm."""

_INPUT_CHECKS = (
    nn.BatchNorm1d._check_input_dim,  # noqa: SLF001 (which `_BatchNorm.forward` calls)
    nn.BatchNorm2d._check_input_dim,  # noqa: SLF001
    nn.BatchNorm3d._check_input_dim,  # noqa: SLF001
)

_COMPUTED_FROM = frozenset({"weight_orig", "bias_orig", "weight_g"})
"""Parameters that torch's pruning and old weight_norm put in the place of weight and bias."""


def passes_values_on(kind: type[nn.Module]) -> bool:
    """Whether the forward of a class of norms passes its values to `F.batch_norm`, and no more.

    Then that call can be intercepted, which also compiles.
    """
    forward: Any = kind.forward
    name = getattr(forward, "__module__", None), getattr(forward, "__qualname__", None)
    return name in _PASSING_ON


def computes_values(norm: nn.Module) -> bool:
    """Whether a norm's scale or shift is computed: it was pruned or is parametrized."""
    modules, parameters = norm._modules, norm._parameters  # noqa: SLF001 (no public name)
    return "parametrizations" in modules or not _COMPUTED_FROM.isdisjoint(parameters)


def require_values_of_copies(norm: Any) -> None:
    """Refuse a norm that does with its values what its copies would not follow.

    Raises:
        ConversionError: It computes its scale or shift.
        TrainingError: It is trained with cumulative averages.
    """
    if computes_values(norm):
        msg = "a norm was pruned or parametrized after conversion, which its copies do not follow: "
        msg += "undo that, or do it before anyprec.convert and make it permanent "
        msg += "(torch.nn.utils.prune.remove, torch.nn.utils.parametrize.remove_parametrizations)"
        raise ConversionError(msg)
    if norm.training and norm.momentum is None:
        msg = "a norm with momentum=None averages over all its batches, whatever their precision, "
        msg += "so its copies cannot be trained: give it a number as momentum, and estimate "
        msg += "statistics by anyprec.update_norms(model, loader)"
        raise TrainingError(msg)


def is_synchronised(norm: nn.Module) -> bool:
    """Whether a call of the norm takes the statistics of all processes (`nn.SyncBatchNorm`)."""
    if not isinstance(norm, nn.SyncBatchNorm) or not norm.training:
        return False
    if not (distributed.is_available() and distributed.is_initialized()):
        return False
    return distributed.get_world_size(norm.process_group) > 1


def returns_normalised(forward: Any) -> bool | None:
    """Whether a forward that reads a norm's values returns what `F.batch_norm` does.

    Args:
        forward: That below the norm's own, bound to it.

    Returns:
        None if it may do anything else.
    """
    function = getattr(forward, "__func__", None)
    return None if function is None else _returns_normalised(function)


@functools.cache
def _returns_normalised(function: Any) -> bool | None:
    module, name = getattr(function, "__module__", ""), getattr(function, "__qualname__", "")
    if (module, name) not in _READING:
        return None
    # A function that wraps another one has its name.
    kind = getattr(sys.modules.get(module), name.partition(".")[0], None)
    if kind is None or vars(kind).get("forward") is not function:
        return None
    return _READING[module, name]


def reading_stand_in(norm: Any, values: Mapping[str, Tensor]) -> nn.Module | None:
    """An object like `norm` for a forward that reads its values; None if it has others than usual.

    Args:
        norm: A norm.
        values: Parameters and statistics, by name, that the object has instead of those of `norm`.
    """
    attributes = vars(norm)
    own: dict[str, Any] = {**attributes["_parameters"], **attributes["_buffers"]}
    for name in _VALUES:
        # Those of a replica are attributes, and parametrized ones properties.
        if name not in own or name in attributes:
            return None
    kind: Any = type(norm)
    if kind._check_input_dim not in _INPUT_CHECKS or "_check_input_dim" in attributes:  # noqa: SLF001 (as above)
        return None
    if not keeps_attributes(kind, _READ):
        return None
    stand_in: nn.Module = object.__new__(norm.original_class)
    # As attributes, which are found before parameters and buffers.
    vars(stand_in).update(attributes, **own)
    vars(stand_in).update(values)
    return stand_in


@contextmanager
def standing_in(norm: nn.Module, values: Mapping[str, Tensor]) -> Iterator[nn.Module]:
    """An object like `norm` for one forward pass.

    What the pass changes in place, and what it sets on the object, changes `values` and `norm`.

    Args:
        norm: A norm.
        values: Parameters and statistics, by name, that the object has instead of those of `norm`.
    """
    stand_in = _like(norm)
    # By identity, since a norm may have a second name for its weight.
    replaced = {id(getattr(norm, name)): value for name, value in values.items()}
    # Any, since a copy's row stands where mypy expects a parameter.
    stores: Any = (norm._parameters, norm._buffers)  # noqa: SLF001 (no public name)
    given = [_with_replaced(store, replaced) for store in stores]
    parameters, buffers = map(dict, given)
    vars(stand_in).update(_parameters=parameters, _buffers=buffers)
    yield stand_in
    _take_over(norm, stand_in)
    for store, before, after in zip(stores, given, (parameters, buffers), strict=True):
        _take_over_tensors(store, before, after)


def _with_replaced(store: _Store, replaced: Mapping[int, Tensor]) -> _Store:
    return {name: replaced.get(id(tensor), tensor) for name, tensor in store.items()}


def _like(norm: nn.Module) -> nn.Module:
    kind: Any = type(norm)
    stand_in: nn.Module = kind.__new__(kind)
    vars(stand_in).update(vars(norm))
    return stand_in


def _take_over(norm: nn.Module, stand_in: nn.Module) -> None:
    """Set on the norm what the pass has set on its stand-in."""
    attributes = vars(norm)
    for name, value in vars(stand_in).items():
        if name not in ("_parameters", "_buffers") and attributes.get(name) is not value:
            attributes[name] = value


def _take_over_tensors(store: _Store, before: _Store, after: _Store) -> None:
    """Write tensors that the pass has put in the place of others to where those came from."""
    for name, tensor in after.items():
        if name in before and tensor is before[name]:
            continue
        value = before.get(name)
        if value is None or tensor is None or value is store.get(name):
            store[name] = tensor
            continue
        # A copy's own: its values live in the bank.
        with torch.no_grad():
            value.copy_(tensor)


class OutputWatch(FunctionMode):
    """Calls observers with every result of `F.batch_norm`, and changes nothing."""

    def __init__(self, observers: Observers) -> None:
        super().__init__()
        self.observers = observers
        self.has_notified = False

    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call `func`, and the observers with what `F.batch_norm` returns."""
        result = func(*args, **kwargs)
        if func is F.batch_norm:
            self.observers.notify(result)
            self.has_notified = True
        return result

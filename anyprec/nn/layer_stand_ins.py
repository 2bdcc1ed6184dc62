"""Layers whose original forward runs on a stand-in with the quantized weight.

To intercept an operator takes tens of microseconds a layer. The forwards of `nn.Linear` and of
torch's convolutions are known: they pass the layer's input, weight and bias to one operator, and
change nothing. Such a forward runs on an object like the layer, whose weight is the quantized one.
The layer itself stays as it is: other threads, hooks and calls inside the call see its own weight.

Only what is certain is taken: these very functions, on a layer whose weight is a parameter of its
own. All other layers are intercepted (`layers.py`), as are all in compiled networks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from anyprec.nn.attributes import keeps_attributes
from anyprec.nn.packed import PackedWeight

if TYPE_CHECKING:
    from anyprec.nn.layers import QuantizedModule

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

_FORWARDS: dict[Callable[..., Any], Callable[..., Any] | None] = {nn.Linear.forward: None}
"""Each known forward, with the method that a convolution's calls."""

for _convolution in _CONVOLUTIONS:
    _FORWARDS[_convolution.forward] = _convolution._conv_forward  # noqa: SLF001 (that it calls)

_READ = ("weight", "bias", "stride", "padding", "dilation", "groups", "padding_mode")
"""What the known forwards read of a layer."""

_PLAIN_INPUTS = (Tensor, nn.Parameter)
_PLAIN_WEIGHTS = (nn.Parameter, Tensor, PackedWeight)


def input_of_stand_in(
    layer: QuantizedModule, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """The input of a call that can run on a stand-in; None if the call must be intercepted.

    Args:
        layer: The layer that is called.
        forward: The forward below that of `QuantizedModule`, bound to the layer.
        args: Of the call.
        kwargs: Of the call, by name.
    """
    function = getattr(forward, "__func__", None)
    if function not in _FORWARDS or not _has_own_weight(layer):
        return None
    inner = _FORWARDS[function]
    if inner is not None and not _is_plain_convolution(layer, inner):
        return None
    kind: Any = type(layer)
    return _plain_input(args, kwargs) if keeps_attributes(kind, _READ) else None


def _plain_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The one argument of a call, if it is a float tensor."""
    value: Tensor | None = None
    if len(args) == 1 and not kwargs:
        value = args[0]
    elif not args and len(kwargs) == 1:
        value = kwargs.get("input")
    # A tensor of another class may see in its operators what a stand-in would change.
    if value is None or type(value) not in _PLAIN_INPUTS or not value.is_floating_point():
        return None
    return value


def stand_in_for(layer: QuantizedModule, weight: Tensor) -> nn.Module:
    """An object of the layer's original class that is like it, but for its weight."""
    kind: Any = layer.original_class
    stand_in: nn.Module = object.__new__(kind)
    attributes = vars(layer)
    # As an attribute, found before the parameter of this name, which is the latent weight.
    vars(stand_in).update(attributes, weight=weight, bias=attributes["_parameters"]["bias"])
    return stand_in


def _has_own_weight(layer: nn.Module) -> bool:
    """Whether weight and bias are parameters, as they were when the layer was made.

    Those that are parametrized, pruned or weight-normed, or of a replica, are not.
    """
    attributes = vars(layer)
    parameters = attributes["_parameters"]
    if "bias" not in parameters or type(parameters.get("weight")) not in _PLAIN_WEIGHTS:
        return False
    return "weight" not in attributes and "bias" not in attributes


def _is_plain_convolution(layer: nn.Module, inner: Callable[..., Any]) -> bool:
    """Whether a convolution's forward passes its input to the operator as it is."""
    attributes = vars(layer)
    if getattr(type(layer), "_conv_forward", None) is not inner or "_conv_forward" in attributes:
        return False
    return attributes.get("padding_mode") == "zeros"

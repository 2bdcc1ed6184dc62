"""Views: further model objects of one network, which share its weights and not its precision.

A view is a deep copy that stops where something belongs to the weights: at parameters and buffers,
and at all that is known of them, which are the quantizers, the copies of norms and the record of
the conversion. Whole dictionaries of parameters and buffers are shared, and not the tensors in
them alone: then a tensor that is replaced (by `load_state_dict(assign=True)` or `.to(device)`) is
replaced in every view.
"""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Iterator
from enum import Enum
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from anyprec.errors import ConversionError
from anyprec.nn.chosen import Chosen
from anyprec.nn.layers import QuantizedLayer
from anyprec.nn.norm_bank import NormBank
from anyprec.nn.norms import SwitchableNorm
from anyprec.nn.operators import tensors_in
from anyprec.nn.packed import PackedOperand
from anyprec.nn.quantizers import InputQuantizer, WeightQuantizer
from anyprec.nn.weights import LatentWeight

if TYPE_CHECKING:
    from anyprec.model.converted import ConvertedModel

# TorchScript modules have no precision inside, and cannot be copied by their attributes.
_SHARED_MODULES = (
    InputQuantizer,
    NormBank,
    PackedOperand,
    WeightQuantizer,
    torch.jit.ScriptModule,
)


class Present(Enum):
    """The type of `PRESENT`."""

    PRESENT = "the present precision"


PRESENT = Present.PRESENT
"""Instead of a precision: the one that is active."""


def make_view(model: ConvertedModel) -> ConvertedModel:
    """A view of `model`, at its present precision.

    Raises:
        ConversionError: An attribute cannot be copied, or is a function that holds on to a layer.
    """
    _refuse_functions_with_layers(model)
    try:
        view = copy.deepcopy(model, _shared(model))
    except (TypeError, RuntimeError, pickle.PickleError, copy.Error) as error:
        msg = f"an attribute of {type(model).__name__} or of one of its modules cannot be copied "
        msg += f"for a view ({error}): remove it for the time, or make the view before it is set"
        raise ConversionError(msg) from error
    family = model.anyprec_precision.family
    family.add(model, view)
    view.anyprec_precision.family = family
    view.anyprec_precision.connect(view)
    for member in (model, view):
        member.anyprec_precision.note_norms(member)
    return view


def _shared(model: ConvertedModel) -> dict[int, Any]:
    """What a view has in common with `model`, by id, as `copy.deepcopy` takes it."""
    shared: list[Any] = [model.anyprec_record]
    for module in model.modules():
        if isinstance(module, _SHARED_MODULES):
            shared.append(module)
        elif not isinstance(module, Chosen):
            shared += _shared_of(module)
    return {id(value): value for value in shared}


def _shared_of(module: nn.Module) -> Iterator[Any]:
    """What the view's module in the place of this one has in common with it."""
    attributes = vars(module)
    for name in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
        yield attributes[name]
    if isinstance(module, QuantizedLayer) and isinstance(module.weight_source, LatentWeight):
        yield module.weight_source
    if isinstance(module, SwitchableNorm):
        yield module.selection
    yield from tensors_in(attributes.values())


def _refuse_functions_with_layers(model: ConvertedModel) -> None:
    """Refuse functions in attributes and hooks that no copy could turn to the view's layers."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name in _NOT_COPIED:
                continue
            for function in _functions_in(value):
                if _holds_layer(function, set()):
                    place = repr(path) if path else "the network"
                    msg = f"{name!r} of {place} has the function "
                    msg += f"{function.__qualname__}, which holds on to a layer: in a view it "
                    msg += "would run that layer at the precision of this model. Make it a method, "
                    msg += "or make the view before it is set"
                    raise ConversionError(msg)


_NOT_COPIED = ("_parameters", "_buffers", "_modules", "_compiled_call_impl")


def _functions_in(value: Any) -> Iterator[FunctionType]:
    """The functions in an attribute, however deep in collections and partial applications."""
    if isinstance(value, FunctionType):
        yield value
    elif isinstance(value, functools.partial):
        yield from _functions_in((value.func, value.args, value.keywords))
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _functions_in(entry)
    elif isinstance(value, (list, tuple, set)):
        for entry in value:
            yield from _functions_in(entry)


def _holds_layer(value: Any, seen: set[int]) -> bool:
    """Whether something that a function holds on to can run a layer with a precision."""
    if id(value) in seen:
        return False
    seen.add(id(value))
    if isinstance(value, nn.Module):
        kinds = (QuantizedLayer, SwitchableNorm)
        return any(isinstance(module, kinds) for module in value.modules())
    return any(_holds_layer(entry, seen) for entry in _held_by(value))


def _held_by(value: Any) -> Iterator[Any]:
    """What a function or a collection holds on to."""
    if isinstance(value, FunctionType):
        yield from value.__defaults__ or ()
        yield from (value.__kwdefaults__ or {}).values()
        for cell in value.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:  # a variable that has no value yet
                continue
    elif isinstance(value, MethodType):
        yield value.__self__
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, (list, tuple, set)):
        yield from value

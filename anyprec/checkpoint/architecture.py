"""Finding out how timm makes a network: its name, its arguments, and proof that they suffice.

Making the network from them is in `rebuilding.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from anyprec.checkpoint.document import Architecture
from anyprec.checkpoint.rebuilding import call_of, create_skeleton
from anyprec.errors import CheckpointError
from anyprec.model.converted import ConvertedModel
from anyprec.nn.chosen import Chosen
from anyprec.nn.matrices import Matrices, QuantizedParameter
from anyprec.nn.norm_bank import NormBank
from anyprec.nn.outputs import OutputQuantizers
from anyprec.nn.packed import PackedOperand
from anyprec.nn.quantizers import InputQuantizer, WeightQuantizer
from anyprec.nn.specialize import Specialized

_ADDED_MODULES = (
    Chosen,
    InputQuantizer,
    Matrices,
    NormBank,
    OutputQuantizers,
    PackedOperand,
    QuantizedParameter,
    WeightQuantizer,
)
"""Modules that conversion adds to a network."""

_RUNTIME_SETTINGS = {
    "functional_layers",
    "fused_attn",
    "grad_checkpointing",
    "training",
}
"""Attributes of modules that do not change which network it is."""

_Signature = dict[str, dict[str, str]]
"""Module path to the module's settings and tensors, as text."""


def find_architecture(
    model: ConvertedModel, model_args: Mapping[str, Any] | None
) -> Architecture | None:
    """How timm makes this network, proven by making it (without memory) and comparing every module.

    Args:
        model: A converted model.
        model_args: What the user says was passed to `timm.create_model` besides the name.

    Returns:
        None if the network does not come from timm.

    Raises:
        CheckpointError: timm makes another network from the name and arguments.
    """
    name = _timm_name(model)
    if name is None:
        if model_args:
            network = model.original_class.__name__
            msg = f"model_args={dict(model_args)} was given, but {network} does not come from timm"
            raise CheckpointError(msg)
        return None
    expected = _signature(model)
    refused: list[str] = []
    differing: list[str] = []
    for arguments in _attempts(model, _plain(dict(model_args or {}))):
        architecture = Architecture(name, arguments)
        try:
            rebuilt = create_skeleton(architecture)
        except CheckpointError as error:
            refused.append(str(error))
            continue
        difference = _difference(expected, _signature(rebuilt))
        if difference is None:
            return architecture
        differing.append(f"{call_of(architecture)} makes another one: {difference}")
    # The last network that timm made had the most arguments; a refusal explains less than any of
    # them.
    reason = differing[-1] if differing else refused[0]
    msg = f"the network cannot be rebuilt from its timm name: {reason}. Pass the arguments that it "
    msg += (
        "was created with as model_args={...}, or rebuildable=False for a file that load() takes "
    )
    msg += "only together with a network"
    raise CheckpointError(msg)


def _timm_name(model: nn.Module) -> str | None:
    """The timm name of a network, or None."""
    config = getattr(model, "pretrained_cfg", None)
    name = config.get("architecture") if isinstance(config, Mapping) else None
    return name if isinstance(name, str) else None


def _attempts(model: ConvertedModel, model_args: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Arguments to try: what the network shows wins over `model_args`, and these over guesses."""
    shape = model.anyprec_record.facts.example_shape
    certain: dict[str, Any] = {}
    if isinstance(getattr(model, "num_classes", None), int):
        certain["num_classes"] = model.num_classes
    if len(shape) == 4 and shape[1] != 3:
        certain["in_chans"] = shape[1]
    size = {"img_size": list(shape[2:])}
    pool = getattr(model, "global_pool", None)
    guesses = {
        "drop_rate": getattr(model, "drop_rate", None),
        "global_pool": getattr(pool, "pool_type", pool),
    }
    attributes = {name: value for name, value in guesses.items() if isinstance(value, (str, float))}
    # The fewest guesses first: many networks refuse an argument that others need.
    for guess in ({}, size, attributes, {**attributes, **size}):
        yield {**guess, **model_args, **certain}


def _plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """`arguments`, if the file can hold them."""
    try:
        return dict(json.loads(json.dumps(arguments, allow_nan=False)))
    except (TypeError, ValueError) as error:
        msg = f"model_args={arguments} cannot be written as JSON ({error}): name classes by "
        msg += "strings, as timm allows, or pass rebuildable=False"
        raise CheckpointError(msg) from error


def _signature(model: nn.Module) -> _Signature:
    """A description of every module, by path: all of a float network but its values."""
    signature: _Signature = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, _ADDED_MODULES):
            signature[path] = {"class": _original(module).__qualname__, **_settings(module)}
    first_names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        path, _, local = name.rpartition(".")
        if path in signature:
            shape = tuple(parameter.shape)
            first_name = first_names.setdefault(id(parameter), name)
            tie = "" if first_name == name else f" tied to {first_name}"
            signature[path][local] = f"{shape}{tie}"
    for name, buffer in model.named_buffers(remove_duplicate=False):
        path, _, local = name.rpartition(".")
        if path in signature:
            signature[path][local] = f"{tuple(buffer.shape)}"
    return signature


def _settings(module: nn.Module) -> dict[str, str]:
    """What `print` shows, and every public attribute of a plain type: pooling, dropout, heads."""
    settings = {
        name: repr(value) for name, value in vars(module).items() if _is_setting(name, value)
    }
    return {**settings, "settings": _original(module).extra_repr(module)}


def _is_setting(name: str, value: Any) -> bool:
    if name.startswith("_") or name in _RUNTIME_SETTINGS:
        return False
    entries = value if isinstance(value, (tuple, list)) else (value,)
    return all(entry is None or isinstance(entry, (bool, int, float, str)) for entry in entries)


def _original(module: nn.Module) -> type[nn.Module]:
    """The module's class in the float network."""
    module_class = type(module)
    while issubclass(module_class, Specialized):
        module_class = module_class.original_class
    return module_class


def _difference(expected: _Signature, rebuilt: _Signature) -> str | None:
    """The first difference of two networks, as the end of a sentence, or None."""
    for path in (*expected, *rebuilt):
        module = repr(path) if path else "the network"
        if path not in rebuilt:
            return f"{module} is missing"
        if path not in expected:
            return f"{module} is new"
        for name in (*expected[path], *rebuilt[path]):
            wanted, actual = expected[path].get(name), rebuilt[path].get(name)
            if wanted != actual:
                return f"{name} of {module} is {actual} instead of {wanted}"
    return None

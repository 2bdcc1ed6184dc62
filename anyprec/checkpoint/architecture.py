"""Rebuilding a float network from its timm name: which arguments it needs, and proof that they make the same one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from anyprec.checkpoint.document import Architecture
from anyprec.errors import CheckpointError
from anyprec.model import ConvertedModel
from anyprec.specialize import Specialized

_OUR_PARTS = ("weight_quantizer", "input_quantizer", "bank")


def find_architecture(model: ConvertedModel, model_args: Mapping[str, Any] | None) -> Architecture | None:
    """How timm makes this network, proven by making it (without memory) and comparing every module.

    Args:
        model: A converted model.
        model_args: What was passed to `timm.create_model` besides the name, as far as the user says.

    Returns:
        None if the network does not come from timm.

    Raises:
        CheckpointError: timm makes another network from the name and arguments.
    """
    name = timm_name(model)
    if name is None:
        if model_args:
            msg = (
                f"model_args={dict(model_args)} was given, but {model.original_class.__name__} does not come from timm"
            )
            raise CheckpointError(msg)
        return None
    expected = _signature(model)
    failures: list[str] = []
    for arguments in _attempts(model, model_args):
        try:
            with torch.device("meta"):
                rebuilt = create(Architecture(name, arguments))
        except CheckpointError as error:
            failures.append(str(error))
            continue
        difference = _difference(expected, _signature(rebuilt))
        if difference is None:
            return Architecture(name, arguments)
        failures.append(f"timm.create_model({name!r}, {_as_call(arguments)}) differs at {difference}")
    msg = (
        f"the network cannot be rebuilt from its timm name: {failures[0]}. Pass the arguments that it was created with "
    )
    msg += "as model_args={...}, or rebuildable=False for a file that load() takes only together with a network"
    raise CheckpointError(msg)


def create(architecture: Architecture) -> nn.Module:
    """Make the float network, without pretrained weights.

    Raises:
        CheckpointError: timm does not know the name or refuses the arguments.
    """
    import timm  # noqa: PLC0415 (slow to import)

    if not timm.is_model(architecture.name):
        msg = f"this timm ({timm.__version__}) has no model {architecture.name!r:.80}: update timm, or pass model="
        raise CheckpointError(msg)
    try:
        return timm.create_model(architecture.name, pretrained=False, **architecture.arguments)
    except (TypeError, ValueError, RuntimeError, AssertionError, KeyError, AttributeError) as error:
        msg = f"timm.create_model({architecture.name!r}, {_as_call(architecture.arguments)}) fails: {error}"
        raise CheckpointError(msg) from error


def timm_name(model: nn.Module) -> str | None:
    """The timm name of a network, or None."""
    config = getattr(model, "pretrained_cfg", None)
    name = config.get("architecture") if isinstance(config, Mapping) else None
    return name if isinstance(name, str) else None


def _attempts(model: ConvertedModel, model_args: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    channels, *size = model.anyprec_record.facts.example_shape[1:]
    base: dict[str, Any] = {}
    if isinstance(getattr(model, "num_classes", None), int):
        base["num_classes"] = model.num_classes
    if channels != 3:
        base["in_chans"] = channels
    if model_args is not None:
        return [_plain({**base, **model_args})]
    return [base, {**base, "img_size": size}]


def _plain(arguments: dict[str, Any]) -> dict[str, Any]:
    """`arguments`, if the file can hold them."""
    try:
        return dict(json.loads(json.dumps(arguments)))
    except (TypeError, ValueError) as error:
        msg = (
            f"model_args={arguments} cannot be written as JSON ({error}): name classes by strings, as timm allows, or "
        )
        msg += "pass rebuildable=False"
        raise CheckpointError(msg) from error


def _signature(model: nn.Module) -> dict[str, str]:
    """Path of every module of the float network to its class and settings."""
    signature = {}
    for path, module in model.named_modules():
        if path.rpartition(".")[2] in _OUR_PARTS:
            continue
        original = module.original_class if isinstance(module, Specialized) else type(module)
        signature[path] = f"{original.__name__}({original.extra_repr(module)})"
    shapes = {name: str(tuple(tensor.shape)) for name, tensor in model.state_dict().items() if not _is_ours(name)}
    return {**signature, **shapes}


def _is_ours(name: str) -> bool:
    return any(part in _OUR_PARTS for part in name.split("."))


def _difference(expected: dict[str, str], found: dict[str, str]) -> str | None:
    for name in (*expected, *found):
        if expected.get(name) != found.get(name):
            return f"{name or 'the network'!r}: it has {expected.get(name)}, timm makes {found.get(name)}"
    return None


def _as_call(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())

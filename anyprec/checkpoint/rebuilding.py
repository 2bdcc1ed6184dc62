"""Making the float network that a file names: by timm, first without memory, which is given later.

Memory is given on the device that the network will run on, and only where values are to come.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from anyprec.checkpoint.document import Architecture
from anyprec.errors import CheckpointError
from anyprec.nn.quantizers import InputQuantizer, WeightQuantizer

FORBIDDEN_ARGUMENTS = {
    "cache_dir",
    "checkpoint_path",
    "exportable",
    "model_name",
    "no_jit",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "pretrained_filter_fn",
    "pretrained_model_args",
    "pretrained_strict",
    "pruned",
    "scriptable",
}
"""Arguments of `timm.create_model` that name a source of weights, or set process-wide switches."""

_DESCRIPTION = (
    *("tag", "num_classes", "label_offset", "label_names", "label_descriptions"),
    *("input_size", "test_input_size", "min_input_size", "fixed_input_size"),
    *("interpolation", "crop_pct", "test_crop_pct", "crop_mode", "mean", "std"),
)
"""Entries of a pretrained_cfg that describe images and labels; none names a file or an address."""


def create(architecture: Architecture) -> nn.Module:
    """Make the float network, without pretrained weights; the global random state stays as it is.

    Raises:
        CheckpointError: timm does not know the name or refuses the arguments, or they would make it
            read other files.
    """
    import timm  # noqa: PLC0415 (slow to import)

    # A plain registry name: "hf-hub:..." and "local-dir:..." would fetch another network from
    # elsewhere.
    is_plain = re.fullmatch(r"\w{1,200}", architecture.name, re.ASCII)
    if not is_plain or not timm.is_model(architecture.name):
        msg = f"this timm ({timm.__version__}) has no model {reprlib.repr(architecture.name)}: "
        msg += "update timm, or load into a network that you pass"
        raise CheckpointError(msg)
    forbidden = FORBIDDEN_ARGUMENTS & architecture.arguments.keys()
    if forbidden:
        msg = f"{min(forbidden)!r} is no argument that a network is rebuilt with: it names a "
        msg += "source of weights, or sets a switch of the whole process. Leave it out"
        raise CheckpointError(msg)
    with torch.random.fork_rng(devices=[]):
        try:
            return timm.create_model(architecture.name, pretrained=False, **architecture.arguments)
        except Exception as error:  # arguments of a file or user reach the code of any network
            msg = f"{call_of(architecture)} fails: {type(error).__name__}: {error}"
            raise CheckpointError(msg) from error


def create_skeleton(architecture: Architecture) -> nn.Module:
    """As `create`, without memory for the tensors, so that no argument can make it large."""
    with torch.device("meta"):
        return create(architecture)


def describe(network: nn.Module, pretrained_cfg: Mapping[str, Any]) -> None:
    """Give a rebuilt network the description of its images and labels that the saved one had.

    timm's own stands for the default weights of the name, whose normalisation may differ.
    """
    default = getattr(network, "pretrained_cfg", None)
    if not isinstance(default, Mapping):
        return
    description = dict(default)
    for key in _DESCRIPTION:
        if key in pretrained_cfg:
            value = pretrained_cfg[key]
            description[key] = tuple(value) if isinstance(value, list) else value
    vars(network)["pretrained_cfg"] = vars(network)["default_cfg"] = description


def call_of(architecture: Architecture) -> str:
    """The call of timm that makes a network, for messages."""
    arguments = [
        f", {name}={reprlib.repr(value)}" for name, value in architecture.arguments.items()
    ]
    return f"timm.create_model({architecture.name!r}{''.join(arguments)})"


def has_all_tensors_in(network: nn.Module, names: Collection[str]) -> bool:
    """Whether every tensor that a network holds is one of these of its state.

    A network with others (positions and frequencies that it computes when it is made) must be made
    with memory.
    """
    for path, module in network.named_modules():
        prefix = f"{path}." if path else ""
        for name, _ in module.named_buffers(recurse=False):
            if f"{prefix}{name}" not in names:
                return False
        # Tensors in plain attributes, in lists above all, are in no state.
        for name, value in vars(module).items():
            if name not in _STORES and _holds_tensor(value):
                return False
    return True


def materialize(network: nn.Module, device: torch.device, *, besides: Collection[str]) -> None:
    """Replace every tensor without memory by zeros, in place; tied tensors stay tied.

    Args:
        network: A converted network, with or without tensors on the meta device.
        device: Where the new ones go.
        besides: Names of tensors that are left as they are.
    """
    # By id of the old tensor, and with it, so that no new tensor takes its id.
    made: dict[int, tuple[Tensor, Tensor]] = {}
    for path, module in network.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        for name, tensor in tensors:
            if tensor.is_meta and f"{prefix}{name}" not in besides:
                if id(tensor) not in made:
                    made[id(tensor)] = tensor, _zeros_like(tensor, device)
                setattr(module, name, made[id(tensor)][1])
        if isinstance(module, (WeightQuantizer, InputQuantizer)):
            module.restore_constants()


def _zeros_like(tensor: Tensor, device: torch.device) -> Tensor:
    zeros = torch.zeros_like(tensor, device=device)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(zeros, requires_grad=tensor.requires_grad)
    return zeros


def _holds_tensor(value: Any) -> bool:
    """Whether it is a tensor, or a collection with one in it, however deep."""
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (list, tuple, set)):
        return any(map(_holds_tensor, value))
    return isinstance(value, Tensor)


_STORES = {"_parameters", "_buffers", "_modules"}

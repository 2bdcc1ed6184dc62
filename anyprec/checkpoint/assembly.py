"""Giving memory to a network that was made without: on the device that it will run on, and only where values are to come."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from anyprec.nn.quantizers import InputQuantizer, WeightQuantizer


def has_all_tensors_in(network: nn.Module, names: Collection[str]) -> bool:
    """Whether every tensor that a network holds is one of these of its state.

    A network with others (positions and frequencies that it computes when it is made) must be made with memory.
    """
    for path, module in network.named_modules():
        prefix = f"{path}." if path else ""
        if any(f"{prefix}{name}" not in names for name, _ in module.named_buffers(recurse=False)):
            return False
        others = (value for name, value in vars(module).items() if name not in _STORES)
        if any(isinstance(tensor, Tensor) for value in others for tensor in _leaves(value)):
            return False
    return True


def materialize(network: nn.Module, device: torch.device, *, besides: Collection[str]) -> None:
    """Replace every tensor without memory by zeros, in place; what was one tensor at two places stays one.

    Args:
        network: A converted network, with or without tensors on the meta device.
        device: Where the new ones go.
        besides: Names of tensors that are left as they are.
    """
    made: dict[int, tuple[Tensor, Tensor]] = {}  # with the old one, so that its id stays taken
    for path, module in network.named_modules(remove_duplicate=False):
        tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        for name, tensor in tensors:
            if tensor.is_meta and (f"{path}.{name}" if path else name) not in besides:
                if id(tensor) not in made:
                    made[id(tensor)] = tensor, _zeros_like(tensor, device)
                setattr(module, name, made[id(tensor)][1])
        if isinstance(module, (WeightQuantizer, InputQuantizer)):
            module.restore_constants()


def _zeros_like(tensor: Tensor, device: torch.device) -> Tensor:
    zeros = torch.zeros_like(tensor, device=device)
    return (
        nn.Parameter(zeros, requires_grad=tensor.requires_grad)
        if isinstance(tensor, nn.Parameter)
        else zeros
    )


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (list, tuple, set)):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value


_STORES = {"_parameters", "_buffers", "_modules"}

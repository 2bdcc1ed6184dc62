"""Optimizer parameter groups of a converted network: by what a parameter is, never by its name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from anyprec.model.checks import require_latents
from anyprec.model.converted import ConvertedModel, require_converted
from anyprec.nn.norm_bank import NormBank
from anyprec.nn.norms import SwitchableNorm
from anyprec.nn.quantizers import InputQuantizer, WeightQuantizer
from anyprec.nn.shared import SharedInputQuantizer

STEP_SIZES = "step sizes"
"""Name of the group of step sizes."""


def param_groups(
    model: ConvertedModel,
    *,
    lr: float | None = None,
    weight_decay: float | None = None,
    step_lr_scale: float = 1.0,
) -> list[dict[str, Any]]:
    """Three parameter groups: weights, norms and biases, step sizes.

    Only weights have weight decay, except those that the network names in timm's
    `no_weight_decay()`; the other groups say 0, whatever the optimizer's own value is. Left out are
    parameters that require no gradient, and the float network's own affine parameters of norms that
    have copies, which no quantized path uses.

    Args:
        model: A converted model.
        lr: Learning rate of all groups; None leaves it to the optimizer.
        weight_decay: For the weights; None leaves it to the optimizer, whose own value then holds
            for them.
        step_lr_scale: Factor on `lr` for step sizes; their gradients are already scaled
            (`anyprec.nn.quantizers.gradient_scale`).

    Returns:
        Groups with a `name` each, for any `torch.optim` optimizer.

    Raises:
        ConversionError: `model` is not converted.
        PackedError: It is packed.
        ValueError: `step_lr_scale` is given without `lr`.
    """
    require_latents(require_converted(model, purpose="param_groups"), purpose="param_groups")
    if lr is None and step_lr_scale != 1.0:
        msg = f"step_lr_scale={step_lr_scale} needs lr="
        raise ValueError(msg)
    weights, undecayed, step_sizes = _sort_parameters(model)
    groups: list[dict[str, Any]] = [
        {"name": "weights", "params": weights},
        {"name": "norms and biases", "weight_decay": 0.0, "params": undecayed},
        {"name": STEP_SIZES, "weight_decay": 0.0, "params": step_sizes},
    ]
    if weight_decay is not None:
        groups[0]["weight_decay"] = weight_decay
    groups = [group for group in groups if group["params"]]
    if lr is not None:
        for group in groups:
            group["lr"] = lr * step_lr_scale if group["name"] == STEP_SIZES else lr
    return groups


def unused_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that no quantized path uses: the float affine of norms that have copies."""
    unused: list[nn.Parameter] = []
    for module in model.modules():
        if isinstance(module, SwitchableNorm) and module.bank is not None:
            unused.extend(module.parameters(recurse=False))
    return unused


def idle_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that a pass may leave without a gradient, whatever the paths are.

    Those that no quantized path uses, and step sizes of layers that share the grid of what they
    read, which are not used at 8 bits.
    """
    idle = unused_parameters(model)
    for module in model.modules():
        if isinstance(module, SharedInputQuantizer):
            idle.append(module.step)
    return idle


def touch(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """`loss`, whose backward pass also gives each of these parameters a gradient of zero.

    Those that require no gradient get none.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    touched: Tensor = _Touch.apply(loss, *trained)
    return touched


class _Touch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)


def _sort_parameters(
    model: nn.Module,
) -> tuple[list[nn.Parameter], list[nn.Parameter], list[nn.Parameter]]:
    """Weights; norms, biases and what else takes no weight decay; step sizes."""
    weights: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    step_sizes: list[nn.Parameter] = []
    of_quantizers = _ids_of_parameters(model, WeightQuantizer, InputQuantizer)
    of_norm_copies = _ids_of_parameters(model, NormBank)
    unused = {id(parameter) for parameter in unused_parameters(model)}
    undecayed_names = _undecayed_names(model)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or id(parameter) in unused:
            continue
        if id(parameter) in of_quantizers:
            step_sizes.append(parameter)
        # A norm copy has a row for each precision, so its dimensions do not show what it is.
        elif parameter.ndim <= 1 or name in undecayed_names or id(parameter) in of_norm_copies:
            undecayed.append(parameter)
        else:
            weights.append(parameter)
    return weights, undecayed, step_sizes


def _ids_of_parameters(model: nn.Module, *module_types: type[nn.Module]) -> set[int]:
    ids: set[int] = set()
    for module in model.modules():
        if isinstance(module, module_types):
            ids.update(map(id, module.parameters()))
    return ids


def _undecayed_names(model: nn.Module) -> set[str]:
    """Names for which timm says that they take no weight decay."""
    no_weight_decay = getattr(model, "no_weight_decay", None)
    if not callable(no_weight_decay):
        return set()
    return set(no_weight_decay())

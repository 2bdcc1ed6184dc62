"""Optimizer parameter groups of a converted network, found by what a parameter is, never by its name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from anyprec.model.converted import ConvertedModel, require_converted, require_latents
from anyprec.nn.norm_bank import NormBank
from anyprec.nn.norms import SwitchableNorm
from anyprec.nn.quantizers import InputQuantizer, WeightQuantizer


def param_groups(
    model: ConvertedModel,
    *,
    lr: float | None = None,
    weight_decay: float = 0.0,
    step_lr_scale: float = 1.0,
) -> list[dict[str, Any]]:
    """Three parameter groups: weights; norms and biases (no weight decay); step sizes (no weight decay).

    Left out are parameters that are frozen, and the float network's own affine parameters of norms that have copies,
    which no quantized path uses. Parameters that the network names in timm's `no_weight_decay()` get none.

    Args:
        model: A converted model.
        lr: Learning rate of all groups; None leaves it to the optimizer.
        weight_decay: For the weights.
        step_lr_scale: Factor on `lr` for step sizes; their gradients are already scaled (`anyprec.nn.quantizers.gradient_scale`).

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
    steps = _parameters_of(model, (WeightQuantizer, InputQuantizer))
    copies = _parameters_of(model, (NormBank,))
    unused = {id(parameter) for parameter in unused_parameters(model)}
    undecayed = _undecayed(model)
    groups: dict[str, list[nn.Parameter]] = {
        "weights": [],
        "norms and biases": [],
        "step sizes": [],
    }
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or id(parameter) in unused:
            continue
        if id(parameter) in steps:
            groups["step sizes"].append(parameter)
        elif parameter.ndim <= 1 or name in undecayed or id(parameter) in copies:
            groups["norms and biases"].append(parameter)
        else:
            groups["weights"].append(parameter)
    settings: dict[str, dict[str, Any]] = {
        name: {"name": name, "weight_decay": 0.0} for name in groups
    }
    settings["weights"]["weight_decay"] = weight_decay
    if lr is not None:
        for name, setting in settings.items():
            setting["lr"] = lr * (step_lr_scale if name == "step sizes" else 1.0)
    return [
        {**settings[name], "params": parameters}
        for name, parameters in groups.items()
        if parameters
    ]


def unused_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that no quantized path uses: the float affine of norms that have copies."""
    return [
        parameter
        for norm in model.modules()
        if isinstance(norm, SwitchableNorm) and norm.bank is not None
        for parameter in norm.parameters(recurse=False)
    ]


def touch(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """`loss`, whose backward pass also gives each of these parameters that asks for a gradient a zero one."""
    return _Touch.apply(loss, *(parameter for parameter in parameters if parameter.requires_grad))  # type: ignore[no-any-return]


class _Touch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return gradient, *(torch.zeros_like(parameter) for parameter in ctx.saved_tensors)


def _parameters_of(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> set[int]:
    return {
        id(p)
        for module in model.modules()
        if isinstance(module, kinds)
        for p in module.parameters()
    }


def _undecayed(model: nn.Module) -> set[str]:
    """Names for which timm says that they take no weight decay."""
    no_weight_decay = getattr(model, "no_weight_decay", None)
    return set(no_weight_decay()) if callable(no_weight_decay) else set()

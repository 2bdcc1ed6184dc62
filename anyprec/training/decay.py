"""Weight decay that spares the weights that the lowest bit-width represents (RFQuant, section 3.3).

Decay draws weights to zero, which at few bits is one of three or four codes. So weights inside the
range of their layer's lowest current bit-width are not decayed; those beyond it, which it clips,
are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from anyprec.model.converted import ConvertedModel
from anyprec.nn.channels import along
from anyprec.nn.functional import effective_step
from anyprec.nn.layers import QuantizedLayer

_ADDED_TO_GRADIENT = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.NAdam,
)


def exempt_from_decay(
    optimizer: torch.optim.Optimizer,
    model: ConvertedModel,
    *,
    exempt: Callable[[], Mapping[str, QuantizedLayer]],
    decoupled: bool | None = None,
) -> Any:
    """Cancel an optimizer's weight decay for weights inside their layer's lowest range.

    It is cancelled exactly once a step.

    Args:
        optimizer: Its weights are prepared before each of its steps.
        model: The network that it trains.
        exempt: Called at each step: the layers whose weights are exempt, by path.
        decoupled: Whether the optimizer shrinks weights by `1 - lr * weight_decay` (AdamW) instead
            of adding `weight_decay * weight` to the gradient (SGD); None recognises torch's own.

    Returns:
        A handle; its `remove()` ends the exemption.

    Raises:
        ValueError: `decoupled` is None and the optimizer is not known.
    """
    if decoupled is None:
        decoupled = _is_decoupled(optimizer)

    def prepare(running: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        candidates = model.current_candidates
        # An optimizer knows its parameters by identity only.
        ranges = {}
        for path, layer in exempt().items():
            ranges[id(layer.weight)] = (layer, candidates[path].lowest.weight)
        for group in running.param_groups:
            decay = group.get("weight_decay", 0.0)
            for weight in group["params"]:
                if decay == 0 or weight.grad is None or id(weight) not in ranges:
                    continue
                inside = _inside(*ranges[id(weight)])
                if decoupled:
                    _undo_shrinking(weight, inside, float(group["lr"]) * decay)
                else:
                    _undo_gradient(weight.grad, weight, inside, decay)

    return optimizer.register_step_pre_hook(prepare)


@torch.no_grad()
def _inside(layer: QuantizedLayer, bits: int) -> Tensor:
    """Which weights lie inside the range of a bit-width."""
    quantizer = layer.weight_quantizer
    index = quantizer.candidates.index(bits)
    qmin, qmax = quantizer.limits(index)
    scale = along(effective_step(quantizer.step[index]), quantizer.axis, layer.weight)
    return (layer.weight >= qmin * scale) & (layer.weight <= qmax * scale)


@torch.no_grad()
def _undo_shrinking(weight: Tensor, inside: Tensor, shrinking: float) -> None:
    """Divide by the factor `1 - shrinking` that the optimizer is about to multiply by."""
    weight.div_(torch.where(inside, 1 - shrinking, 1.0))


@torch.no_grad()
def _undo_gradient(gradient: Tensor, weight: Tensor, inside: Tensor, decay: float) -> None:
    """Subtract from the gradient what the optimizer is about to add to it."""
    gradient.sub_(torch.where(inside, weight, 0), alpha=decay)


def _is_decoupled(optimizer: torch.optim.Optimizer) -> bool:
    if any(group.get("decoupled_weight_decay") for group in optimizer.param_groups):
        return True
    if type(optimizer) is torch.optim.AdamW:
        return True
    if type(optimizer) in _ADDED_TO_GRADIENT:
        return False
    msg = f"cannot tell how {type(optimizer).__name__} decays weights: say decoupled=True if it "
    msg += "shrinks them by 1 - lr * weight_decay, False if it adds weight_decay * weight to their "
    msg += "gradients"
    raise ValueError(msg)

"""Weight decay that spares the weights that the lowest bit-width represents (RFQuant, section 3.3).

Decay draws weights to zero, which at few bits is one of three or four codes. So weights inside the range of their
layer's lowest current bit-width are not decayed; those beyond it, which it clips, are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from anyprec.model.converted import ConvertedModel
from anyprec.nn.functional import along, effective_step
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
    spared: Callable[[], Collection[str]],
    decoupled: bool | None = None,
) -> Any:
    """Cancel an optimizer's weight decay for weights inside their layer's lowest range, exactly once a step.

    Args:
        optimizer: Its weights are prepared before each of its steps.
        model: The network that it trains.
        spared: Called at each step: the paths of the layers that are spared.
        decoupled: Whether the optimizer shrinks weights by `1 - lr * weight_decay` (AdamW) instead of adding
            `weight_decay * weight` to the gradient (SGD); None recognises torch's own.

    Returns:
        A handle; its `remove()` ends the exemption.

    Raises:
        ValueError: `decoupled` is None and the optimizer is not known.
    """
    if decoupled is None:
        decoupled = _is_decoupled(optimizer)

    def prepare(running: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        layers = model.quantized_layers
        by_weight = {id(layers[path].weight): (path, layers[path]) for path in spared()}
        for group in running.param_groups:
            decay = group.get("weight_decay", 0.0)
            for weight in group["params"] if decay else ():
                path, layer = by_weight.get(id(weight), ("", None))
                if layer is not None and weight.grad is not None:
                    floor = model.frozen.get(path, layer.candidates.lowest).weight
                    _cancel(
                        weight, _inside(layer, floor), decay, group["lr"] if decoupled else None
                    )

    return optimizer.register_step_pre_hook(prepare)


@torch.no_grad()
def _inside(layer: QuantizedLayer, bits: int) -> Tensor:
    """Which weights lie inside the range of a bit-width."""
    quantizer = layer.weight_quantizer
    index = quantizer.candidates.index(bits)
    qmin, qmax = quantizer.limits(index)
    scale = along(effective_step(quantizer.step[index]), quantizer.axis, layer.weight.ndim)
    return (layer.weight >= qmin * scale) & (layer.weight <= qmax * scale)


@torch.no_grad()
def _cancel(weight: Tensor, inside: Tensor, decay: float, rate: float | None) -> None:
    if rate is None:
        weight.grad.sub_(torch.where(inside, weight, 0), alpha=decay)  # type: ignore[union-attr]  # the caller looked
    else:
        weight.div_(torch.where(inside, 1 - float(rate) * decay, 1.0))


def _is_decoupled(optimizer: torch.optim.Optimizer) -> bool:
    if any(group.get("decoupled_weight_decay") for group in optimizer.param_groups):
        return True
    if type(optimizer) is torch.optim.AdamW:
        return True
    if type(optimizer) in _ADDED_TO_GRADIENT:
        return False
    msg = f"cannot tell how {type(optimizer).__name__} decays weights: say decoupled=True if it shrinks them by "
    msg += "1 - lr * weight_decay, False if it adds weight_decay * weight to their gradients"
    raise ValueError(msg)

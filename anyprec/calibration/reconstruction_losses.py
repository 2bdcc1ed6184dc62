"""How far a network is from the float network: at its output, and at a unit's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def output_loss(output: Any, target: Any) -> Tensor:
    """How far an output is from the float network's: divergence of logits, or else squared error.

    Args:
        output: A tensor, or tensors in lists, tuples and mappings.
        target: The same of the float network.
    """
    if isinstance(output, Tensor):
        if output.ndim == 2 and output.shape[1] > 1:
            log_odds = output.float().log_softmax(dim=1)
            return F.kl_div(log_odds, target.float().softmax(dim=1), reduction="batchmean")
        return relative_error(output, target)
    if isinstance(output, Mapping):
        pairs = [(output[name], target[name]) for name in output]
    else:
        pairs = list(zip(output, target, strict=True))
    return torch.stack([output_loss(one, other) for one, other in pairs]).mean()


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """Squared error over the mean square of the target."""
    target = target.float()
    return (output.float() - target).square().mean() / target.square().mean().clamp_min(1e-12)

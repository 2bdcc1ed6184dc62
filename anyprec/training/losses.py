"""Terms of the one-shot loss: stateless tensor maths."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from anyprec.errors import TrainingError
from anyprec.nn.channels import Axis, along, channel_count
from anyprec.nn.functional import effective_step, widened


def distillation_loss(logits: Tensor, target_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Kullback-Leibler divergence of the softened predictions from the target's.

    `T^2 * KL(softmax(target / T) || softmax(logits / T))`, mean over the batch (Hinton et al. 2015;
    in place: Yu and Huang 2019).

    Args:
        logits: Predictions that learn, shape `(batch, classes)`.
        target_logits: Predictions to mimic, of the same shape; no gradient flows into them.
        temperature: Softens both.

    Returns:
        A scalar, in nats.

    Raises:
        TrainingError: Either is no tensor of shape `(batch, classes)`, or their shapes differ.
    """
    require_comparable(logits, target_logits)
    return divergence(logits, log_softmax(target_logits.detach(), temperature), temperature)


def log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """Softened log-probabilities, in float32 at least."""
    logits = widened(logits)
    return F.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)


def divergence(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """`distillation_loss` from the target's `log_softmax`."""
    student = log_softmax(logits, temperature)
    loss = F.kl_div(student, target, reduction="batchmean", log_target=True)
    return loss if temperature == 1 else temperature**2 * loss


def require_comparable(logits: object, target_logits: object) -> None:
    """Refuse logits that distillation cannot compare.

    Raises:
        TrainingError: as `distillation_loss`.
    """
    logits = require_logits(logits, of="the network's output")
    target_logits = require_logits(target_logits, of="the target of distillation")
    if logits.shape != target_logits.shape:
        msg = "distillation compares logits of one shape: the network returned "
        msg += (
            f"{tuple(logits.shape)}, its target has {tuple(target_logits.shape)}. Give all paths "
        )
        msg += f"of a step the same batch, and the teacher the same classes; {_REMEDY}"
        raise TrainingError(msg)


def require_logits(output: object, *, of: str) -> Tensor:
    """Refuse what the distillation term cannot compare: anything but logits `(batch, classes)`.

    A softmax over the last axis of a dense output would run over image columns, and over a single
    class it is 1 whatever the network says.

    Args:
        output: What a network returned.
        of: Whose it is, for the message.

    Returns:
        The logits.

    Raises:
        TrainingError: It is no tensor of two axes with at least two classes.
    """
    if isinstance(output, Tensor) and output.ndim == 2 and output.shape[1] > 1:
        return output
    what = type(output).__name__
    if isinstance(output, Tensor):
        what = f"a tensor of shape {tuple(output.shape)}"
    msg = "distillation needs logits as one tensor of shape (batch, classes), of two classes or "
    msg += f"more: {of} is {what}; {_REMEDY}"
    raise TrainingError(msg)


_REMEDY = "set distillation=0, and add a distillation term of your own with OneShot(terms=[...])"


def quantization_error(
    weight: Tensor,
    step: Tensor,
    *,
    qmin: int,
    qmax: int,
    axis: Axis | None = None,
    coarser: int = 1,
) -> Tensor:
    """How far weights are from those codes that the lowest bit-width of their layer has too.

    Squared distance of each weight inside the range to its quantized value, counted where the code
    is a multiple of `coarser`, `2^(b - b_min)`; summed over output channels, mean over the rest
    (RFQuant, Tang et al. 2024, section 3.3). It draws weights to points that all bit-widths share,
    and so away from rounding thresholds.

    Args:
        weight: The weight as it is quantized; the gradient goes here, and not to `step`.
        step: Step size(s), as for `fake_quantize`.
        qmin: Lowest integer code.
        qmax: Highest integer code.
        axis: Channels of per-channel step sizes, as for `fake_quantize`; None for one step size.
        coarser: Distance between two codes of the lowest bit-width, in codes of this one.

    Returns:
        A scalar.
    """
    scale = along(effective_step(step), axis, weight)
    ratio = weight.detach() / scale
    codes = ratio.round()
    is_inside = (ratio >= qmin) & (ratio <= qmax)
    is_shared = codes.remainder(coarser) == 0  # the lowest bit-width has this code too
    distance = torch.where(is_inside & is_shared, weight - codes * scale, 0)
    channels = channel_count(weight.shape, 0 if axis is None else axis)
    return distance.square().sum() * (channels / weight.numel())


def feature_distance(feature: Tensor, target: Tensor, *, relative: bool) -> Tensor:
    """Mean squared error between a feature and what it is at the highest precision.

    RFQuant, section 3.4.

    Args:
        feature: Output of a layer at a low precision, of any shape.
        target: The same at the highest precision, of the same shape; no gradient flows into it.
        relative: Divide by the mean square of the target, for features that no norm brought to a
            common scale.

    Returns:
        A scalar.
    """
    target = widened(target.detach())
    # The difference is another tensor: `feature` may be changed in place before the backward pass.
    squared_error = (widened(feature) - target).square().mean()
    if not relative:
        return squared_error
    return squared_error / target.square().mean().clamp_min(1e-12)

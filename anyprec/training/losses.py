"""Terms of the one-shot loss: stateless tensor maths."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def distillation_loss(logits: Tensor, target_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Kullback-Leibler divergence of the softened predictions from the target's, mean over the batch.

    `T^2 * KL(softmax(target / T) || softmax(logits / T))` (Hinton et al. 2015; in place: Yu and Huang 2019).

    Args:
        logits: Predictions that learn, shape `(batch, classes)`.
        target_logits: Predictions to mimic, of the same shape; no gradient flows into them.
        temperature: Softens both.

    Returns:
        A scalar, in nats.
    """
    student = F.log_softmax(logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(target_logits.detach().float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(student, teacher, reduction="batchmean", log_target=True)

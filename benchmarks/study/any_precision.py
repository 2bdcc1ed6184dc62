"""The baseline Any-Precision DNN (Yu et al., AAAI 2021): uniform paths, each with its own loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

import anyprec
from anyprec.bits import Candidates
from anyprec.training.losses import distillation_loss
from anyprec.training.scheduler import Instability


@dataclass(frozen=True)
class DescendingWidths:
    """A sampler: all layers at the second highest bit-width, then at the third, and so on."""

    widths: tuple[int, ...]

    def draw(
        self,
        candidates: Candidates,
        count: int,
        *,
        generator: torch.Generator,
        instability: Instability,
    ) -> list[anyprec.BitConfig]:
        """See `anyprec.training.samplers.Sampler`."""
        del generator, instability  # nothing is drawn
        descending = sorted(self.widths, reverse=True)[1:]
        return [anyprec.bits.uniform(width, candidates) for width in descending[:count]]


class RecursiveDistillation:
    """A criterion: labels for the highest bit-width, for the others the next higher's predictions.

    Args:
        passes: In a step; the first one is the highest bit-width's.
    """

    def __init__(self, passes: int) -> None:
        self._passes = passes
        self._done = 0
        self._target = torch.empty(0)

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss of the next pass."""
        if self._done == 0:
            loss = nn.functional.cross_entropy(logits, labels)
        else:
            loss = distillation_loss(logits, self._target)
        self._target = logits.detach()
        self._done = (self._done + 1) % self._passes
        return loss

"""The evaluator: what a configuration is worth, by forward passes on a fixed set of batches held in memory.

This is the only file of the search that knows torch; the algorithms see a function from configuration to number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn import functional as F

from anyprec.batches import Batch, device_of, images_of, labels_of, take
from anyprec.bits import BitConfig
from anyprec.model import ConvertedModel

Objective = str | Callable[[ConvertedModel], float]
"""`"loss"`, `"divergence"`, or a function of the model at the configuration to judge; lower is better."""

OBJECTIVES = ("loss", "divergence")


class Evaluator:
    """Judges configurations of one model. The model must be in eval mode; its precision is restored each time.

    Args:
        model: A converted and calibrated model.
        loader: Batches of (images, labels); images alone for `"divergence"`.
        objective: `"loss"` is the mean cross-entropy; `"divergence"` the mean Kullback-Leibler divergence from the
            predictions at the highest precision, which needs no labels and is far less noisy; or any function.
        max_batches: At most so many batches are held.

    Raises:
        ValueError: Unknown objective, or an empty loader.
    """

    def __init__(
        self, model: ConvertedModel, loader: Iterable[Batch], objective: Objective, *, max_batches: int | None = None
    ) -> None:
        if isinstance(objective, str) and objective not in OBJECTIVES:
            msg = f"objective {objective!r} is unknown: use one of {OBJECTIVES}, or a function of the model"
            raise ValueError(msg)
        self._model = model
        self._objective = objective
        self._images: list[Tensor] = []
        self._targets: list[Tensor] = []
        device = device_of(model)
        for batch in take(loader, max_batches):
            self._images.append(images_of(batch).to(device))
            if objective == "loss":
                self._targets.append(labels_of(batch).to(device))
        if not self._images and not callable(objective):
            msg = "the loader yields no batch: search needs at least one to judge configurations on"
            raise ValueError(msg)
        if objective == "divergence":
            highest = BitConfig({path: layer.highest for path, layer in model.candidates.items()})
            with model.using_bits(highest), torch.no_grad():
                self._targets = [F.log_softmax(model(images).float(), dim=-1) for images in self._images]

    def __call__(self, config: BitConfig) -> float:
        """The objective at `config`; infinity where the network's output is not finite."""
        with self._model.using_bits(config), torch.no_grad():
            own = self._objective
            value = float(own(self._model)) if callable(own) else self._mean_over_images()
        return value if math.isfinite(value) else math.inf

    def _mean_over_images(self) -> float:
        total, count = 0.0, 0
        for images, targets in zip(self._images, self._targets, strict=True):
            logits = self._model(images).float()
            if self._objective == "loss":
                total += float(F.cross_entropy(logits, targets, reduction="sum"))
            else:
                predictions = F.log_softmax(logits, dim=-1)
                total += float(F.kl_div(predictions, targets, reduction="sum", log_target=True))
            count += len(images)
        return total / count

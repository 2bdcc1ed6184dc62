"""One optimizer step of a training run: what `fit` does with the batches of a step."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anyprec.errors import TrainingError
from anyprec.model.accepted_images import explaining_images, require_batch_axis
from anyprec.model.converted import ConvertedModel
from anyprec.runtime.batches import Batch, device_of, images_of, labels_of
from anyprec.runtime.transfers import Transfer, to_device
from anyprec.training.oneshot import OneShot
from anyprec.training.training_path import Criterion

Mixup = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Images and labels to mixed images and labels."""


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Arguments of `fit`, explained there.

    Raises:
        ValueError: One is out of range.
    """

    epochs: int
    accumulation: int
    seed: int
    criterion: Criterion
    mixup: Mixup | None
    autocast: torch.dtype | None
    snapshot: Path | None
    snapshot_steps: int

    def __post_init__(self) -> None:
        for name in ("epochs", "accumulation", "snapshot_steps"):
            if getattr(self, name) < 1:
                msg = f"{name}={getattr(self, name)} must be at least 1"
                raise ValueError(msg)
        if self.autocast not in {None, torch.bfloat16}:
            msg = f"autocast={self.autocast} is not supported: use torch.bfloat16 or None"
            raise ValueError(msg)


@dataclass(frozen=True)
class Learner:
    """The model and all that an optimizer step changes.

    Attributes:
        model: The converted model.
        network: What runs: the model, perhaps compiled, perhaps in DDP.
        oneshot: Draws the paths and composes their losses.
        optimizers: Of the parameters of the model.
        schedules: Of the learning rates of each optimizer.
        average: timm's moving average of the model, or None.
        settings: The arguments of `fit`.
    """

    model: ConvertedModel
    network: nn.Module
    oneshot: OneShot
    optimizers: list[torch.optim.Optimizer]
    schedules: list[Any]
    average: Any
    settings: RunSettings

    def step(self, group: Sequence[Batch]) -> list[float]:
        """One optimizer step on some batches.

        Returns:
            The unweighted loss of every path, mean over the batches.

        Raises:
            TrainingError: A loss is not finite; the weights are as they were.
        """
        # The schedule is read in the middle of each step: neither the first nor the last is lost.
        for schedule in self.schedules:
            schedule.step_update(self.oneshot.steps_done + 0.5)
        losses = _Losses()
        for index, batch in enumerate(group):
            self._backward(batch, len(group), losses, is_last=index == len(group) - 1)
        means = losses.means(len(group))
        self._require_finite(means)
        self.oneshot.recipe.clip_gradients(*self.optimizers)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.oneshot.step()
        if self.average is not None:
            self.average.update(self.model, step=self.oneshot.steps_done)
        return means

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on, without the random generators."""
        average = None if self.average is None else dict(self.average.module.state_dict())
        return {
            "model": dict(self.model.state_dict()),
            "average": average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "oneshot": self.oneshot.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a `state_dict`."""
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.module.load_state_dict(state["average"])
        for optimizer, optimizer_state in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        self.oneshot.load_state_dict(state["oneshot"])

    def _backward(self, batch: Batch, batches: int, losses: _Losses, *, is_last: bool) -> None:
        """Back-propagate all paths of one batch.

        Args:
            batch: Images and labels.
            batches: In this optimizer step; the loss is their mean.
            losses: Takes the unweighted losses of the paths, divided by the number of batches.
            is_last: Whether this is the last of them.
        """
        images, labels = self._prepare(batch)
        for path in self.oneshot.paths(images):
            with self._synchronising(is_last=path.is_last and is_last):
                with self._autocasting(images.device):
                    with explaining_images(self.model, images, only_known=True):
                        output = self.network(images)
                    loss = path.loss(output, labels, self.settings.criterion)
                losses.add(loss.detach() / path.weight / batches)
                if path.is_last and is_last:
                    losses.send()
                # Outside of autocast, as torch advises for backward passes.
                (loss / batches).backward()

    def _prepare(self, batch: Batch) -> tuple[Tensor, Tensor]:
        device = device_of(self.model)
        images, labels = to_device(images_of(batch), device), to_device(labels_of(batch), device)
        require_batch_axis(self.model, images)
        if self.settings.mixup is None:
            return images, labels
        return self.settings.mixup(images, labels)

    def _autocasting(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        if self.settings.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self.settings.autocast)

    def _synchronising(self, *, is_last: bool) -> contextlib.AbstractContextManager[Any]:
        """Reduce gradients over the processes in the last backward pass of a step only."""
        if is_last or not isinstance(self.network, nn.parallel.DistributedDataParallel):
            return contextlib.nullcontext()
        return self.network.no_sync()

    def _require_finite(self, losses: list[float]) -> None:
        for index, loss in enumerate(losses):
            if math.isfinite(loss):
                continue
            for optimizer in self.optimizers:
                optimizer.zero_grad()
            path = "max path" if index == 0 else f"random path {index}"
            msg = f"the loss of the {path} is {loss} at step {self.oneshot.steps_done}: lower the "
            msg += "learning rate, or check the data; the weights are those of the last finite step"
            raise TrainingError(msg)


class _Losses:
    """The losses of one optimizer step, on their way to the host.

    They are sent before the last backward pass. So they are known before the weights change, and a
    device still has that pass to do while the host reads them and goes on.
    """

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._transfer: Transfer | None = None

    def add(self, loss: Tensor) -> None:
        """Take in the loss of the next path."""
        self._losses.append(loss)

    def send(self) -> None:
        """Begin the transfer; all are there."""
        self._transfer = Transfer(torch.stack(self._losses))

    def means(self, batches: int) -> list[float]:
        """Of every path the sum over its losses on the batches."""
        transfer = self._transfer or Transfer(torch.stack(self._losses))
        losses = transfer.result().double().reshape(batches, -1)
        means: list[float] = losses.sum(dim=0).tolist()
        return means

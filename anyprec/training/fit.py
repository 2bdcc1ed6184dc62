"""`fit`: the one-shot loop, ready to use, with a progress bar. What a step is stands in `oneshot.py`."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from anyprec.batches import Batch, device_of, images_of, labels_of
from anyprec.calibration import calibrate, calibrate_norms
from anyprec.errors import TrainingError
from anyprec.model import ConvertedModel, require_converted
from anyprec.progress import Bar, progress_bar
from anyprec.training.oneshot import Criterion, OneShot
from anyprec.training.parameters import param_groups


@dataclass(frozen=True)
class EpochRecord:
    """One epoch of training.

    Attributes:
        epoch: From 0.
        losses: Mean unweighted loss of the max path, then of each random path.
        images_per_second: Images trained, each on all paths, per second.
        seconds: Time of the epoch.
    """

    epoch: int
    losses: tuple[float, ...]
    images_per_second: float
    seconds: float


def fit(  # noqa: PLR0913 (the settings of a training run, by keyword)
    model: ConvertedModel,
    train_loader: Iterable[Batch],
    *,
    epochs: int,
    lr: float = 0.02,
    weight_decay: float = 2.5e-5,
    warmup: float = 0.05,
    random_paths: int = 3,
    distillation: float = 0.5,
    criterion: Criterion | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    clip_value: float | None = 1.0,
    norm_batches: int = 16,
    seed: int = 0,
    show_progress: bool = True,
    on_epoch_end: Callable[[EpochRecord], None] | None = None,
) -> list[EpochRecord]:
    """Train all bit-widths of `model` at once.

    SGD with Nesterov momentum 0.9 on `param_groups`, a linear warm-up and a cosine schedule over all steps, gradients
    clipped by value. A model that is not calibrated yet is calibrated first. Afterwards norm statistics are
    re-estimated on training images, for every precision and for floating point; the model is left in eval mode and
    at the precision that it came with.

    Args:
        model: A converted model; its weights, step sizes and norms are changed.
        train_loader: Batches of (images, labels), iterated anew each epoch.
        epochs: Passes over the loader, at least 1.
        lr: Peak learning rate, of the built-in optimizer or of the schedule over `optimizer`'s own.
        weight_decay: For weights only.
        warmup: Fraction of all steps with a rising learning rate.
        random_paths: Number K of random paths in a step, besides the max path.
        distillation: Share of in-place distillation in the loss of a random path.
        criterion: Task loss; cross-entropy by default.
        optimizer: Instead of the built-in one; the schedule scales its learning rates, `lr` and `weight_decay` are
            not used.
        clip_value: Largest magnitude of a gradient element; None does not clip.
        norm_batches: Training batches for the norm statistics at the end; 0 leaves the running ones.
        seed: Of the generator that draws the bit-widths.
        show_progress: Show a bar on a terminal.
        on_epoch_end: Called after each epoch, e.g. to log or evaluate; it may switch precision and mode.

    Returns:
        One record per epoch.

    Raises:
        ConversionError: `model` is not converted.
        TrainingError: The loader is empty, or the loss is no longer finite; the message names the step.
        ValueError: A setting is out of range.

    Example:
        >>> import timm, torch, anyprec
        >>> model = anyprec.convert(timm.create_model("test_resnet", num_classes=2), bits=(4, 8))
        >>> loader = [(torch.randn(2, 3, 160, 160), torch.tensor([0, 1]))]
        >>> history = anyprec.fit(model, loader, epochs=1)
        >>> len(history[0].losses)
        4
    """
    require_converted(model, purpose="fit")
    if epochs < 1:
        msg = f"epochs={epochs} must be at least 1"
        raise ValueError(msg)
    if not 0 <= warmup < 1:
        msg = f"warmup={warmup} is a fraction of all steps: from 0, below 1"
        raise ValueError(msg)
    steps_per_epoch = _count_batches(train_loader)
    if not all(layer.input_quantizer.calibrated for layer in model.quantized_layers.values()):
        calibrate(model, train_loader)
    if optimizer is None:
        groups = param_groups(model, lr=lr, weight_decay=weight_decay)
        optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)
    total_steps = steps_per_epoch * epochs
    oneshot = OneShot(model, total_steps=total_steps, random_paths=random_paths, distillation=distillation, seed=seed)
    loop = _Loop(
        model=model,
        oneshot=oneshot,
        optimizer=optimizer,
        schedule=_cosine(optimizer, total_steps, round(warmup * total_steps)),
        criterion=nn.functional.cross_entropy if criterion is None else criterion,
        clip_value=clip_value,
    )
    history = []
    with progress_bar("one-shot training", total_steps, show=show_progress) as bar:
        for epoch in range(epochs):
            history.append(loop.run_epoch(epoch, train_loader, bar))
            if on_epoch_end is not None:
                on_epoch_end(history[-1])
    if norm_batches:
        calibrate_norms(model, train_loader, batches=norm_batches, include_float=True)
    model.eval()
    return history


@dataclass
class _Loop:
    model: ConvertedModel
    oneshot: OneShot
    optimizer: torch.optim.Optimizer
    schedule: Any
    criterion: Criterion
    clip_value: float | None

    def run_epoch(self, epoch: int, loader: Iterable[Batch], bar: Bar) -> EpochRecord:
        self.model.train()
        device = device_of(self.model)
        totals = torch.zeros(1 + self.oneshot.random_paths, dtype=torch.float64)
        images_seen, batches, start = 0, 0, time.perf_counter()
        for batch in loader:
            images, labels = images_of(batch).to(device), labels_of(batch).to(device)
            losses = self.run_step(images, labels)
            totals += losses
            images_seen, batches = images_seen + len(images), batches + 1
            speed = images_seen / (time.perf_counter() - start)
            bar.advance(note=_note(epoch, losses, speed))
        seconds = time.perf_counter() - start
        means = tuple((totals / batches).tolist())
        return EpochRecord(epoch, means, images_seen / seconds, seconds)

    def run_step(self, images: Tensor, labels: Tensor) -> Tensor:
        """One optimizer step; returns the unweighted loss of every path."""
        # The schedule is read in the middle of each step, so that neither the first nor the last one is lost.
        self.schedule.step_update(self.oneshot.steps_done + 0.5)
        losses = []
        for path in self.oneshot.paths():
            loss = path.loss(self.model(images), labels, self.criterion)
            losses.append(float(loss.detach()) / path.weight)
            if not math.isfinite(losses[-1]):
                self.optimizer.zero_grad()
                which = "max path" if path.is_max else f"random path {path.index}"
                msg = f"the loss of the {which} is {losses[-1]} at step {self.oneshot.steps_done}: lower the learning "
                msg += "rate, or check the data; the weights are those of the last finite step"
                raise TrainingError(msg)
            loss.backward()
        if self.clip_value is not None:
            parameters = itertools.chain.from_iterable(group["params"] for group in self.optimizer.param_groups)
            nn.utils.clip_grad_value_(parameters, self.clip_value)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.oneshot.step()
        return torch.tensor(losses, dtype=torch.float64)


def _cosine(optimizer: torch.optim.Optimizer, total_steps: int, warmup_steps: int) -> Any:
    from timm.scheduler.cosine_lr import CosineLRScheduler  # noqa: PLC0415 (timm is slow to import)

    return CosineLRScheduler(
        optimizer,
        t_initial=total_steps - warmup_steps,
        warmup_t=warmup_steps,
        warmup_lr_init=0.0,
        warmup_prefix=True,
        t_in_epochs=False,
    )


def _count_batches(loader: Iterable[Batch]) -> int:
    try:
        count = len(loader)  # type: ignore[arg-type]
    except TypeError:
        count = sum(1 for _ in loader)
    if count == 0:
        msg = "the training loader yields no batch"
        raise TrainingError(msg)
    return count


def _note(epoch: int, losses: Tensor, speed: float) -> str:
    numbers = losses.tolist()
    random = f", random {sum(numbers[1:]) / len(numbers[1:]):.3f}" if len(numbers) > 1 else ""
    return f"epoch {epoch + 1}, loss max {numbers[0]:.3f}{random}, {speed:.0f} images/s"

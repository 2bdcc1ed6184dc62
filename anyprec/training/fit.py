"""`fit`: the one-shot loop, ready to use, with a progress bar.

Here the run is set up and finished. `loop.py` holds the loop, `learner.py` an optimizer step,
`oneshot.py` the method.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from anyprec.calibration.norm_statistics import update_norms
from anyprec.calibration.norm_updates import hand_over_affine
from anyprec.calibration.step_sizes import calibrate
from anyprec.errors import TrainingError
from anyprec.model.checks import require_latents, require_values, uncalibrated
from anyprec.model.converted import ConvertedModel, require_converted
from anyprec.runtime.batches import Batch, device_of
from anyprec.runtime.processes import process_count
from anyprec.runtime.progress import progress_bar
from anyprec.training.learner import Learner, Mixup, RunSettings
from anyprec.training.loop import EpochRecord, Run
from anyprec.training.oneshot import OneShot
from anyprec.training.parameters import STEP_SIZES, param_groups
from anyprec.training.recipe import Recipe, resolve_recipe
from anyprec.training.training_path import Criterion, LossTerm
from anyprec.training.validation import trust_statistics


def fit(  # noqa: PLR0913 (the settings of a training run, by keyword)
    model: ConvertedModel,
    train_loader: Iterable[Batch],
    *,
    epochs: int,
    recipe: Recipe | None = None,
    criterion: Criterion | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    teacher: nn.Module | None = None,
    mixup: Mixup | None = None,
    terms: Sequence[LossTerm] = (),
    accumulation: int = 1,
    autocast: torch.dtype | None = None,
    compiled: bool | Mapping[str, Any] = False,
    norm_batches: int = 16,
    seed: int = 0,
    snapshot: str | os.PathLike[str] | None = None,
    snapshot_steps: int = 1000,
    show_progress: bool = True,
    on_epoch_end: Callable[[EpochRecord], None] | None = None,
    **changes: Any,
) -> list[EpochRecord]:
    """Train all bit-widths of `model` at once.

    SGD with Nesterov momentum on `param_groups`, a linear warm-up and a cosine schedule over all
    steps, clipped gradients. A model that is not calibrated yet is calibrated first. Afterwards
    norm statistics are re-estimated on training images, for every precision and for floating point.
    The model is left in eval mode and at the precision that it came with, with averaged weights if
    the recipe averages.

    Under `torchrun`, with a process group, every process trains on its own batches (give the loader
    a `DistributedSampler`); gradients are averaged once a step, and all processes end with the same
    model.

    Args:
        model: A converted model; its weights, step sizes and norms are changed.
        train_loader: Batches of (images, labels), iterated anew each epoch.
        epochs: Passes over the loader, at least 1.
        recipe: A `Recipe`, all settings in one value: `anyprec.Recipe()` by default,
            `anyprec.Recipe.paper()` for the paper's.
        criterion: Task loss; cross-entropy by default.
        optimizer: Instead of the built-in one; the schedule scales its learning rates, and the
            recipe's `lr`, `momentum`, `weight_decay` and `step_lr` are not used.
        teacher: See `OneShot`.
        mixup: Called with the images and labels of each batch, e.g. timm's `Mixup`.
        terms: See `OneShot`.
        accumulation: Batches per optimizer step.
        autocast: `torch.bfloat16` runs forward passes in mixed precision.
        compiled: Run the network through `torch.compile`, or through it with these arguments. It is
            compiled once for the max path and once for all others, never for other bit-widths.
        norm_batches: Training batches for the norm statistics at the end; 0 leaves the running
            ones, and the float network's as they were.
        seed: Of the generator that draws the bit-widths.
        snapshot: File for the state of the run. If it exists, the run goes on from there, exactly
            as it would have: weights, optimizer, schedules and random generators, on the same
            batches.
        snapshot_steps: Optimizer steps between two snapshots.
        show_progress: Show a bar on a terminal.
        on_epoch_end: Called after each epoch, e.g. to log or evaluate; it may switch precision and
            mode, and call `update_norms`, without which an evaluation means little.
        **changes: Settings of the recipe to change, e.g. `lr=0.05`.

    Returns:
        One record per epoch.

    Raises:
        ConversionError: `model` is not converted.
        PackedError: It is packed.
        NoValuesError: It is on the meta device.
        BatchError: The loader yields something else than images that the network takes, and labels.
        TrainingError: The loader is empty or an iterator, the loss is no longer finite (the message
            names the step), or the snapshot is that of another run.
        CheckpointError: The snapshot cannot be read or written.
        ValueError: `recipe` is no `Recipe`, or a setting or `norm_batches` is unknown or out of
            range.

    Example:
        >>> import timm, torch, anyprec
        >>> model = anyprec.convert(timm.create_model("test_resnet", num_classes=2), bits=(4, 8))
        >>> loader = [(torch.randn(2, 3, 160, 160), torch.tensor([0, 1]))]
        >>> history = anyprec.fit(model, loader, epochs=1, lr=0.01)
        >>> len(history[0].losses)
        4
    """
    require_latents(require_converted(model, purpose="fit"), purpose="fit")
    require_values(model, purpose="fit")
    if not isinstance(norm_batches, int) or norm_batches < 0:
        msg = f"norm_batches={norm_batches!r} cannot be: use a positive integer, or 0 for none"
        raise ValueError(msg)
    recipe = resolve_recipe(recipe, changes)
    settings = RunSettings(
        epochs=epochs,
        accumulation=accumulation,
        seed=seed,
        criterion=nn.functional.cross_entropy if criterion is None else criterion,
        mixup=mixup,
        autocast=autocast,
        snapshot=None if snapshot is None else Path(snapshot),
        snapshot_steps=snapshot_steps,
    )
    batches = _count_batches(train_loader)
    total_steps = math.ceil(batches / accumulation) * epochs
    oneshot = OneShot(
        model,
        total_steps=total_steps,
        recipe=recipe,
        teacher=teacher,
        terms=terms,
        compiled=compiled is not False,
        seed=seed,
    )
    resumed_from = _existing(settings.snapshot)
    if resumed_from is None and uncalibrated(model):
        calibrate(model, train_loader)
    optimizers = _optimizers(model, recipe) if optimizer is None else [optimizer]
    with contextlib.ExitStack() as leaving:
        leaving.callback(oneshot.close)
        if recipe.spare_decay:
            leaving.callback(oneshot.exempt_from_decay(optimizers[0]).remove)
        learner = Learner(
            model=model,
            network=_distributed(_compiled(model, compiled), device_of(model)),
            oneshot=oneshot,
            optimizers=optimizers,
            schedules=_schedules(optimizers, total_steps, recipe),
            average=_average(model, recipe),
            settings=settings,
        )
        run = Run(learner, train_loader, batches)
        if resumed_from is not None:
            run.resume(resumed_from)
        with progress_bar("one-shot training", total_steps, show=show_progress) as bar:
            run.train(bar, on_epoch_end)
    if learner.average is not None:
        model.load_state_dict(learner.average.module.state_dict())
    if norm_batches:
        update_norms(model, train_loader, batches=norm_batches, include_float=True)
    else:
        hand_over_affine(model)
        trust_statistics(model)
    model.eval()
    return run.position.history


def _count_batches(loader: Iterable[Batch]) -> int:
    if isinstance(loader, Iterator):
        msg = f"the training loader is a {type(loader).__name__}, an iterator, which can be gone "
        msg += "through only once: pass a DataLoader or a list, which each epoch begins anew"
        raise TrainingError(msg)
    try:
        count = len(loader)  # type: ignore[arg-type]
    except TypeError:
        count = sum(1 for _ in loader)
    if count == 0:
        msg = "the training loader yields no batch"
        raise TrainingError(msg)
    return count


def _existing(snapshot: Path | None) -> Path | None:
    if snapshot is None or not snapshot.exists():
        return None
    return snapshot


def _optimizers(model: ConvertedModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """SGD for all parameters, or Adam for step sizes and SGD for the others."""
    groups = param_groups(model, lr=recipe.lr, weight_decay=recipe.weight_decay)
    for_sgd, for_adam = [], []
    for group in groups:
        if group["name"] == STEP_SIZES and recipe.step_lr is not None:
            for_adam.append({**group, "lr": recipe.step_lr})
        else:
            for_sgd.append(group)
    sgd = torch.optim.SGD(
        for_sgd, lr=recipe.lr, momentum=recipe.momentum, nesterov=recipe.momentum > 0
    )
    if recipe.step_lr is None:
        return [sgd]
    return [sgd, torch.optim.Adam(for_adam, lr=recipe.step_lr)]


def _schedules(
    optimizers: Iterable[torch.optim.Optimizer], total_steps: int, recipe: Recipe
) -> list[Any]:
    warmup_steps = round(recipe.warmup * total_steps)
    return [_cosine(optimizer, total_steps, warmup_steps) for optimizer in optimizers]


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


def _average(model: ConvertedModel, recipe: Recipe) -> Any:
    """Timm's moving average of all parameters and buffers, or None."""
    if recipe.ema_decay is None:
        return None
    from timm.utils.model_ema import ModelEmaV3  # noqa: PLC0415 (timm is slow to import)

    return ModelEmaV3(model, decay=recipe.ema_decay, use_warmup=True)


def _compiled(
    model: nn.Module,
    compiled: bool | Mapping[str, Any],  # noqa: FBT001 (the argument of `fit`)
) -> nn.Module:
    if compiled is False:
        return model
    arguments: dict[str, Any] = {} if compiled is True else dict(compiled)
    network: Any = torch.compile(model, **arguments)
    return network  # type: ignore[no-any-return]


def _distributed(network: nn.Module, device: torch.device) -> nn.Module:
    """The network whose backward pass averages gradients over all processes."""
    if process_count() == 1:
        return network
    ids = [device.index] if device.type == "cuda" else None
    # Buffers are not synchronised: running statistics differ between processes until the end of the
    # epoch, where they are averaged.
    option = "broadcast_buffers"  # the name before torch 2.14
    if "forward_sync_buffers" in inspect.signature(nn.parallel.DistributedDataParallel).parameters:
        option = "forward_sync_buffers"
    options: dict[str, Any] = {"device_ids": ids, option: False}
    return nn.parallel.DistributedDataParallel(network, **options)

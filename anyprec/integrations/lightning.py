"""`OneShotCallback`: one-shot training inside a Lightning `Trainer` (extra `lightning`).

Convert and calibrate before the trainer. The state stays in the model, and the callback only runs
the paths of a step and keeps the schedules. One-shot training back-propagates several losses per
step, so the module's optimization is manual:

    class Classifier(lightning.LightningModule):
        def __init__(self, model, oneshot):
            super().__init__()
            self.model, self.oneshot = model, oneshot
            self.automatic_optimization = False

        def training_step(self, batch, _):
            return self.oneshot.run_step(self, *batch)

        def configure_optimizers(self):
            return torch.optim.SGD(anyprec.param_groups(self.model), lr=0.02)

    oneshot = OneShotCallback(model)
    lightning.Trainer(callbacks=[oneshot], max_epochs=10).fit(Classifier(model, oneshot), loader)
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from anyprec.errors import TrainingError
from anyprec.model.converted import ConvertedModel, require_converted
from anyprec.training.oneshot import OneShot
from anyprec.training.recipe import Recipe, resolve_recipe
from anyprec.training.training_path import Criterion


class OneShotCallback(Callback):
    """Runs the paths of each step and steps the optimizer.

    The schedules are saved in Lightning's checkpoints. Before each validation or test, and at the
    end, norm statistics are brought up to date from the last training images, for every uniform
    bit-width and the float network; other configurations need `update_norms`.

    Args:
        model: The converted and calibrated model that the Lightning module trains.
        recipe: The settings of the method, as for `OneShot`, and the clipping; those of the
            optimizer are the module's.
        criterion: Task loss; cross-entropy by default.
        teacher: See `OneShot`.
        seed: Of the generator that draws the bit-widths.

    Raises:
        ConversionError: `model` is not converted.
        ValueError: `recipe` is no `Recipe`.
    """

    def __init__(
        self,
        model: ConvertedModel,
        *,
        recipe: Recipe | None = None,
        criterion: Criterion | None = None,
        teacher: nn.Module | None = None,
        seed: int = 0,
    ) -> None:
        self._model = require_converted(model, purpose="OneShotCallback")
        self._recipe = resolve_recipe(recipe)
        self._criterion = nn.functional.cross_entropy if criterion is None else criterion
        self._teacher = teacher
        self._seed = seed
        self._oneshot: OneShot | None = None
        self._state: dict[str, Any] | None = None

    @property
    def oneshot(self) -> OneShot:
        """Draws the paths; it exists once the trainer fits.

        Raises:
            TrainingError: The trainer does not fit yet.
        """
        if self._oneshot is None:
            msg = "OneShotCallback knows the length of the training once the trainer fits: pass it "
            msg += "to the Trainer as callbacks=[...]"
            raise TrainingError(msg)
        return self._oneshot

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set up the schedules for the length of this training, or take those of a checkpoint.

        Raises:
            TrainingError: The module optimizes automatically, or the trainer does not know its
                number of steps.
        """
        if pl_module.automatic_optimization:
            msg = "one-shot training takes several backward passes per step: set "
            msg += f"automatic_optimization = False in {type(pl_module).__name__}, and call "
            msg += "run_step in its training_step"
            raise TrainingError(msg)
        steps = trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            msg = "the schedules of one-shot training need its length: give the Trainer max_steps, "
            msg += "or max_epochs and a loader with a length"
            raise TrainingError(msg)
        self._oneshot = OneShot(
            self._model,
            total_steps=int(steps),
            recipe=self._recipe,
            teacher=self._teacher,
            seed=self._seed,
        )
        if self._state is not None:
            self._oneshot.load_state_dict(self._state)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002 (Lightning's signature, as below)
        """Bring norm statistics up to date."""
        self._refresh_norms()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Bring norm statistics up to date."""
        self._refresh_norms()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Bring norm statistics up to date."""
        self._refresh_norms()

    def _refresh_norms(self) -> None:
        if self._oneshot is not None:  # Lightning's sanity check validates before training
            self._oneshot.refresh_norms()

    def run_step(self, module: LightningModule, images: Tensor, targets: Any) -> Tensor:
        """One optimizer step on a batch: paths, clipping, the module's optimizer, schedules.

        Returns:
            The max path's loss, detached, to log it.
        """
        self.oneshot.remember(images)
        optimizer: Any = module.optimizers()
        losses = []
        for path in self.oneshot.paths(images):
            with _synchronising(module, is_last=path.is_last):
                loss = path.loss(self._model(images), targets, self._criterion)
                module.manual_backward(loss)
            losses.append(loss.detach() / path.weight)
        self._recipe.clip_gradients(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        self.oneshot.step()
        return losses[0]

    def state_dict(self) -> dict[str, Any]:
        """What continues the draws and schedules."""
        if self._oneshot is None:
            return {}
        return self._oneshot.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what a checkpoint holds; it takes effect when the training starts."""
        self._state = dict(state_dict) or None


def _synchronising(
    module: LightningModule, *, is_last: bool
) -> contextlib.AbstractContextManager[Any]:
    """Reduce gradients over the processes in the last backward pass of a step only."""
    strategy: Any = module.trainer.strategy
    if is_last or not hasattr(strategy, "block_backward_sync"):
        return contextlib.nullcontext()
    block: contextlib.AbstractContextManager[Any] = strategy.block_backward_sync()
    return block

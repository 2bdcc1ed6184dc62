"""`OneShotTask`: one-shot training as a task of timm's training script (`timm.task.TrainingTask`).

A task returns one loss, on which the script calls `backward`. So the task itself runs and
back-propagates all paths of a step but the last, and returns the last one's loss. Their gradients
add up to those of the whole step.

    model = anyprec.convert(timm.create_model(...))
    anyprec.calibrate(model, loader)
    task = OneShotTask(model, total_steps=updates, device=device)
    groups = anyprec.param_groups(model)  # the optimizer's weight decay, for weights alone
    optimizer = timm.optim.create_optimizer_v2(groups, opt="sgd", lr=0.02, weight_decay=2.5e-5)
    task.follow(optimizer)
    for input, target in loader:
        result = task(input, target)
        result["loss"].backward()
        optimizer.step(); optimizer.zero_grad()
    validate(task.get_eval_model(), ...)

The task keeps the last training images. `get_eval_model` and `task.eval()` bring norm statistics
up to date with them, of the moving average too, so that what the script validates and saves is
what the training is worth. Call `get_eval_model` for each validation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.task import ClassificationTask
from timm.utils.model import unwrap_model
from torch import Tensor, nn

from anyprec.model.converted import ConvertedModel, require_converted
from anyprec.runtime.processes import process_count
from anyprec.training.oneshot import OneShot
from anyprec.training.recipe import Recipe, resolve_recipe


class OneShotTask(ClassificationTask):
    """A step of one-shot training; everything else is that of timm's `ClassificationTask`.

    Args:
        model: A converted and calibrated model.
        criterion: As for timm's task.
        total_steps: Optimizer steps of the whole training.
        recipe: The settings of the method, as for `OneShot`; those of the optimizer are the
            script's.
        teacher: See `OneShot`.
        accumulation: Batches per optimizer step; the script divides the loss that it gets by as
            many.
        scale: What the script does to a loss before `backward`, e.g. `scaler.scale` of a
            `torch.amp.GradScaler`.
        seed: Of the generator that draws the bit-widths.
        **arguments: As for timm's task: `criterion_kwargs`, `device`, `dtype`, `verbose`.

    Attributes:
        oneshot: Draws the paths and composes their losses.

    Raises:
        ConversionError: `model` is not converted.
        ValueError: `recipe` is no `Recipe`, or a number is out of range.
    """

    def __init__(
        self,
        model: ConvertedModel,
        criterion: nn.Module | Callable[..., Tensor] | None = None,
        *,
        total_steps: int,
        recipe: Recipe | None = None,
        teacher: nn.Module | None = None,
        accumulation: int = 1,
        scale: Callable[[Tensor], Tensor] | None = None,
        seed: int = 0,
        **arguments: Any,
    ) -> None:
        super().__init__(require_converted(model, purpose="OneShotTask"), criterion, **arguments)
        if accumulation < 1:
            msg = f"accumulation={accumulation} must be at least 1"
            raise ValueError(msg)
        # In a partial the teacher is no submodule, so nn.Module does not count it to the task.
        self._make_oneshot = partial(
            OneShot,
            model,
            total_steps=total_steps,
            recipe=resolve_recipe(recipe),
            teacher=teacher,
            seed=seed,
        )
        self._accumulation = accumulation
        self._scale = scale
        self.oneshot = self._make_oneshot()
        self._average_step = 0  # of the last refresh of the average's statistics
        self._is_saving = False

    def compile(  # type: ignore[override]  # as timm's
        self, backend: Any = "inductor", mode: str | None = None, **arguments: Any
    ) -> nn.Module:
        """Compile the network, once for all bit-widths; see timm's task."""
        self.oneshot = self._make_oneshot(compiled=True)
        compiled: nn.Module = super().compile(backend=backend, mode=mode, **arguments)
        return compiled

    def follow(self, optimizer: torch.optim.Optimizer) -> Any:
        """Count the steps of the script's optimizer, on which the schedules go.

        Returns:
            A handle; its `remove()` ends that.
        """

        def count(_optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
            self.oneshot.step()

        return optimizer.register_step_post_hook(count)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:  # noqa: A002 (timm's name)
        """Run and back-propagate all paths but the last, and run that one.

        Returns:
            `loss`, of the last path, to call `backward` on; `output`, the max path's logits; the
            unweighted loss of every path (`loss_max`, `loss_1`, ...), detached.
        """
        result: dict[str, Tensor] = {}
        self.oneshot.remember(input)
        for path in self.oneshot.paths(input):
            with self._synchronising(is_last=path.is_last):
                output = self.trainable_module(input)
                loss = path.loss(output, target, self.criterion)
                if not path.is_last:
                    self._backward(loss)
            if path.is_max:
                result["output"] = output
            name = "loss_max" if path.is_max else f"loss_{path.index}"
            result[name] = loss.detach() / path.weight
            result["loss"] = loss
        return result

    def train(self, mode: bool = True) -> Any:  # noqa: FBT001, FBT002 (the signature of nn.Module)
        """Set training mode; before eval mode norm statistics are brought up to date."""
        if not mode:
            self._refresh_norms(ema=False)
        return super().train(mode)

    def get_eval_model(
        self,
        module: nn.Module | None = None,
        ema: bool = False,  # noqa: FBT001, FBT002 (timm's signature)
    ) -> nn.Module | None:
        """The model to validate, with norm statistics of its present weights."""
        if module is None:
            self._refresh_norms(ema=ema)
        network: nn.Module | None = super().get_eval_model(module, ema)
        return network

    def get_checkpoint_state(
        self,
        ema: bool = False,  # noqa: FBT001, FBT002 (timm's signature)
        unwrap_fn: Any = unwrap_model,
    ) -> dict[str, Any]:
        """See timm's task; statistics are brought up to date first, in a single process."""
        # Scripts save in their first process alone, and statistics are of the images of all.
        self._is_saving = process_count() > 1
        try:
            state: dict[str, Any] = super().get_checkpoint_state(ema, unwrap_fn)
        finally:
            self._is_saving = False
        return state

    def get_task_state(
        self,
        module: nn.Module | None = None,  # noqa: ARG002 (timm's signature, as below)
        ema: bool = False,  # noqa: FBT001, FBT002
    ) -> dict[str, Any]:
        """What continues the draws and schedules, for timm's checkpoints."""
        if ema:
            return {}
        return self.oneshot.state_dict()

    def load_task_state(
        self,
        state: dict[str, Any] | None,
        strict: bool = True,  # noqa: ARG002, FBT001, FBT002 (timm's signature)
        module: nn.Module | None = None,  # noqa: ARG002
        ema: bool = False,  # noqa: FBT001, FBT002
    ) -> None:
        """Take over what `get_task_state` returned."""
        if state and not ema:
            self.oneshot.load_state_dict(state)

    def _refresh_norms(self, *, ema: bool) -> None:
        """Bring norm statistics up to date, if steps were taken since the last time."""
        if self._is_saving:
            return
        if not ema:
            self.oneshot.refresh_norms()
            return
        average = self.get_trainable_module(ema=True)
        if average is None or self._average_step == self.oneshot.steps_done:
            return
        for module in average.modules():
            if isinstance(module, ConvertedModel):
                self.oneshot.refresh_norms(module)
                break
        self._average_step = self.oneshot.steps_done

    def _synchronising(self, *, is_last: bool) -> contextlib.AbstractContextManager[Any]:
        """Reduce gradients over the processes in the last backward pass of a step only."""
        if is_last:
            return contextlib.nullcontext()
        block: contextlib.AbstractContextManager[Any] = self.no_sync()  # type: ignore[no-untyped-call]  # timm's
        return block

    def _backward(self, loss: Tensor) -> None:
        """What the script does with the loss that it gets."""
        loss = loss / self._accumulation
        if self._scale is not None:
            loss = self._scale(loss)
        loss.backward()

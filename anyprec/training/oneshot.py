"""The one-shot training step: one max path, then K random paths, in the user's own loop.

Method of RFQuant (Tang et al., CVPR 2024), section 3: every step runs the network at its highest
precision and at K random mixed precisions, and takes one optimizer step on the gradients of all of
them. The max path learns from the labels (and a teacher, if there is one), the random paths from
the labels and from the max path: from its logits (in-place distillation) and, where a layer is at
its lowest bit-width, from its features (information distortion mitigation). Late in training,
weights are drawn to codes that all bit-widths share (quantization-error term). All along, the
bit-width scheduler freezes the lowest bit-width of unstable layers.

The random paths share one weight, whatever their number, so a learning rate means the same for any
K (see docs/differences.md).

Here is the order of a step. `drawing.py` draws the configurations, `training_path.py` composes the
losses, `features.py` and `operands.py` watch forward passes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from anyprec.bits import BitConfig, highest_config
from anyprec.errors import TrainingError
from anyprec.model.checks import require_latents
from anyprec.model.converted import BitsRequest, ConvertedModel, require_converted
from anyprec.model.switching import forget_statistics
from anyprec.nn.staleness import TrainedNetwork
from anyprec.runtime.batches import Batch
from anyprec.runtime.modes import evaluating
from anyprec.training.decay import exempt_from_decay
from anyprec.training.drawing import ConfigDrawer
from anyprec.training.features import FeatureDistances
from anyprec.training.operands import WeightOperands
from anyprec.training.recipe import Recipe, resolve_recipe
from anyprec.training.training_path import LossTerm, PathLoss, StepState, TrainingPath
from anyprec.training.validation import (
    RecentBatches,
    norms_in_training,
    note_average_moved,
    note_weights_moved,
    refresh,
)


class OneShot:
    """Draws the paths of each training step and composes their losses.

    Loss of the max path: the task loss; with a teacher, `(1 - distillation)` of it and
    `distillation` of the distance from the teacher's logits. Loss of a random path:
    `(1 - distillation)` of the task loss, `distillation` of the distance from the max path's
    logits, `feature_weight` times the distances of features from the max path's, and
    `error_weight` times the quantization error. The max path counts 1, all random ones together
    `random_weight`.

    Args:
        model: A converted and calibrated model.
        total_steps: Optimizer steps of the whole training; schedules are fractions of it.
        recipe: The settings of the method, explained at `Recipe`; `Recipe()` by default. Settings
            that belong to `fit` (`lr` and those of the optimizer, `spare_decay`, clipping,
            averaging) are not used here: the loop is yours.
        teacher: A network whose logits the max path mimics; its parameters are not trained.
            `paths` then needs the images.
        terms: Further terms of the loss, each called with the path, the output and the targets.
        compiled: The network is run through `torch.compile`. Then what a step does is the same in
            every step, so that nothing is compiled anew when bit-widths change: features of all
            layers are taken, and count or not.
        seed: Of the generator that draws the bit-widths. With the same seed every process draws
            the same paths.
        **changes: Settings of the recipe to change, e.g. `random_paths=2`.

    Attributes:
        model: The model.
        recipe: The settings, with the changes.
        total_steps: As given.
        steps_done: Optimizer steps so far.

    Raises:
        ConversionError: `model` is not converted.
        PackedError: It is packed.
        ValueError: `recipe` is no `Recipe`, or a setting is unknown or out of range.

    Example:
        >>> import timm, torch, anyprec
        >>> model = anyprec.convert(timm.create_model("test_resnet", num_classes=2), bits=(4, 8))
        >>> x, y = torch.randn(2, 3, 160, 160), torch.tensor([0, 1])
        >>> anyprec.calibrate(model, [x])
        >>> optimizer = torch.optim.SGD(anyprec.param_groups(model), lr=0.01)
        >>> oneshot = anyprec.OneShot(model, total_steps=1)
        >>> for path in oneshot.paths():
        ...     path.loss(model(x), y, torch.nn.functional.cross_entropy).backward()
        >>> optimizer.step(); optimizer.zero_grad()
        >>> oneshot.step()
    """

    def __init__(
        self,
        model: ConvertedModel,
        *,
        total_steps: int,
        recipe: Recipe | None = None,
        teacher: nn.Module | None = None,
        terms: Sequence[LossTerm] = (),
        compiled: bool = False,
        seed: int = 0,
        **changes: Any,
    ) -> None:
        self.model = require_converted(model, purpose="OneShot")
        require_latents(self.model, purpose="OneShot")
        self.recipe = resolve_recipe(recipe, changes)
        if total_steps < 1:
            msg = f"total_steps={total_steps} must be at least 1"
            raise ValueError(msg)
        self.total_steps = total_steps
        self.steps_done = 0
        self._recent = RecentBatches()
        self._norms_in_training: set[str] = set()
        self._network = TrainedNetwork(compiled=compiled)
        self._drawer = ConfigDrawer(model, self.recipe, total_steps=total_steps, seed=seed)
        self._operands = WeightOperands(model)
        # Where features are is found by tracing, which takes its time.
        uses_features = self.recipe.feature_weight > 0
        self._features = FeatureDistances(
            model,
            self.recipe.features if uses_features else "norm",
            compiled=compiled and uses_features,
        )
        self._loss = PathLoss(model, self.recipe, self._operands, teacher=teacher, terms=terms)

    @property
    def last_terms(self) -> dict[str, Tensor]:
        """Detached terms of the last path's loss by name, unweighted, to log them."""
        return self._loss.last_terms

    def paths(self, images: Any = None) -> Iterator[TrainingPath]:
        """The paths of one step, or of one micro-batch under gradient accumulation.

        Each is made active in turn. The model's precision is restored at the end, also if the loop
        is left early.

        Args:
            images: The batch that the network is run on; only a teacher needs it.

        Raises:
            TrainingError: There is a teacher, and no `images`.
        """
        step = StepState(
            candidates=self.model.current_candidates,
            error_weight=_rising_weight(self.recipe, self.steps_done / self.total_steps),
            teacher_logits=self._loss.teach(images),
        )
        paths = self._draw_paths(step)
        try:
            # The precision that `using_bits` restores is the one from before the first path.
            with self.model.using_bits(paths[0].config):
                for path in paths:
                    if not path.is_max:
                        self.model.set_bits(path.config)
                    with self._watching(path, step, paths):
                        yield path
        finally:
            self._norms_in_training |= norms_in_training(self.model)
            self._features.forget()
            step.is_over = True

    def random_configs(self, count: int) -> list[BitConfig]:
        """Configurations drawn by the sampler from the candidates that are not frozen."""
        return self._drawer.draw(count)

    def step(self) -> None:
        """Say that the optimizer has stepped: at its times, the scheduler decides what is frozen.

        Raises:
            TrainingError: More steps than `total_steps`.
        """
        if self.steps_done >= self.total_steps:
            msg = f"OneShot was made for total_steps={self.total_steps} and has done them all: "
            msg += "its schedules end there"
            raise TrainingError(msg)
        self._drawer.end_step(self.steps_done, self._operands.derived)
        self._operands.forget()
        forget_statistics(self.model)  # they belonged to the weights before this step
        # Validation may have begun before this call: then no norm is in training mode any more.
        trained = self._norms_in_training | norms_in_training(self.model)
        note_weights_moved(self.model, self._network, trained)
        self._norms_in_training = set()
        self.steps_done += 1

    def remember(self, images: Tensor) -> None:
        """Keep the last training images, about 512, for `evaluating` without a loader.

        They are kept on their device, and not copied: call it once a step, with what the network is
        run on.
        """
        self._recent.add(images)

    @contextmanager
    def evaluating(
        self,
        loader: Iterable[Batch] | None = None,
        bits: BitsRequest | list[BitsRequest] = "uniform",
        *,
        batches: int | None = 8,
    ) -> Iterator[ConvertedModel]:
        """Validate in a `with` block while training, on norm statistics of the present weights.

        Training leaves statistics behind: a copy of a norm sees few steps, the float network's
        norms none. They are estimated anew on training images, which costs a forward pass for each
        precision and batch, and nothing if there was no step since. In the block the model is in
        eval mode; then modes and precision are restored.

        Training goes on as if there had been no block: weights, gradients and random generators are
        as they were. Two things change on purpose, so that a checkpoint taken in or after the block
        has them: running statistics of norms that are in training mode, which training does not
        read, and the parameters and statistics of the float network's norms, which take over what
        the highest precision learned.

        Args:
            loader: Training images, as for `update_norms`; by default those that `remember` kept.
                A loader with persistent workers must not be the one that is being iterated.
            bits: `"uniform"`, every uniform bit-width and the float network; or what `set_bits`
                takes, or a list of that. A configuration named here has statistics until the next
                step, in the model and in its file, and not in `state_dict()`.
            batches: At most so many of `loader`; None takes all.

        Yields:
            The model, in eval mode.

        Raises:
            TrainingError: No image is known.
            BitsError: A precision does not fit the model.

        Under `torch.distributed` all processes must call it.

        Example:
            >>> import timm, torch, anyprec
            >>> model = anyprec.convert(timm.create_model("test_resnet"), bits=(4, 8))
            >>> images = torch.randn(4, 3, 160, 160)
            >>> anyprec.calibrate(model, [images])
            >>> oneshot = anyprec.OneShot(model, total_steps=1)
            >>> with oneshot.evaluating([images]), torch.no_grad():
            ...     model.set_bits(4)
            ...     output = model(images)
        """
        source = self._recent.all() if loader is None else loader
        refresh(self.model, source, bits, batches=None if loader is None else batches)
        with evaluating(self.model), self.model.using_bits(self.model.bits):
            yield self.model

    def refresh_norms(self, model: ConvertedModel | None = None) -> None:
        """Bring norm statistics up to date from the images that `remember` kept, if there are any.

        Args:
            model: Another model than that in training: a copy with an average of its weights.
        """
        images = self._recent.all()
        if not images:
            return
        if model is None:
            refresh(self.model, images)
            return
        note_average_moved(model, self.model)
        refresh(model, images)

    def exempt_from_decay(
        self, optimizer: torch.optim.Optimizer, *, decoupled: bool | None = None
    ) -> Any:
        """Exempt weights inside their layer's lowest range from weight decay.

        That range is the one of the lowest bit-width that is not frozen. The decay is cancelled
        once a step, before the optimizer's own. Layers that make their weight operand anew in every
        forward pass (weight standardisation) are not exempt: the scale of their weights means
        nothing.

        Args:
            optimizer: Trains the model's weights.
            decoupled: Whether it shrinks weights by `1 - lr * weight_decay` (AdamW) instead of
                adding `weight_decay * weight` to the gradient (SGD); None recognises torch's own.

        Returns:
            A handle; its `remove()` ends the exemption.

        Raises:
            ValueError: `decoupled` is None and the optimizer is not known.
        """
        return exempt_from_decay(
            optimizer, self.model, exempt=self._operands.direct_layers, decoupled=decoupled
        )

    def state_dict(self) -> dict[str, Any]:
        """What continues draws and schedules where they stand, frozen candidates included."""
        return {"steps_done": self.steps_done, **self._drawer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a `state_dict`.

        Raises:
            TrainingError: A key is missing or strange, or the state is that of another network.
        """
        expected = {"steps_done", "generator", "frozen", "instability"}
        if set(state) != expected:
            msg = f"not a state of OneShot: found keys {sorted(state)}, expected {sorted(expected)}"
            raise TrainingError(msg)
        self._drawer.load_state_dict(state)
        self.steps_done = int(state["steps_done"])

    def close(self) -> None:
        """Leave the network as it was before, where it ran compiled; nothing otherwise."""
        self._features.close()

    def _draw_paths(self, step: StepState) -> list[TrainingPath]:
        """The max path, then the random ones, which share their weight."""
        random_configs = self.random_configs(self.recipe.random_paths)
        # What is frozen is never the highest bit-width.
        configs = [highest_config(step.candidates), *random_configs]
        paths = []
        for index, config in enumerate(configs):
            weight = self.recipe.random_weight / len(random_configs) if index > 0 else 1.0
            is_last = index == len(configs) - 1
            paths.append(TrainingPath(self._loss, step, index, config, weight, is_last))
        return paths

    @contextmanager
    def _watching(
        self, path: TrainingPath, step: StepState, paths: Sequence[TrainingPath]
    ) -> Iterator[None]:
        """Note what the loss of a path needs of its forward pass."""
        with ExitStack() as watched:
            if self.recipe.feature_weight > 0 and path.is_max:
                # Features are large: only those are kept that a random path is compared with.
                layers: set[str] = set()
                for random_path in paths[1:]:
                    layers |= self._layers_at_lowest(random_path.config, step)
                watched.enter_context(self._features.keeping(layers))
            elif self.recipe.feature_weight > 0:
                layers = self._layers_at_lowest(path.config, step)
                step.feature_distances = watched.enter_context(self._features.measuring(layers))
            # An event measures instability on the operands that the last path of the step made.
            takes_error = not path.is_max and step.error_weight > 0
            if takes_error or self._drawer.is_event(self.steps_done):
                watched.enter_context(self._operands.watching())
            yield

    def _layers_at_lowest(self, config: BitConfig, step: StepState) -> set[str]:
        """Layers with several weight bit-widths that are at the lowest of those in use."""
        return {
            path
            for path, layer in self.model.candidates.items()
            if len(layer.weight) > 1 and config[path].weight == step.candidates[path].weight[0]
        }


def _rising_weight(recipe: Recipe, time: float) -> float:
    """The weight of the quantization-error term at a time from 0 to 1."""
    passed = (time - recipe.error_start) / (1 - recipe.error_start)
    if passed <= 0:
        return 0.0
    return recipe.error_weight * (1 - math.cos(math.pi * passed)) / 2

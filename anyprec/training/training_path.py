"""One training path, and the terms that its loss is composed of.

Method of RFQuant (Tang et al., CVPR 2024), section 3. The maths of the terms is in `losses.py`,
the loop over the paths in `oneshot.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from anyprec.bits import BitConfig, Candidates
from anyprec.errors import TrainingError
from anyprec.model.converted import ConvertedModel
from anyprec.nn.functional import widened
from anyprec.runtime.modes import evaluating
from anyprec.runtime.processes import process_count
from anyprec.training.losses import (
    distillation_loss,
    divergence,
    log_softmax,
    quantization_error,
    require_comparable,
    require_logits,
)
from anyprec.training.operands import WeightOperands
from anyprec.training.parameters import idle_parameters, touch
from anyprec.training.recipe import Recipe

Criterion = Callable[[Tensor, Any], Tensor]
"""Task loss of (network output, targets), a scalar."""

LossTerm = Callable[["TrainingPath", Any, Any], Tensor]
"""A term of the user's own: a scalar of (path, network output, targets), in every path's loss."""


@dataclass
class StepState:
    """What the paths of one step share.

    Attributes:
        candidates: Those in use, without the frozen ones.
        error_weight: Present weight of the quantization-error term.
        teacher_logits: None without a teacher.
        max_logits: The max path's, as soon as its loss is taken.
        max_predictions: What the random paths mimic: its softened log-probabilities.
        feature_distances: Returns those of the active path.
        is_over: Whether the loop over the paths is left.
    """

    candidates: Candidates
    error_weight: float
    teacher_logits: Tensor | None
    max_logits: Tensor | None = None
    max_predictions: Tensor | None = None
    feature_distances: Callable[[], list[Tensor]] = list
    is_over: bool = False


@dataclass(frozen=True)
class TrainingPath:
    """One path of a training step; its configuration is active while the loop body runs.

    Attributes:
        index: 0 is the max path.
        config: The active configuration.
        weight: Of this path's loss in the step: 1 for the max path, `random_weight / K` for each of
            the others.
        is_last: No other path follows: under DDP, gradients are reduced here and nowhere else
            (`no_sync`).
    """

    _loss: PathLoss
    _step: StepState
    index: int
    config: BitConfig
    weight: float
    is_last: bool

    @property
    def is_max(self) -> bool:
        """Whether every layer is at its highest precision."""
        return self.index == 0

    def loss(self, output: Any, targets: Any, criterion: Criterion) -> Tensor:
        """The loss of this path, already multiplied by its weight: call `backward` on it.

        Args:
            output: What the network returned at this path's configuration; for distillation,
                logits of shape `(batch, classes)`, two classes or more.
            targets: Whatever `criterion` takes.
            criterion: Task loss.

        Raises:
            TrainingError: The max path's loss was not taken first, the loop over the paths is left,
                or there is distillation and `output` is no such logits.
        """
        if self._step.is_over:
            msg = "a path's loss is taken inside the loop over paths(), while the path is active"
            raise TrainingError(msg)
        return self._loss.compose(self, self._step, output, targets, criterion)


class PathLoss:
    """Composes the loss of a path from the terms of the method and the user's own.

    Args:
        model: A converted model.
        recipe: The weights of the terms.
        operands: The weight operands of the model, for the quantization error.
        teacher: Its logits are the max path's target of distillation.
        terms: The user's own.

    Attributes:
        last_terms: Terms of the last loss by name, unweighted and detached.
    """

    def __init__(
        self,
        model: ConvertedModel,
        recipe: Recipe,
        operands: WeightOperands,
        *,
        teacher: nn.Module | None,
        terms: Sequence[LossTerm],
    ) -> None:
        self._model = model
        self._recipe = recipe
        self._operands = operands
        self._teacher = teacher
        self._terms = tuple(terms)
        self.last_terms: dict[str, Tensor] = {}

    def teach(self, images: Any) -> Tensor | None:
        """The teacher's logits, if there is one.

        Raises:
            TrainingError: There is one, and no `images`, or it returns no logits.
        """
        if self._teacher is None:
            return None
        if images is None:
            msg = "the teacher needs the images of the batch: call paths(images)"
            raise TrainingError(msg)
        with evaluating(self._teacher), torch.no_grad():
            logits: Tensor = self._teacher(images)
        if self._recipe.distillation > 0:
            require_logits(logits, of="the teacher's output")
        return logits

    def compose(
        self, path: TrainingPath, step: StepState, output: Any, targets: Any, criterion: Criterion
    ) -> Tensor:
        """The sum of all terms, multiplied by the weight of the path."""
        terms = self._task_and_distillation(path, step, output, criterion(output, targets))
        terms += self._features(step)
        terms += self._quantization_error(path, step)
        for term in self._terms:
            name = getattr(term, "__name__", type(term).__name__)
            terms.append(_WeightedTerm(name, 1.0, term(path, output, targets)))
        self.last_terms = {term.name: term.value.detach() for term in terms}
        loss = _scaled(_sum([term.weighted() for term in terms]), path.weight)
        if process_count() == 1:
            return loss
        # DDP waits for a gradient of every parameter, also of those that this path does not use.
        return touch(loss, idle_parameters(self._model))

    def _task_and_distillation(
        self, path: TrainingPath, step: StepState, output: Any, task: Tensor
    ) -> list[_WeightedTerm]:
        if isinstance(output, Tensor) and path.is_max:
            step.max_logits, step.max_predictions = output.detach(), None
        share = self._recipe.distillation
        has_target = not path.is_max or self._teacher is not None
        if share > 0 and (has_target or not path.is_last):
            # At the max path already: later paths would refuse it after work was done.
            require_logits(output, of="the network's output")
        if share == 0 or not has_target:
            return [_WeightedTerm("task", 1.0, task)]
        distillation = self._distillation(path, step, output)
        return [
            _WeightedTerm("task", 1 - share, task),
            _WeightedTerm("distillation", share, distillation),
        ]

    def _distillation(self, path: TrainingPath, step: StepState, output: Any) -> Tensor:
        temperature = self._recipe.temperature
        logits = _target_logits(path, step)
        if path.is_max:
            return distillation_loss(output, logits, temperature=temperature)
        require_comparable(output, logits)
        # One target for all random paths.
        if step.max_predictions is None:
            step.max_predictions = log_softmax(logits, temperature)
        return divergence(output, step.max_predictions, temperature)

    def _features(self, step: StepState) -> list[_WeightedTerm]:
        distances = step.feature_distances()
        if not distances:
            return []
        return [_WeightedTerm("features", self._recipe.feature_weight, _sum(distances))]

    def _quantization_error(self, path: TrainingPath, step: StepState) -> list[_WeightedTerm]:
        if path.is_max or step.error_weight == 0:
            return []
        layers = self._model.quantized_layers
        errors = []
        for name, operand in self._operands.current().items():
            quantizer = layers[name].weight_quantizer
            bits = path.config[name].weight
            index = quantizer.candidates.index(bits)
            qmin, qmax = quantizer.limits(index)
            error = quantization_error(
                operand,
                quantizer.step[index],
                qmin=qmin,
                qmax=qmax,
                axis=quantizer.axis,
                coarser=2 ** (bits - step.candidates[name].weight[0]),
            )
            errors.append(error)
        return [_WeightedTerm("quantization error", step.error_weight, _sum(errors))]


@dataclass(frozen=True)
class _WeightedTerm:
    name: str
    weight: float
    value: Tensor

    def weighted(self) -> Tensor:
        return _scaled(widened(self.value), self.weight)


def _scaled(value: Tensor, factor: float) -> Tensor:
    # Each operation that is left out is a launch less, forward and backward.
    return value if factor == 1 else factor * value


def _sum(values: Sequence[Tensor]) -> Tensor:
    is_alone = len(values) == 1 and values[0].ndim == 0
    return values[0] if is_alone else torch.stack(list(values)).sum()


def _target_logits(path: TrainingPath, step: StepState) -> Tensor:
    target = step.teacher_logits if path.is_max else step.max_logits
    if target is None:
        msg = "distillation needs the max path's logits: call loss() on every path in order, or "
        msg += "set distillation=0"
        raise TrainingError(msg)
    return target

"""The one-shot training step: one max path, then K random paths, in the user's own loop.

Method of RFQuant (Tang et al., CVPR 2024), section 3: every step runs the network at its highest precision and at K
random mixed precisions, and takes one optimizer step on the gradients of all of them. The max path learns from the labels
(and a teacher, if there is one), the random paths from the labels and from the max path: from its logits (in-place
distillation) and, where a layer is at its lowest bit-width, from its features (information distortion mitigation). Late
in training, weights are drawn to codes that all bit-widths share (quantization-error term), and all along the bit-width
scheduler freezes the lowest bit-width of unstable layers.

The random paths share one weight, whatever their number, so a learning rate means the same for any K (see
docs/differences.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from anyprec.bits import BitConfig, Candidates, highest_config
from anyprec.errors import BitsError, TrainingError
from anyprec.model.converted import ConvertedModel, require_converted, require_latents
from anyprec.nn.layers import QuantizedLayer
from anyprec.runtime.modes import evaluating
from anyprec.runtime.processes import of_first_process, process_count
from anyprec.training.decay import exempt_from_decay
from anyprec.training.features import FeatureDistances
from anyprec.training.losses import distillation_loss, quantization_error, widened
from anyprec.training.parameters import touch, unused_parameters
from anyprec.training.samplers import InstabilitySampler, SamplerLike, sampler_of
from anyprec.training.scheduler import BitWidthScheduler, unstable_fractions

Criterion = Callable[[Tensor, Any], Tensor]
"""Task loss of (network output, targets), a scalar."""

Term = Callable[["Path", Any, Any], Tensor]
"""A term of the loss of one's own: a scalar of (path, network output, targets), added to every path's loss."""


class OneShot:
    """Draws the paths of each training step and composes their losses.

    Loss of the max path: the task loss; with a teacher, `(1 - distillation)` of it and `distillation` of the distance
    from the teacher's logits. Loss of a random path: `(1 - distillation)` of the task loss, `distillation` of the
    distance from the max path's logits, `feature_weight` times the distances of features from the max path's, and
    `error_weight` times the quantization error. The max path counts 1, all random ones together `random_weight`.

    Args:
        model: A converted and calibrated model.
        total_steps: Optimizer steps of the whole training; schedules are fractions of it.
        random_paths: Number K of random paths in a step, besides the max path.
        random_weight: Weight of the random paths together, next to the max path's 1: each has `random_weight / K`, so a
            learning rate means the same whatever K is. More serves the lowest bit-widths, less the highest. The published
            code of the paper sums all gradients, which is K.
        distillation: Share of the distillation term in the loss; the task loss has the rest.
        temperature: Of the distillation.
        teacher: A network whose logits the max path mimics; its parameters are not trained. `paths` then needs the
            images.
        feature_weight: Weight of information distortion mitigation: for every layer that a random path draws at its
            lowest weight bit-width, the mean squared error between its feature and the max path's. The features are
            those of `training/features.py`; 0 takes none.
        error_weight: Weight of the quantization-error term at the end of training; it rises to that on a cosine, from
            0 at `error_start`. 0 turns the term off.
        error_start: Time from 0 to 1, see `error_weight`.
        scheduler: When to freeze the lowest bit-width of unstable layers; None never does.
        sampler: The law of the random paths: `"sandwich"` (the lowest precision, then uniform draws), `"uniform"` (the
            paper's), `"instability"` (unstable bit-widths less often), or an object with a method `draw`.
        terms: Further terms of the loss, each called with the path, the output and the targets.
        compiled: The network is run through `torch.compile`. Then what a step does is the same in every step, so that
            nothing is compiled anew when bit-widths change: features of all layers are taken, and count or not.
        seed: Of the generator that draws the bit-widths. With the same seed every process draws the same paths.

    Attributes:
        steps_done: Optimizer steps so far.
        parts: Detached terms of the last path's loss by name, unweighted, to log them.

    Raises:
        ConversionError: `model` is not converted.
        ValueError: A number is out of range.

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

    def __init__(  # noqa: PLR0913 (the settings of a method, by keyword)
        self,
        model: ConvertedModel,
        *,
        total_steps: int,
        random_paths: int = 3,
        random_weight: float = 2.0,
        distillation: float = 0.5,
        temperature: float = 1.0,
        teacher: nn.Module | None = None,
        feature_weight: float = 0.0,
        error_weight: float = 0.0,
        error_start: float = 0.25,
        scheduler: BitWidthScheduler | None = None,
        sampler: SamplerLike = "sandwich",
        terms: Sequence[Term] = (),
        compiled: bool = False,
        seed: int = 0,
    ) -> None:
        self.model = require_converted(model, purpose="OneShot")
        require_latents(self.model, purpose="OneShot")
        _require(total_steps >= 1, f"total_steps={total_steps} must be at least 1")
        _require(random_paths >= 0, f"random_paths={random_paths} must not be negative")
        _require(random_weight > 0, f"random_weight={random_weight} must be positive")
        _require(0 <= distillation <= 1, f"distillation={distillation} must be from 0 to 1")
        _require(temperature > 0, f"temperature={temperature} must be positive")
        _require(feature_weight >= 0, f"feature_weight={feature_weight} must not be negative")
        _require(error_weight >= 0, f"error_weight={error_weight} must not be negative")
        _require(0 <= error_start < 1, f"error_start={error_start} is a time: from 0, below 1")
        self.total_steps = total_steps
        self.random_paths = random_paths
        self.random_weight = random_weight
        self.distillation = distillation
        self.temperature = temperature
        self.teacher = teacher
        self.feature_weight = feature_weight
        self.error_weight = error_weight
        self.error_start = error_start
        self.scheduler = scheduler
        self._timing = (
            scheduler or BitWidthScheduler()
        )  # when a sampler's instability is measured, without a scheduler
        self.sampler = sampler_of(sampler)
        self.terms = tuple(terms)
        self.steps_done = 0
        self.parts: dict[str, Tensor] = {}
        self._generator = torch.Generator().manual_seed(seed)
        self._instability: dict[str, dict[int, float]] = {}
        self._step: _Step | None = None
        self._operands: dict[str, Tensor] = {}
        self._features = FeatureDistances(model, compiled=compiled and feature_weight > 0)

    def paths(self, images: Any = None) -> Iterator[Path]:
        """The paths of one step (or of one micro-batch, under gradient accumulation), each made active in turn.

        The model's precision is restored at the end, also if the loop is left early.

        Args:
            images: The batch that the network is run on; only a teacher needs it.

        Raises:
            TrainingError: There is a teacher, and no `images`.
        """
        if self.teacher is not None and images is None:
            msg = "the teacher needs the images of the batch: call paths(images)"
            raise TrainingError(msg)
        current, every = self.model.current_candidates, self.model.candidates
        configs = [self.highest_config(), *self.random_configs(self.random_paths)]
        at_lowest = [_at_lowest(config, current, every) for config in configs]
        self._step = step = _Step(current, teacher_logits=self._teach(images))
        try:
            with self.model.using_bits(configs[0]):
                for index, config in enumerate(configs):
                    self.model.set_bits(config)
                    with ExitStack() as watching:
                        if self.feature_weight and index == 0:
                            watching.enter_context(
                                self._features.keeping(set().union(*at_lowest[1:]))
                            )
                        elif self.feature_weight:
                            step.distances = watching.enter_context(
                                self._features.measuring(at_lowest[index])
                            )
                        if self._needs_operands(index):
                            watching.enter_context(self._watching_derived_operands())
                        weight = self.random_weight / (len(configs) - 1) if index else 1.0
                        yield Path(
                            self, index, config, weight=weight, is_last=index == len(configs) - 1
                        )
        finally:
            self._features.forget()
            self._step = None

    def highest_config(self) -> BitConfig:
        """Every layer at its highest candidates."""
        return highest_config(self.model.candidates)

    def random_configs(self, count: int) -> list[BitConfig]:
        """Configurations drawn by the sampler from the candidates that are not frozen."""
        return self.sampler.draw(
            self.model.current_candidates,
            count,
            generator=self._generator,
            instability=self._instability,
        )

    def step(self) -> None:
        """Say that the optimizer has stepped: at its times, the bit-width scheduler decides anew what is frozen.

        Raises:
            TrainingError: More steps than `total_steps`.
        """
        if self.steps_done >= self.total_steps:
            msg = f"OneShot was made for total_steps={self.total_steps} and has done them all: its schedules end there"
            raise TrainingError(msg)
        if self._is_event():
            self._instability = self.measure_instability()
            if self.scheduler is not None:
                time = (self.steps_done + 1) / self.total_steps
                self.model.freeze(
                    self.scheduler.frozen(self._instability, self.model.candidates, time)
                )
        self._operands.clear()
        self.model.forget_statistics()  # they belonged to the weights before this step
        self.steps_done += 1

    def exempt_from_decay(
        self, optimizer: torch.optim.Optimizer, *, decoupled: bool | None = None
    ) -> Any:
        """Spare the weights inside the range of their layer's lowest current bit-width from weight decay.

        It is cancelled once a step, before the optimizer's own. Layers that make their weight operand anew in every
        forward pass (weight standardisation) are not spared: the scale of their weights means nothing.

        Args:
            optimizer: Trains the model's weights.
            decoupled: Whether it shrinks weights by `1 - lr * weight_decay` (AdamW) instead of adding
                `weight_decay * weight` to the gradient (SGD); None recognises torch's own.

        Returns:
            A handle; its `remove()` ends the exemption.

        Raises:
            ValueError: `decoupled` is None and the optimizer is not known.
        """
        return exempt_from_decay(
            optimizer, self.model, spared=self._direct_layers, decoupled=decoupled
        )

    def measure_instability(self) -> dict[str, dict[int, float]]:
        """Fraction of weights near a rounding threshold, of every layer with several weight bit-widths, for each.

        Layers that make their weight operand anew in every forward pass (weight standardisation) are measured on the
        last one that a path of this step made. Processes of a distributed run agree on the figures of the first.
        """
        margin = self._timing.margin
        found: dict[str, dict[int, Tensor]] = {}
        for path, layer in self.model.quantized_layers.items():
            if len(layer.candidates.weight) > 1:
                operand = self._operands.get(path, layer.weight)
                found[path] = unstable_fractions(operand, layer.weight_quantizer, margin=margin)
        figures = {
            path: {bits: float(part) for bits, part in parts.items()}
            for path, parts in found.items()
        }
        return of_first_process(figures)

    def time(self) -> float:
        """Share of the training that is done, from 0 to 1."""
        return self.steps_done / self.total_steps

    def state_dict(self) -> dict[str, Any]:
        """What continues the draws and schedules exactly where they stand, frozen candidates included."""
        return {
            "steps_done": self.steps_done,
            "generator": self._generator.get_state(),
            "frozen": {path: str(bits) for path, bits in self.model.frozen.items()},
            "instability": {
                path: {str(bits): fraction for bits, fraction in fractions.items()}
                for path, fractions in self._instability.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a `state_dict`.

        Raises:
            TrainingError: A key is missing or strange, or the state is that of another network.
        """
        expected = {"steps_done", "generator", "frozen", "instability"}
        if set(state) != expected:
            msg = f"not a state of OneShot: found keys {sorted(state)}, expected {sorted(expected)}"
            raise TrainingError(msg)
        try:
            self.model.freeze(state["frozen"])
        except BitsError as error:
            msg = f"not a state of this network: {error}"
            raise TrainingError(msg) from error
        self.steps_done = int(state["steps_done"])
        self._generator.set_state(state["generator"])
        self._instability = {
            path: {int(bits): float(fraction) for bits, fraction in fractions.items()}
            for path, fractions in state["instability"].items()
        }

    def loss_of(self, path: Path, output: Any, targets: Any, criterion: Criterion) -> Tensor:
        """See `Path.loss`."""
        step = self._step
        if step is None:
            msg = "a path's loss is taken inside the loop over paths(), while the path is active"
            raise TrainingError(msg)
        found = [_Part("task", 1.0, criterion(output, targets))]
        if path.is_max:
            step.max_logits = output.detach() if isinstance(output, Tensor) else None
        if self.distillation and (self.teacher is not None or not path.is_max):
            target = step.teacher_logits if path.is_max else step.max_logits
            mimic = distillation_loss(*_logits(output, target, path), temperature=self.temperature)
            found = [
                _Part("task", 1 - self.distillation, found[0].value),
                _Part("distillation", self.distillation, mimic),
            ]
        distances = step.distances()
        if distances:
            found.append(_Part("features", self.feature_weight, torch.stack(distances).sum()))
        weight = 0.0 if path.is_max else self.present_error_weight()
        if weight:
            found.append(
                _Part("quantization error", weight, self._quantization_error(path, step.candidates))
            )
        found += [_Part(_name(term), 1.0, term(path, output, targets)) for term in self.terms]
        self.parts = {part.name: part.value.detach() for part in found}
        total = (
            path.weight * torch.stack([part.weight * widened(part.value) for part in found]).sum()
        )
        # A distributed run waits for a gradient of every parameter, those of unused float norms included.
        return total if process_count() == 1 else touch(total, unused_parameters(self.model))

    def present_error_weight(self) -> float:
        """The weight that the quantization-error term has now."""
        passed = (self.time() - self.error_start) / (1 - self.error_start)
        return self.error_weight * (1 - math.cos(math.pi * passed)) / 2 if passed > 0 else 0.0

    def _teach(self, images: Any) -> Tensor | None:
        if self.teacher is None:
            return None
        with evaluating(self.teacher), torch.no_grad():
            logits: Tensor = self.teacher(images)
        return logits

    def _is_event(self) -> bool:
        """Whether this step ends with measuring instability."""
        wanted = self.scheduler is not None or isinstance(self.sampler, InstabilitySampler)
        return wanted and self._timing.is_event(self.steps_done, self.total_steps)

    def _needs_operands(self, index: int) -> bool:
        """Whether the weight operands of a path are used, by its loss or by an event."""
        return (index > 0 and self.present_error_weight() > 0) or self._is_event()

    def _direct_layers(self) -> dict[str, QuantizedLayer]:
        """Layers whose weight meets the input as it is; others make another tensor of it in every forward pass."""
        facts = self.model.anyprec_record.facts.layers
        return {
            path: layer
            for path, layer in self.model.quantized_layers.items()
            if not facts[path].derived
        }

    @contextmanager
    def _watching_derived_operands(self) -> Iterator[None]:
        """Note the weight operands that a path's forward pass makes."""
        facts = self.model.anyprec_record.facts.layers
        layers = {
            path: layer
            for path, layer in self.model.quantized_layers.items()
            if facts[path].derived and not facts[path].dynamic
        }

        def note(path: str, _input: Tensor, operand: Tensor) -> None:
            self._operands[path] = operand

        with ExitStack() as observed:
            for path, layer in layers.items():
                observed.enter_context(layer.operand_observers.including(partial(note, path)))
            yield

    def _quantization_error(self, path: Path, candidates: Candidates) -> Tensor:
        terms = []
        layers = self.model.quantized_layers
        operands = {name: layer.weight for name, layer in self._direct_layers().items()}
        for name, operand in {**operands, **self._operands}.items():
            quantizer = layers[name].weight_quantizer
            bits = path.config[name].weight
            index = quantizer.candidates.index(bits)
            qmin, qmax = quantizer.limits(index)
            coarser = 2 ** (bits - candidates[name].weight[0])
            step = quantizer.step[index]
            terms.append(
                quantization_error(
                    operand, step, qmin=qmin, qmax=qmax, axis=quantizer.axis, coarser=coarser
                )
            )
        return torch.stack(terms).sum()

    def close(self) -> None:
        """Leave the network as it was before, where it ran compiled; nothing otherwise."""
        self._features.close()


@dataclass
class _Step:
    """What the paths of one step share."""

    candidates: Candidates
    teacher_logits: Tensor | None = None
    max_logits: Tensor | None = None
    distances: Callable[[], list[Tensor]] = list


@dataclass(frozen=True)
class _Part:
    name: str
    weight: float
    value: Tensor


@dataclass(frozen=True)
class Path:
    """One path of a training step; its configuration is active while the loop body runs.

    Attributes:
        index: 0 is the max path.
        config: The active configuration.
        weight: Of this path's loss in the step: 1 for the max path, `random_weight / K` for each of the others.
        is_last: No other path follows: under DDP, gradients are reduced here and nowhere else (`no_sync`).
    """

    _oneshot: OneShot
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
            output: What the network returned at this path's configuration; for distillation, logits of shape
                `(batch, classes)`.
            targets: Whatever `criterion` takes.
            criterion: Task loss.

        Raises:
            TrainingError: The max path's loss was not taken first, or the loop over the paths is left.
        """
        return self._oneshot.loss_of(self, output, targets, criterion)


def _at_lowest(config: BitConfig, current: Candidates, every: Candidates) -> set[str]:
    """Layers with several weight bit-widths that are at the lowest of those in use."""
    several = {path for path, layer in every.items() if len(layer.weight) > 1}
    return {path for path in several if config[path].weight == current[path].weight[0]}


def _logits(output: Any, target: Tensor | None, path: Path) -> tuple[Tensor, Tensor]:
    if isinstance(output, Tensor) and target is not None:
        return output, target
    whose = "the teacher's" if path.is_max else "the max path's"
    found = (
        "" if isinstance(output, Tensor) else f" (the network returns a {type(output).__name__})"
    )
    msg = f"distillation needs {whose} logits as one tensor{found}: call loss() on every path in order, or set "
    msg += "distillation=0"
    raise TrainingError(msg)


def _name(term: Term) -> str:
    return getattr(term, "__name__", type(term).__name__)


def _require(condition: bool, message: str) -> None:  # noqa: FBT001 (reads as a sentence)
    if not condition:
        raise ValueError(message)

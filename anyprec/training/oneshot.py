"""The one-shot training step: one max path, then K random paths, in the user's own loop.

Method of RFQuant (Tang et al., CVPR 2024), section 3: every step runs the network at its highest precision and at K
random mixed precisions, and takes one optimizer step on the gradients of all of them. The random paths learn from the
labels and from the max path's logits (in-place distillation). Gradients are averaged over the paths, not summed, so a
learning rate means what it means elsewhere (see docs/differences.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anyprec.bits import BitConfig, Bits
from anyprec.errors import TrainingError
from anyprec.model import ConvertedModel, require_converted
from anyprec.training.losses import distillation_loss

Criterion = Callable[[Tensor, Any], Tensor]
"""Task loss of (network output, targets), a scalar."""


class OneShot:
    """Draws the paths of each training step and composes their losses.

    Args:
        model: A converted and calibrated model.
        total_steps: Optimizer steps of the whole training; schedules are fractions of it.
        random_paths: Number K of random paths in a step, besides the max path.
        distillation: Share of the distillation term in the loss of a random path; the task loss has the rest.
        temperature: Of the distillation.
        seed: Of the generator that draws the bit-widths. With the same seed every process draws the same paths.

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

    def __init__(
        self,
        model: ConvertedModel,
        *,
        total_steps: int,
        random_paths: int = 3,
        distillation: float = 0.5,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.model = require_converted(model, purpose="OneShot")
        _require(total_steps >= 1, f"total_steps={total_steps} must be at least 1")
        _require(random_paths >= 0, f"random_paths={random_paths} must not be negative")
        _require(0 <= distillation <= 1, f"distillation={distillation} must be from 0 to 1")
        _require(temperature > 0, f"temperature={temperature} must be positive")
        self.total_steps = total_steps
        self.random_paths = random_paths
        self.distillation = distillation
        self.temperature = temperature
        self.steps_done = 0
        self._generator = torch.Generator().manual_seed(seed)
        self._max_logits: Tensor | None = None

    def paths(self) -> Iterator[Path]:
        """The paths of one step (or of one micro-batch, under gradient accumulation), each made active in turn.

        The model's precision is restored at the end, also if the loop is left early.
        """
        configs = [self.highest_config(), *(self.random_config() for _ in range(self.random_paths))]
        self._max_logits = None
        with self.model.using_bits(configs[0]):
            for index, config in enumerate(configs):
                self.model.set_bits(config)
                yield Path(self, index, config, weight=1 / len(configs))
        self._max_logits = None

    def highest_config(self) -> BitConfig:
        """Every layer at its highest candidates."""
        return BitConfig({path: layer.highest for path, layer in self.model.candidates.items()})

    def random_config(self) -> BitConfig:
        """Weight and activation bit-widths of every layer drawn independently and uniformly from its candidates."""
        candidates = self.model.candidates
        draws = torch.rand(len(candidates), 2, generator=self._generator, dtype=torch.float64).tolist()
        return BitConfig(
            {
                path: Bits(_pick(layer.weight, weight_draw), _pick(layer.activation, activation_draw))
                for (path, layer), (weight_draw, activation_draw) in zip(candidates.items(), draws, strict=True)
            }
        )

    def step(self) -> None:
        """Say that the optimizer has stepped.

        Raises:
            TrainingError: More steps than `total_steps`.
        """
        if self.steps_done >= self.total_steps:
            msg = f"OneShot was made for total_steps={self.total_steps} and has done them all: its schedules end there"
            raise TrainingError(msg)
        self.steps_done += 1

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs: steps done and the state of the generator."""
        return {"steps_done": self.steps_done, "generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a `state_dict`.

        Raises:
            TrainingError: A key is missing or strange.
        """
        if set(state) != {"steps_done", "generator"}:
            msg = f"not a state of OneShot: found keys {sorted(state)}, expected 'generator' and 'steps_done'"
            raise TrainingError(msg)
        self.steps_done = int(state["steps_done"])
        self._generator.set_state(state["generator"])

    def loss_of(self, path: Path, output: Tensor, targets: Any, criterion: Criterion) -> Tensor:
        """See `Path.loss`."""
        task = criterion(output, targets)
        if path.is_max:
            self._max_logits = output.detach() if isinstance(output, Tensor) else None
            return path.weight * task
        if self.distillation == 0:
            return path.weight * task
        if self._max_logits is None:
            found = "" if isinstance(output, Tensor) else f" (the network returns a {type(output).__name__})"
            msg = "distillation needs the max path's logits as one tensor"
            msg += f"{found}: call loss() on every path in order, or set distillation=0"
            raise TrainingError(msg)
        mimic = distillation_loss(output, self._max_logits, temperature=self.temperature)
        return path.weight * ((1 - self.distillation) * task + self.distillation * mimic)


@dataclass(frozen=True)
class Path:
    """One path of a training step; its configuration is active while the loop body runs.

    Attributes:
        index: 0 is the max path.
        config: The active configuration.
        weight: Share of this path in the step, `1 / (1 + K)`.
    """

    _oneshot: OneShot
    index: int
    config: BitConfig
    weight: float

    @property
    def is_max(self) -> bool:
        """Whether every layer is at its highest precision."""
        return self.index == 0

    def loss(self, output: Tensor, targets: Any, criterion: Criterion) -> Tensor:
        """The loss of this path, already multiplied by its weight: call `backward` on it.

        Args:
            output: What the network returned at this path's configuration, shape `(batch, classes)`.
            targets: Whatever `criterion` takes.
            criterion: Task loss.

        Raises:
            TrainingError: The max path's loss was not taken first.
        """
        return self._oneshot.loss_of(self, output, targets, criterion)


def _pick(candidates: tuple[int, ...], draw: float) -> int:
    return candidates[int(draw * len(candidates))]


def _require(condition: bool, message: str) -> None:  # noqa: FBT001 (reads as a sentence)
    if not condition:
        raise ValueError(message)

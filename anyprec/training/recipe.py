"""The settings of a training run in one value: our defaults, and the paper's.

The settings of the method itself are explained at `OneShot`, those of the loop at `fit`; docs/differences.md says where
the two recipes differ, and why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from anyprec.training.samplers import SamplerLike
from anyprec.training.scheduler import BitWidthScheduler


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of `OneShot` and `fit`.

    Attributes:
        random_paths, random_weight, distillation, temperature: See `OneShot`.
        feature_weight, error_weight, error_start, scheduler, sampler: See `OneShot`.
        spare_decay: Weights inside their layer's lowest range are not decayed, see `OneShot.exempt_from_decay`.
        lr: Peak learning rate of SGD, per optimizer step.
        momentum: Of SGD, with Nesterov.
        weight_decay: For weights only.
        step_lr: Peak learning rate of step sizes in an Adam of their own; None trains them in the SGD, at `lr`.
        warmup: Fraction of all steps with a rising learning rate.
        clip_value: Largest magnitude of a gradient element; None does not clip.
        clip_norm: Largest norm of all gradients together; None does not clip.
        ema_decay: Of the moving average of weights, with timm's warm-up; None takes none.
        conversion: Arguments of `convert` that belong to the recipe.

    Raises:
        ValueError: A number is out of range.
    """

    random_paths: int = 3
    random_weight: float = 2.0
    distillation: float = 0.5
    temperature: float = 1.0
    feature_weight: float = 0.0
    error_weight: float = 0.0
    error_start: float = 0.25
    scheduler: BitWidthScheduler | None = None
    sampler: SamplerLike = "sandwich"
    spare_decay: bool = False
    lr: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 2.5e-5
    step_lr: float | None = None
    warmup: float = 0.05
    clip_value: float | None = 1.0
    clip_norm: float | None = None
    ema_decay: float | None = None
    conversion: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        for name in ("lr", "step_lr", "clip_value", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                msg = f"{name}={value} must be positive"
                raise ValueError(msg)
        if not 0 <= self.warmup < 1:
            msg = f"warmup={self.warmup} is a fraction of all steps: from 0, below 1"
            raise ValueError(msg)
        for name in ("momentum", "ema_decay"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                msg = f"{name}={value} must be from 0, below 1"
                raise ValueError(msg)

    @classmethod
    def paper(cls) -> Recipe:
        """The settings of the paper (Tang et al., CVPR 2024, sections 3 and 4, and its published code).

        They are meant for 150 epochs of ImageNet at batch size 512. `convert(network, **recipe.conversion)`
        makes the network as the paper's, `fit(model, loader, epochs=150, recipe=recipe)` trains it.

        Example:
            >>> import timm, anyprec
            >>> recipe = anyprec.Recipe.paper()
            >>> model = anyprec.convert(timm.create_model("test_resnet"), **recipe.conversion)
            >>> model.candidates["layer1.0.conv1"].weight
            (2, 3, 4, 5, 6)
        """
        return cls(
            random_weight=3.0,
            feature_weight=0.01,
            error_weight=0.1,
            scheduler=BitWidthScheduler(),
            sampler="uniform",
            spare_decay=True,
            lr=0.04,
            step_lr=1e-5,
            warmup=5 / 150,
            ema_decay=0.9997,
            conversion=MappingProxyType(
                {"bits": (2, 3, 4, 5, 6), "per_channel": False, "norm": "per-pair"}
            ),
        )

    @property
    def oneshot(self) -> dict[str, Any]:
        """The arguments of `OneShot` among the settings."""
        return {name: getattr(self, name) for name in _ONESHOT}

    def clip_gradients(self, *optimizers: torch.optim.Optimizer) -> None:
        """Clip the gradients of all parameters of these optimizers together, as the settings say."""
        parameters = [
            p for one in optimizers for group in one.param_groups for p in group["params"]
        ]
        if self.clip_value is not None:
            nn.utils.clip_grad_value_(parameters, self.clip_value)
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, self.clip_norm)

    def changed(self, **changes: Any) -> Recipe:
        """A recipe with other values of some settings.

        Raises:
            ValueError: There is no such setting, or a number is out of range.
        """
        known = [entry.name for entry in dataclasses.fields(self)]
        unknown = sorted(set(changes) - set(known))
        if unknown:
            msg = f"no setting {unknown[0]!r} in a recipe; settings are {', '.join(known)}"
            raise ValueError(msg)
        return dataclasses.replace(self, **changes)


_ONESHOT = (
    "random_paths",
    "random_weight",
    "distillation",
    "temperature",
    "feature_weight",
    "error_weight",
    "error_start",
    "scheduler",
    "sampler",
)

"""The settings of a training run in one value: our defaults, and the paper's.

`OneShot` takes the settings of the method from it, `fit` those of the loop as well.
docs/differences.md says where the two recipes differ, and why.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, get_args

import torch
from torch import nn

from anyprec.training.feature_sources import FeaturePoint
from anyprec.training.samplers import SamplerLike, sampler_of
from anyprec.training.scheduler import BitWidthScheduler


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of `OneShot` (those of the method) and of `fit` (all of them).

    Attributes:
        random_paths: Number K of random paths in a step, besides the max path.
        random_weight: Weight of the random paths together, next to the max path's 1. Each has
            `random_weight / K`, so a learning rate means the same whatever K is. More serves the
            lowest bit-widths, less the highest. The published code of the paper sums all
            gradients, which is K.
        distillation: Share of the distillation term in the loss; the task loss has the rest.
        temperature: Of the distillation.
        feature_weight: Weight of information distortion mitigation. For every layer that a random
            path draws at its lowest weight bit-width, this is the mean squared error between its
            feature and the max path's. 0 turns the term off.
        features: Which tensor the feature of a layer is. `"after-activation"`: its norm's output
            after the activations and the residual sum that follow, as the published code has it
            where these work in place. `"norm"`: its norm's output. Layers without a norm have the
            output of the activation right behind them, or their own.
        error_weight: Weight of the quantization-error term at the end of training; it rises to
            that on a cosine, from 0 at `error_start`. 0 turns the term off.
        error_start: Time from 0 to 1, see `error_weight`.
        scheduler: When to freeze the lowest bit-width of unstable layers; None never does.
        sampler: The law of the random paths: `"sandwich"` (the lowest precision, then uniform
            draws), `"uniform"` (the paper's), `"instability"` (unstable bit-widths less often), or
            an object with a method `draw`.
        spare_decay: Weights inside their layer's lowest range are not decayed, see
            `OneShot.exempt_from_decay`. Like all settings below, `fit` uses it, `OneShot` does not.
        lr: Peak learning rate of SGD, per optimizer step.
        momentum: Of SGD, with Nesterov.
        weight_decay: For weights only.
        step_lr: Peak learning rate of step sizes in an Adam of their own; None trains them in the
            SGD, at `lr`.
        warmup: Fraction of all steps with a rising learning rate.
        clip_value: Largest magnitude of a gradient element; None does not clip.
        clip_norm: Largest magnitude of all gradients together; None does not clip.
        ema_decay: Of the moving average of weights, with timm's warm-up; None takes none.
        conversion: Arguments of `convert` that belong to the recipe.

    Raises:
        ValueError: A number is out of range, or the sampler is not known.
    """

    random_paths: int = 3
    random_weight: float = 2.0
    distillation: float = 0.5
    temperature: float = 1.0
    feature_weight: float = 0.0
    features: FeaturePoint = "after-activation"
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
        for name in ("random_weight", "temperature", "lr", "step_lr", "clip_value", "clip_norm"):
            self._require(name, lambda value: value > 0, "must be positive")
        for name in ("random_paths", "feature_weight", "error_weight"):
            self._require(name, lambda value: value >= 0, "must not be negative")
        for name in ("momentum", "ema_decay"):
            self._require(name, lambda value: 0 <= value < 1, "must be from 0, below 1")
        self._require("distillation", lambda value: 0 <= value <= 1, "must be from 0 to 1")
        self._require("error_start", lambda value: 0 <= value < 1, "is a time: from 0, below 1")
        self._require(
            "warmup",
            lambda value: 0 <= value < 1,
            "is a fraction of all steps: from 0, below 1",
        )
        if self.features not in get_args(FeaturePoint):
            msg = f"features={self.features!r} is not known: use one of {get_args(FeaturePoint)}"
            raise ValueError(msg)
        sampler_of(self.sampler)

    @classmethod
    def paper(cls) -> Recipe:
        """The settings of the paper (Tang et al., CVPR 2024, sections 3 and 4, and its code).

        They are meant for 150 epochs of ImageNet at batch size 512. `convert(network,
        **recipe.conversion)` makes the network as the paper's, `fit(model, loader, epochs=150,
        recipe=recipe)` trains it.

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
            features="after-activation",
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

    def changed(self, **changes: Any) -> Recipe:
        """A recipe with other values of some settings.

        Raises:
            ValueError: There is no such setting, or a number is out of range.
        """
        names = [setting.name for setting in dataclasses.fields(self)]
        unknown = sorted(set(changes) - set(names))
        if unknown:
            msg = f"no setting {unknown[0]!r} in a recipe; settings are {', '.join(names)}"
            raise ValueError(msg)
        return dataclasses.replace(self, **changes)

    def clip_gradients(self, *optimizers: torch.optim.Optimizer) -> None:
        """Clip the gradients of all parameters of these optimizers together."""
        parameters: list[nn.Parameter] = []
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                parameters.extend(group["params"])
        if self.clip_value is not None:
            nn.utils.clip_grad_value_(parameters, self.clip_value)
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, self.clip_norm)

    def _require(self, name: str, is_valid: Callable[[Any], bool], rule: str) -> None:
        value = getattr(self, name)
        if value is None and name in _MAY_BE_NONE:
            return
        if value is None or not is_valid(value):
            msg = f"{name}={value} {rule}"
            raise ValueError(msg)


_MAY_BE_NONE = frozenset({"step_lr", "clip_value", "clip_norm", "ema_decay"})


def resolve_recipe(recipe: object, changes: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe that an argument `recipe=` asks for, with some settings changed.

    Args:
        recipe: A `Recipe`, or None for `Recipe()`.
        changes: Settings by name.

    Raises:
        ValueError: `recipe` is something else, or a setting is unknown or out of range.
    """
    if recipe is None:
        recipe = Recipe()
    elif not isinstance(recipe, Recipe):
        msg = f"recipe={recipe!r} is not a recipe: use anyprec.Recipe() for the default settings "
        msg += "or anyprec.Recipe.paper() for the paper's"
        raise ValueError(msg)
    return recipe.changed(**(changes or {}))

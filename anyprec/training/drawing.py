"""Which configurations the training paths take.

A sampler draws them, from candidates that a bit-width scheduler freezes and frees. Both go by the
instability of layers, which is measured at the scheduler's events.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from anyprec.bits import BitConfig
from anyprec.errors import BitsError, TrainingError
from anyprec.model.converted import ConvertedModel
from anyprec.runtime.processes import of_first_process
from anyprec.runtime.transfers import numbers_of
from anyprec.training.recipe import Recipe
from anyprec.training.samplers import InstabilitySampler, sampler_of
from anyprec.training.scheduler import BitWidthScheduler, unstable_fractions


class ConfigDrawer:
    """Draws configurations, and at events measures instability and freezes candidates.

    Args:
        model: A converted model.
        recipe: Its `sampler` and `scheduler` are used.
        total_steps: Optimizer steps of the whole training.
        seed: Of the generator that the sampler draws from.
    """

    def __init__(
        self, model: ConvertedModel, recipe: Recipe, *, total_steps: int, seed: int
    ) -> None:
        self._model = model
        self._total_steps = total_steps
        self._sampler = sampler_of(recipe.sampler)
        self._scheduler = recipe.scheduler
        # A sampler may need instability without a scheduler: it is measured at the default times.
        self._times = recipe.scheduler or BitWidthScheduler()
        self._generator = torch.Generator().manual_seed(seed)
        self._instability: dict[str, dict[int, float]] = {}

    def draw(self, count: int) -> list[BitConfig]:
        """Configurations drawn by the sampler from the candidates that are not frozen."""
        return self._sampler.draw(
            self._model.current_candidates,
            count,
            generator=self._generator,
            instability=self._instability,
        )

    def is_event(self, step: int) -> bool:
        """Whether training step `step`, from 0, ends with measuring instability."""
        is_needed = self._scheduler is not None or isinstance(self._sampler, InstabilitySampler)
        return is_needed and self._times.is_event(step, self._total_steps)

    def end_step(self, step: int, derived: Mapping[str, Tensor]) -> None:
        """Measure and freeze, if training step `step` ends with an event.

        Args:
            step: From 0.
            derived: Weight operands of layers that do not quantize their weight parameter itself.
        """
        if not self.is_event(step):
            return
        self._instability = self._measure_instability(derived)
        if self._scheduler is not None:
            time = (step + 1) / self._total_steps
            frozen = self._scheduler.choose_frozen(
                self._instability,
                self._model.candidates,
                time,
                current=self._model.current_candidates,
            )
            self._model.freeze(frozen)

    def state_dict(self) -> dict[str, Any]:
        """What continues the draws exactly where they stand, frozen candidates included."""
        instability = {}
        for path, fractions in self._instability.items():
            instability[path] = {str(bits): fraction for bits, fraction in fractions.items()}
        return {
            "generator": self._generator.get_state(),
            "frozen": {path: str(bits) for path, bits in self._model.frozen.items()},
            "instability": instability,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a `state_dict`.

        Raises:
            TrainingError: It is the state of another network.
        """
        try:
            self._model.freeze(state["frozen"])
        except BitsError as error:
            msg = f"not a state of this network: {error}"
            raise TrainingError(msg) from error
        self._generator.set_state(state["generator"])
        self._instability = {}
        for path, fractions in state["instability"].items():
            self._instability[path] = {int(bits): float(value) for bits, value in fractions.items()}

    def _measure_instability(self, derived: Mapping[str, Tensor]) -> dict[str, dict[int, float]]:
        """Fraction of weights near a rounding threshold, for each weight bit-width of each layer.

        Layers with one weight bit-width are left out. Processes of a distributed run agree on the
        figures of the first.
        """
        fractions: dict[tuple[str, int], Tensor] = {}
        for path, layer in self._model.quantized_layers.items():
            if len(layer.candidates.weight) == 1:
                continue
            operand = derived.get(path, layer.weight)
            of_layer = unstable_fractions(
                operand, layer.weight_quantizer, margin=self._times.margin
            )
            for bits, fraction in of_layer.items():
                fractions[path, bits] = fraction
        measured: dict[str, dict[int, float]] = {}
        values = numbers_of(list(fractions.values()))
        for (path, bits), value in zip(fractions, values, strict=True):
            measured.setdefault(path, {})[bits] = value
        return of_first_process(measured)

"""The bit-width scheduler: when which layers lose their lowest weight bit-width for a while.

Method of RFQuant (Tang et al., CVPR 2024), section 3.3. Bit-widths that share weights disturb each
other, and the lowest one of an unstable layer most: its weights lie near rounding thresholds and
flip at every step. So at some moments of training the most unstable layers lose their lowest
candidate until the next such moment, fewer and fewer of them.

Instability is taken over the candidates in use. A frozen layer has lost the largest term of its
mean, so it ranks lower at the next event and is freed: the frozen set rotates.

Times are fractions of training, so that a short run and a long one mean the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from anyprec.bits import Bits, Candidates, LayerCandidates
from anyprec.nn.channels import along
from anyprec.nn.functional import effective_step
from anyprec.nn.quantizers import WeightQuantizer

Instability = Mapping[str, Mapping[int, float]]
"""Path of a layer to its weight bit-widths, each with a fraction of weights.

These are the weights that lie near a rounding threshold.
"""


@dataclass(frozen=True)
class BitWidthScheduler:
    """When to freeze, and how much.

    The defaults are the paper's (150 epochs of ImageNet), as fractions.

    Attributes:
        start: Time of the first event.
        period: Time between events.
        late: From this time on, events are `late_period` apart.
        late_period: See `late`.
        first_ratio: Share of the layers to freeze at the beginning; it falls on a cosine.
        last_ratio: That share at the end.
        margin: A weight is unstable if it is further than this from its code, in step sizes (half a
            step is the threshold itself).
        activations: Freeze the lowest activation bit-width of these layers too.

    Raises:
        ValueError: A number is out of range.

    Example:
        >>> BitWidthScheduler().ratio(0.0), BitWidthScheduler().ratio(1.0)
        (0.5, 0.2)
    """

    start: float = 6 / 150
    period: float = 2 / 150
    late: float = 0.72
    late_period: float = 15 / 150
    first_ratio: float = 0.5
    last_ratio: float = 0.2
    margin: float = 0.375
    activations: bool = False

    def __post_init__(self) -> None:
        for name in ("start", "late", "first_ratio", "last_ratio"):
            _require_within(name, getattr(self, name), 0.0, 1.0)
        for name in ("period", "late_period"):
            if not getattr(self, name) > 0:
                msg = f"{name}={getattr(self, name)} must be positive"
                raise ValueError(msg)
        _require_within("margin", self.margin, 0.0, 0.5)

    def is_event(self, step: int, total_steps: int) -> bool:
        """Whether an event falls within training step `step` (from 0)."""
        before = self._events_before(step / total_steps)
        return self._events_before((step + 1) / total_steps) > before

    def ratio(self, time: float) -> float:
        """Share of the layers to freeze at `time`, from 0 to 1."""
        fall = self.first_ratio - self.last_ratio
        return self.last_ratio + fall * (1 + math.cos(math.pi * time)) / 2

    def choose_frozen(
        self,
        instability: Instability,
        candidates: Candidates,
        time: float,
        *,
        current: Candidates | None = None,
    ) -> dict[str, Bits]:
        """Choose at an event which layers lose their lowest candidates, until the next event.

        Args:
            instability: Of every layer that has several weight bit-widths, at all of them. The
                measure of a layer is the mean of the fraction divided by the bit-width, over its
                bit-widths in use.
            candidates: All candidates of every layer.
            time: From 0 to 1.
            current: The candidates in use, without those that the last event froze; None is all.

        Returns:
            The lowest precision that these layers keep, as `ConvertedModel.freeze` takes it. All
            others keep all their candidates.
        """
        paths = [path for path, layer in candidates.items() if len(layer.weight) > 1]
        measures = {}
        for path in paths:
            in_use = candidates[path] if current is None else current[path]
            measures[path] = layer_instability(
                {bits: instability[path][bits] for bits in in_use.weight}
            )
        # The sort is stable: of equally unstable layers the first in the network is frozen.
        paths.sort(key=lambda path: -measures[path])
        chosen = set(paths[: int(len(paths) * self.ratio(time))])
        return {
            path: self._second_lowest(candidates[path]) for path in candidates if path in chosen
        }

    def _second_lowest(self, candidates: LayerCandidates) -> Bits:
        activation = candidates.activation[0]
        if self.activations and len(candidates.activation) > 1:
            activation = candidates.activation[1]
        return Bits(candidates.weight[1], activation)

    def _events_before(self, time: float) -> int:
        """Number of events in `[0, time)`."""
        early_end = max(self.start, self.late)
        if time <= early_end:
            return _count(time - self.start, self.period)
        early = _count(early_end - self.start, self.period)
        # The late events go on from where the next early one would have been.
        late_start = self.start + early * self.period
        return early + _count(time - late_start, self.late_period)


def layer_instability(fractions: Mapping[int, float]) -> float:
    """One number for a layer: the mean of the fractions, each divided by its bit-width.

    Method of the paper, section 3.3.
    """
    return sum(fraction / bits for bits, fraction in fractions.items()) / len(fractions)


@torch.no_grad()
def unstable_fractions(
    weight: Tensor, quantizer: WeightQuantizer, *, margin: float
) -> dict[int, Tensor]:
    """Fraction of the weights near a rounding threshold, for each candidate bit-width.

    Args:
        weight: The weight as it is quantized.
        quantizer: Its step sizes.
        margin: A weight counts if `|w/s - round(w/s)| > margin` and it is not clipped.

    Returns:
        Bit-width to a scalar tensor.
    """
    fractions = {}
    for index, bits in enumerate(quantizer.candidates):
        qmin, qmax = quantizer.limits(index)
        scale = along(effective_step(quantizer.step[index]), quantizer.axis, weight)
        ratio = weight.float() / scale
        is_near = (ratio - ratio.round()).abs_() > margin
        is_inside = (ratio >= qmin) & (ratio <= qmax)
        fractions[bits] = (is_near & is_inside).float().mean()
    return fractions


def _count(length: float, period: float) -> int:
    """Number of multiples of `period`, zero included, in `[0, length)`."""
    return max(0, math.ceil(length / period - 1e-9))


def _require_within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        msg = f"{name}={value} must be from {low:g} to {high:g}"
        raise ValueError(msg)

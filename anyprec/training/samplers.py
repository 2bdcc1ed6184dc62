"""Which random paths a one-shot step takes: the laws from which configurations are drawn.

A sampler sees candidates and a generator, no network: with the same generator every process draws
the same paths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch

from anyprec.bits import BitConfig, Bits, Candidates, LayerCandidates, lowest_config
from anyprec.training.scheduler import Instability


@runtime_checkable
class Sampler(Protocol):
    """Draws the random paths of a step."""

    def draw(
        self,
        candidates: Candidates,
        count: int,
        *,
        generator: torch.Generator,
        instability: Instability,
    ) -> list[BitConfig]:
        """Configurations for `count` paths.

        Args:
            candidates: Current candidates of every layer, without the frozen ones.
            count: Number of paths.
            generator: The only source of randomness.
            instability: Measured last; empty before the first time.
        """
        ...


@dataclass(frozen=True)
class UniformSampler:
    """Weight and activation bit-widths of every layer, drawn independently and uniformly.

    This is the paper's.
    """

    def draw(
        self,
        candidates: Candidates,
        count: int,
        *,
        generator: torch.Generator,
        instability: Instability,  # noqa: ARG002 (of the protocol)
    ) -> list[BitConfig]:
        """See `Sampler`."""
        return [_draw_uniformly(candidates, generator) for _ in range(count)]


@dataclass(frozen=True)
class SandwichSampler:
    """The lowest precision first, then uniform draws.

    With the max path, both ends are trained in every step: the rule of Yu and Huang, "Universally
    slimmable networks" (ICCV 2019). A single path is the lowest precision in half of the steps, and
    a uniform draw in the others.
    """

    def draw(
        self,
        candidates: Candidates,
        count: int,
        *,
        generator: torch.Generator,
        instability: Instability,  # noqa: ARG002 (of the protocol)
    ) -> list[BitConfig]:
        """See `Sampler`."""
        lowest = lowest_config(candidates)
        if count == 0:
            return []
        if count == 1 and torch.rand((), generator=generator) >= 0.5:
            return [_draw_uniformly(candidates, generator)]
        return [lowest, *(_draw_uniformly(candidates, generator) for _ in range(count - 1))]


@dataclass(frozen=True)
class InstabilitySampler:
    """Unstable weight bit-widths are drawn less often: a soft form of freezing.

    With the fraction f of weights near a rounding threshold, bit-width b of a layer is drawn with a
    probability proportional to `exp(-strength * u / mean(u))`, `u = f / b`, the mean over the
    layer's candidates. Activation bit-widths are drawn uniformly; so are weight bit-widths until
    instability has been measured.

    Attributes:
        strength: 0 is uniform; a negative one draws unstable bit-widths more often.
    """

    strength: float = 1.0

    def draw(
        self,
        candidates: Candidates,
        count: int,
        *,
        generator: torch.Generator,
        instability: Instability,
    ) -> list[BitConfig]:
        """See `Sampler`."""
        probabilities = {}
        for path, layer in candidates.items():
            probabilities[path] = self.probabilities(layer, instability.get(path, {}))
        return [_draw(candidates, probabilities, generator) for _ in range(count)]

    def probabilities(
        self, candidates: LayerCandidates, fractions: Mapping[int, float]
    ) -> tuple[float, ...]:
        """Probability of each weight candidate of a layer."""
        measures = [fractions.get(bits, 0.0) / bits for bits in candidates.weight]
        mean = sum(measures) / len(measures)
        if mean == 0:
            return _uniform(len(measures))
        odds = [math.exp(-self.strength * measure / mean) for measure in measures]
        total = sum(odds)
        return tuple(odd / total for odd in odds)


SamplerLike = Sampler | Literal["sandwich", "uniform", "instability"]
"""A sampler, or the name of one with its default settings."""

_BY_NAME: dict[str, Sampler] = {
    "uniform": UniformSampler(),
    "sandwich": SandwichSampler(),
    "instability": InstabilitySampler(),
}


def sampler_of(sampler: SamplerLike) -> Sampler:
    """The sampler of that name, or `sampler` itself.

    Raises:
        ValueError: There is none of that name, or it has no `draw`.
    """
    if isinstance(sampler, str) and sampler in _BY_NAME:
        return _BY_NAME[sampler]
    if isinstance(sampler, Sampler):
        return sampler
    msg = f"sampler={sampler!r} is not known: use one of {sorted(_BY_NAME)}, "
    msg += "or an object with a method draw"
    raise ValueError(msg)


def _draw_uniformly(candidates: Candidates, generator: torch.Generator) -> BitConfig:
    probabilities = {path: _uniform(len(layer.weight)) for path, layer in candidates.items()}
    return _draw(candidates, probabilities, generator)


def _uniform(count: int) -> tuple[float, ...]:
    return (1 / count,) * count


def _draw(
    candidates: Candidates,
    probabilities: Mapping[str, tuple[float, ...]],
    generator: torch.Generator,
) -> BitConfig:
    """A configuration; `probabilities` are those of each layer's weight candidates."""
    # In float64, and one call for all layers: every process gets the same numbers.
    draws = torch.rand(len(candidates), 2, generator=generator, dtype=torch.float64).tolist()
    chosen: dict[str, Bits] = {}
    # A network has many layers and few precisions: to make one takes as long as the draw.
    precisions: dict[tuple[int, int], Bits] = {}
    for path, (weight_draw, activation_draw) in zip(candidates, draws, strict=True):
        layer = candidates[path]
        weight = _pick(layer.weight, probabilities[path], weight_draw)
        activation = layer.activation[int(activation_draw * len(layer.activation))]
        bits = precisions.get((weight, activation))
        if bits is None:
            bits = precisions[weight, activation] = Bits(weight, activation)
        chosen[path] = bits
    return BitConfig(chosen)


def _pick(widths: tuple[int, ...], probabilities: tuple[float, ...], draw: float) -> int:
    """The width in whose share of the unit interval `draw` lies."""
    for width, probability in zip(widths, probabilities, strict=True):
        draw -= probability
        if draw < 0:
            return width
    return widths[-1]  # the probabilities may sum to a little less than 1

"""Which random paths a one-shot step takes: the laws from which configurations are drawn.

A sampler sees candidates and a generator, no network: with the same generator every process draws the same paths.
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
    """Weight and activation bit-widths of every layer, each drawn independently and uniformly (the paper's)."""

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
    """The lowest precision first, then uniform draws: with the max path, both ends are trained in every step.

    The rule of Yu and Huang, "Universally slimmable networks" (ICCV 2019). A single path is the lowest precision in half
    of the steps, and a uniform draw in the others.
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
        if count == 1:
            is_lowest = bool(torch.rand((), generator=generator) < 0.5)
            return [lowest if is_lowest else _draw_uniformly(candidates, generator)]
        return [lowest, *(_draw_uniformly(candidates, generator) for _ in range(count - 1))][:count]


@dataclass(frozen=True)
class InstabilitySampler:
    """Unstable weight bit-widths are drawn less often: a soft form of freezing.

    With the fraction f of weights near a rounding threshold, bit-width b of a layer is drawn with a probability
    proportional to `exp(-strength * u / mean(u))`, `u = f / b`, the mean over the layer's candidates. Activation
    bit-widths are drawn uniformly; so are weight bit-widths until instability has been measured.

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
        shares = {
            path: self.probabilities(layer, instability.get(path, {}))
            for path, layer in candidates.items()
        }  # fmt: skip
        return [_draw(candidates, shares, generator) for _ in range(count)]

    def probabilities(
        self, candidates: LayerCandidates, fractions: Mapping[int, float]
    ) -> tuple[float, ...]:
        """Probability of each weight candidate of a layer."""
        unrest = [fractions.get(bits, 0.0) / bits for bits in candidates.weight]
        mean = sum(unrest) / len(unrest)
        if mean == 0:
            return (1 / len(unrest),) * len(unrest)
        shares = [math.exp(-self.strength * value / mean) for value in unrest]
        return tuple(share / sum(shares) for share in shares)


SamplerLike = Sampler | Literal["sandwich", "uniform", "instability"]
"""A sampler, or the name of one with its default settings."""

_BY_NAME: dict[str, Sampler] = {
    "uniform": UniformSampler(),
    "sandwich": SandwichSampler(),
    "instability": InstabilitySampler(),
}


def sampler_of(sampler: SamplerLike) -> Sampler:
    """The sampler that is meant.

    Raises:
        ValueError: There is none of that name, or it has no `draw`.
    """
    found = _BY_NAME.get(sampler) if isinstance(sampler, str) else sampler
    if not isinstance(found, Sampler):
        msg = f"sampler={sampler!r} is not known: use one of {sorted(_BY_NAME)}, or an object with a method draw"
        raise ValueError(msg)
    return found


def _draw_uniformly(candidates: Candidates, generator: torch.Generator) -> BitConfig:
    shares = {
        path: (1 / len(layer.weight),) * len(layer.weight) for path, layer in candidates.items()
    }
    return _draw(candidates, shares, generator)


def _draw(
    candidates: Candidates,
    weight_shares: Mapping[str, tuple[float, ...]],
    generator: torch.Generator,
) -> BitConfig:
    draws = torch.rand(len(candidates), 2, generator=generator, dtype=torch.float64).tolist()
    chosen = {}
    for (path, layer), (weight_draw, activation_draw) in zip(
        candidates.items(), draws, strict=True
    ):
        weight = _pick(layer.weight, weight_shares[path], weight_draw)
        activation = layer.activation[int(activation_draw * len(layer.activation))]
        chosen[path] = Bits(weight, activation)
    return BitConfig(chosen)


def _pick(widths: tuple[int, ...], shares: tuple[float, ...], draw: float) -> int:
    for width, share in zip(widths, shares, strict=True):
        draw -= share
        if draw < 0:
            return width
    return widths[-1]

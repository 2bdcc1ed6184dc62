"""Which configurations a network is reconstructed at, one for each step."""

from __future__ import annotations

import random

from anyprec.bits import BitConfig, Bits, Candidates, LayerCandidates

LOWEST = 3
"""Bit-widths below are left out where there are others: they cost those, and stay at chance."""


class Draws:
    """Draws uniform configurations, and mixed ones around a bit-width, in turn.

    Low bit-widths come up more often, in inverse proportion to the root of their bits, counted over
    any stretch of steps, so that a short run is as fair as a long one.

    Args:
        candidates: Of every layer.
        seed: Of the draws.
    """

    def __init__(self, candidates: Candidates, seed: int) -> None:
        self._candidates = candidates
        self._random = random.Random(seed)
        widths = sorted({width for layer in candidates.values() for width in layer.weight})
        self._widths = [width for width in widths if width >= LOWEST] or widths
        self._owed = dict.fromkeys(self._widths, 0.0)
        self._mixed = dict.fromkeys(self._widths, False)

    def draw(self) -> tuple[str, BitConfig]:
        """A configuration, and a name for those that are like it."""
        total = sum(width**-0.5 for width in self._widths)
        for width in self._widths:
            self._owed[width] += width**-0.5 / total
        # The one that has waited longest; at first the lowest.
        chosen = max(self._widths, key=self._owed.__getitem__)
        self._owed[chosen] -= 1
        is_mixed = self._mixed[chosen]
        self._mixed[chosen] = not is_mixed
        layers: dict[str, Bits] = {}
        for path, layer in self._candidates.items():
            same = layer.at_least(Bits(chosen, chosen))
            layers[path] = self._near(chosen, layer) if is_mixed else same
        return f"around {chosen}" if is_mixed else f"{chosen}", BitConfig(layers)

    def _near(self, width: int, layer: LayerCandidates) -> Bits:
        return Bits(self._pick(width, layer.weight), self._pick(width, layer.activation))

    def _pick(self, width: int, candidates: tuple[int, ...]) -> int:
        """A candidate at most one place from `width`, among those that are drawn."""
        widths = sorted({*self._widths, *candidates})
        place = widths.index(width)
        near = {widths[i] for i in range(max(0, place - 1), min(len(widths), place + 2))}
        usable = [bits for bits in candidates if bits in near and bits >= self._widths[0]]
        if not usable:
            return min(candidates, key=lambda bits: abs(bits - width))
        return self._random.choice(usable)

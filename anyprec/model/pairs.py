"""Pairs of bit-widths by kind of layer: plain values, without torch.

A chip may run a convolution at W4A8 and a depthwise one at W8A8 alone, so what it allows is listed
for each kind. The lists of targets are in `hardware.toml`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from anyprec.bits import Bits
from anyprec.network.facts import LayerKind


@dataclass(frozen=True)
class LayerPairs:
    """The precisions that layers of each kind may take; none at all leaves them in floating point.

    Attributes:
        convolution: Of convolutions, grouped ones included.
        depthwise: Of depthwise convolutions.
        linear: Of Linear layers, and of projections that are bare parameters.
        other: Of transposed convolutions, recurrent layers and whatever else has a weight.
    """

    convolution: tuple[Bits, ...]
    depthwise: tuple[Bits, ...]
    linear: tuple[Bits, ...]
    other: tuple[Bits, ...]

    def of(self, kind: LayerKind) -> tuple[Bits, ...]:
        """The precisions of one kind of layer, ascending."""
        pairs: tuple[Bits, ...] = getattr(self, kind)
        return pairs


def nearest_pair(wanted: Bits, pairs: Iterable[Bits]) -> Bits | None:
    """Of `pairs` the one that differs by the fewest bits, of equals the highest; None of none."""

    def nearness(bits: Bits) -> tuple[int, Bits]:
        difference = abs(bits.weight - wanted.weight) + abs(bits.activation - wanted.activation)
        return -difference, bits

    return max(pairs, key=nearness, default=None)


def describe_pairs(pairs: Iterable[Bits]) -> str:
    """Pairs as a user reads them: `W4A8, W8A8`."""
    return ", ".join(map(str, sorted(pairs))) or "nothing"

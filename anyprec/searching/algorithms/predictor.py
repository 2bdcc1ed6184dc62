"""What a change of precision is expected to do to the loss, from changes that were measured elsewhere.

Predictions decide only what is measured next. A change that was never measured is predicted from the nearest one of the
same layer and operand by the law of quantization noise: the power of the noise is proportional to 4^-bits, and small
changes of the loss to the power of the noise.
"""

from __future__ import annotations

import itertools
import math

from anyprec.bits import Bits
from anyprec.searching.algorithms.space import OPERANDS, Operand, Space


class Predictor:
    """Loss increases of single changes, the last measurement of each.

    Args:
        space: What the changes are of.
    """

    def __init__(self, space: Space) -> None:
        self._widths = [choice.widths for choice in space.choices]
        self._lowerings: dict[tuple[int, Operand], dict[tuple[int, int], float]] = {}
        self._joint: dict[int, float] = {}

    def note(self, choice: int, before: Bits, after: Bits, increase: float) -> None:
        """Remember that changing `choice` from `before` to `after` raised the loss by `increase`."""
        changed = [
            operand for operand in OPERANDS if getattr(before, operand) != getattr(after, operand)
        ]
        if len(changed) == 1:
            operand = changed[0]
            low, high = sorted((getattr(before, operand), getattr(after, operand)))
            lowering = increase if getattr(after, operand) == low else -increase
            self._lowerings.setdefault((choice, operand), {})[low, high] = lowering
        elif noise := sum(_noise(getattr(after, o), getattr(before, o)) for o in changed):
            self._joint[choice] = increase / noise

    def increase(self, choice: int, before: Bits, after: Bits) -> float | None:
        """The loss increase to expect of a change; None if nothing is known of it."""
        total = 0.0
        for operand in OPERANDS:
            start, end = getattr(before, operand), getattr(after, operand)
            if start == end:
                continue
            low, high = sorted((start, end))
            lowering = self._lowering(choice, operand, low, high)
            if lowering is None:
                return None
            total += lowering if end == low else -lowering
        return total

    def _lowering(self, choice: int, operand: Operand, low: int, high: int) -> float | None:
        known = self._lowerings.get((choice, operand))
        if known is None:
            joint = self._joint.get(choice)
            return None if joint is None else joint * _noise(low, high)
        if (low, high) in known:
            return known[low, high]
        between = [width for width in self._widths[choice][operand] if low <= width <= high]
        return math.fsum(_extrapolated(known, *pair) for pair in itertools.pairwise(between))


def _extrapolated(known: dict[tuple[int, int], float], low: int, high: int) -> float:
    """Loss increase from `high` to `low` bits: known, or scaled from the nearest that is."""
    nearest = min(known, key=lambda widths: (abs(widths[0] - low) + abs(widths[1] - high), widths))
    return known[nearest] * (_noise(low, high) / _noise(*nearest))


def _noise(low: int, high: int) -> float:
    """Quantization noise power that is added from `high` to `low` bits, up to a factor."""
    return 4.0**-low - 4.0**-high

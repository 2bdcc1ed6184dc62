"""What a change of precision is expected to do to the loss, from changes measured elsewhere.

Predictions decide only what is measured next. A change that was never measured is predicted from
the nearest one of the same layer and operand by the law of quantization noise: the power of the
noise is proportional to 4^-bits, and small changes of the loss to the power of the noise.
"""

from __future__ import annotations

import itertools
import math

from anyprec.bits import Bits
from anyprec.searching.algorithms.space import OPERANDS, Operand, Space

_Lowerings = dict[tuple[int, int], float]
"""Loss increase from the higher to the lower bit-width, by (lower, higher)."""


class Predictor:
    """Loss increases of single changes, the last measurement of each.

    Args:
        space: What the changes are of.
    """

    def __init__(self, space: Space) -> None:
        self._widths = [choice.widths for choice in space.choices]
        self._lowerings: dict[tuple[int, Operand], _Lowerings] = {}
        self._joint: dict[int, float] = {}

    def note(self, choice: int, before: Bits, after: Bits, increase: float) -> None:
        """Remember that changing `choice` from `before` to `after` raised the loss so much."""
        if before.activation == after.activation and before.weight != after.weight:
            self._note_operand(choice, "weight", before.weight, after.weight, increase)
        elif before.weight == after.weight and before.activation != after.activation:
            self._note_operand(choice, "activation", before.activation, after.activation, increase)
        else:
            # Both operands change: only the loss per noise power of both together is known.
            noise = _noise(after.weight, before.weight)
            noise += _noise(after.activation, before.activation)
            if noise != 0:
                self._joint[choice] = increase / noise

    def _note_operand(
        self, choice: int, operand: Operand, before: int, after: int, increase: float
    ) -> None:
        lowerings = self._lowerings.setdefault((choice, operand), {})
        if after < before:
            lowerings[after, before] = increase
        else:
            lowerings[before, after] = -increase

    def increase(self, choice: int, before: Bits, after: Bits) -> float | None:
        """The loss increase to expect of a change; None if nothing is known of it."""
        total = 0.0
        for operand in OPERANDS:
            start, end = getattr(before, operand), getattr(after, operand)
            if start == end:
                continue
            lowering = self._lowering(choice, operand, min(start, end), max(start, end))
            if lowering is None:
                return None
            total += lowering if end < start else -lowering
        return total

    def _lowering(self, choice: int, operand: Operand, low: int, high: int) -> float | None:
        measured = self._lowerings.get((choice, operand))
        if measured is None:
            joint = self._joint.get(choice)
            return None if joint is None else joint * _noise(low, high)
        if (low, high) in measured:
            return measured[low, high]
        # Step by step, since each step has its own nearest measurement.
        between = [width for width in self._widths[choice][operand] if low <= width <= high]
        return math.fsum(_extrapolated(measured, *step) for step in itertools.pairwise(between))


def _extrapolated(measured: _Lowerings, low: int, high: int) -> float:
    """Loss increase from `high` to `low` bits: measured, or scaled from the nearest that is."""

    def distance(widths: tuple[int, int]) -> tuple[int, tuple[int, int]]:
        return abs(widths[0] - low) + abs(widths[1] - high), widths

    nearest = min(measured, key=distance)
    return measured[nearest] * (_noise(low, high) / _noise(*nearest))


def _noise(low: int, high: int) -> float:
    """Quantization noise power that is added from `high` to `low` bits, up to a factor."""
    return 4.0**-low - 4.0**-high

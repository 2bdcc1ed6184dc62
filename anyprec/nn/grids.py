"""Which grids the input of a layer may have: what targets allow of zero points and step sizes.

These are plain values without tensors. How a step size becomes a power of two is in
`functional.py`, which grid serves best in `calibration/least_squares.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

ActivationGrid = Literal["affine", "symmetric", "signed"]
"""Where real zero may lie among the codes of an input.

`"affine"`: anywhere, as calibration finds best. `"symmetric"`: at code 0 of inputs that cannot be
negative, in the middle of the others' codes. `"signed"`: in the middle of all.
"""

ActivationScale = Literal["any", "power-of-two"]
"""Which step sizes an input may have."""

ACTIVATION_GRIDS: tuple[ActivationGrid, ...] = get_args(ActivationGrid)
"""The loosest first: a target that takes one takes those after it."""

ACTIVATION_SCALES: tuple[ActivationScale, ...] = get_args(ActivationScale)
"""As `ACTIVATION_GRIDS`."""


@dataclass(frozen=True)
class GridRule:
    """What is allowed of the grid of every input.

    Attributes:
        grid: Allowed zero points.
        scale: Allowed step sizes.
    """

    grid: ActivationGrid = "affine"
    scale: ActivationScale = "any"

    def start(self, bits: int, *, nonnegative: bool) -> int:
        """The zero point before calibration, of an input that may be negative or may not."""
        return 0 if nonnegative and self.grid != "signed" else middle(bits)

    def problem(self, zero_points: Sequence[int], candidates: Sequence[int]) -> str | None:
        """Why an input may not have these zero points at these bit-widths; None if it may."""
        for zero, bits in zip(zero_points, candidates, strict=True):
            if not self.permits(zero, bits):
                msg = f"the zero point {zero} at {bits} bits does not fit "
                msg += f"activation_grid={self.grid!r}, which allows {self.permitted(bits)}: "
                msg += "convert with the grid that it was calibrated on, or calibrate anew"
                return msg
        return None

    def permits(self, zero_point: int, bits: int) -> bool:
        """Whether an input may have this zero point."""
        if self.grid == "affine":
            return 0 <= zero_point < 1 << bits
        # The sign of an input is not asked: training data may have refuted it.
        return zero_point == middle(bits) or (zero_point == 0 and self.grid == "symmetric")

    def permitted(self, bits: int) -> str:
        """The zero points that an input may have, in words."""
        if self.grid == "affine":
            return f"0 to {2**bits - 1}"
        return f"0 or {middle(bits)}" if self.grid == "symmetric" else str(middle(bits))


def middle(bits: int) -> int:
    """The zero point of the signed grid: `-2^(b-1)` is the lowest code less it."""
    return 1 << (bits - 1)

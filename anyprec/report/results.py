"""A measured result: one configuration with its accuracy and its cost."""

from __future__ import annotations

from dataclasses import dataclass

from anyprec.model.cost import Cost


@dataclass(frozen=True)
class Result:
    """One line of a results table, one point of a plot.

    Attributes:
        name: What was measured, e.g. "W4A4" or "searched W4A4".
        kind: Series that it belongs to: "float", "uniform" or "searched".
        accuracy: Top-1 in percent.
        cost: BitOPs and size.
    """

    name: str
    kind: str
    accuracy: float
    cost: Cost

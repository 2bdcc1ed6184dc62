"""Choosing one option per layer under a total cost, when losses add up: Lagrangian relaxation on plain numbers.

For a price per unit of cost every layer chooses its best option by itself; the price is found by bisection (Everett
1963; for bit allocation: Shoham and Gersho 1988). The result is optimal for the cost that it has, on the lower convex
hull of all trade-offs. Losses of layers do not quite add up in a network, so the search only starts from it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

_BISECTIONS = 60


def allocate(options: Sequence[Sequence[tuple[float, float]]], limit: float) -> list[int] | None:
    """Choose one option of every layer with a low total loss and a total cost of at most `limit`.

    Args:
        options: For each layer its options as (loss, cost).
        limit: Largest total cost.

    Returns:
        The index of the chosen option of each layer; None if even the cheapest do not fit.

    Example:
        >>> allocate([[(0.0, 8), (1.0, 4)], [(0.0, 8), (5.0, 4)]], limit=12)
        [1, 0]
    """
    free = _choose(options, price=0.0)
    if _cost(options, free) <= limit:
        return free
    low, high = 0.0, 1.0
    while _cost(options, _choose(options, price=high)) > limit:
        low, high = high, high * 4
        if math.isinf(high):
            return None
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        fits = _cost(options, _choose(options, price=middle)) <= limit
        low, high = (low, middle) if fits else (middle, high)
    return _choose(options, price=high)


def _choose(options: Sequence[Sequence[tuple[float, float]]], *, price: float) -> list[int]:
    return [
        min(range(len(layer)), key=lambda index: (layer[index][0] + price * layer[index][1], layer[index][1]))
        for layer in options
    ]


def _cost(options: Sequence[Sequence[tuple[float, float]]], chosen: Sequence[int]) -> float:
    return math.fsum(layer[index][1] for layer, index in zip(options, chosen, strict=True))

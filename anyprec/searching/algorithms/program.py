"""Choosing one option per choice under several limits, when losses add up: the multiple-choice knapsack problem.

Solved exactly by HiGHS through `scipy.optimize.milp`, as HAWQ-v3 (Yao et al. 2021) and LIMPQ (Tang et al. 2022) do with
sensitivities of layers. Losses of layers do not quite add up in a network, so our search uses it to propose what to measure.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence, Sized

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

from anyprec.searching.algorithms.space import Point

_GAP = 1e-6
_NODES = 20_000


def allocate(
    losses: Sequence[Sequence[float]],
    shares: Sequence[Sequence[Sequence[float]]],
    *,
    limit: float = 1.0,
    near: tuple[Point, int] | None = None,
    excluded: Iterable[Point] = (),
) -> Point | None:
    """The point of least total loss within limits.

    Args:
        losses: Loss of each option of each choice; infinite rules an option out.
        shares: For each limit the share of it that each option of each choice uses.
        limit: Largest sum of shares, of each limit.
        near: A point, and how many choices may differ from it at most.
        excluded: Points that are not wanted.

    Returns:
        The point, or None if there is none.

    Example:
        >>> allocate([[0.0, 1.0], [0.0, 5.0]], [[[0.8, 0.4], [0.8, 0.4]]], limit=1.2)
        (1, 0)
    """
    columns = [
        [option for option, loss in enumerate(options) if math.isfinite(loss)] for options in losses
    ]
    offsets = np.cumsum([0, *map(len, columns)])
    place = {
        (choice, option): offsets[choice] + index
        for choice, options in enumerate(columns)
        for index, option in enumerate(options)
    }
    objective = np.array([losses[choice][option] for choice, option in place])
    rows = [
        (_ones(place, range(start, end)), 1.0, 1.0) for start, end in itertools.pairwise(offsets)
    ]
    rows += [
        (np.array([table[choice][option] for choice, option in place]), -math.inf, limit)
        for table in shares
    ]
    for point in excluded:
        taken = [place[key] for key in enumerate(point) if key in place]
        if len(taken) == len(losses):
            rows.append((_ones(place, taken), -math.inf, len(losses) - 1.0))
    if near is not None:
        kept = [place[key] for key in enumerate(near[0]) if key in place]
        rows.append((_ones(place, kept), float(len(losses) - near[1]), math.inf))
    matrix, lower, upper = zip(*rows, strict=True)
    found = milp(
        objective / (np.abs(objective).max(initial=0.0) or 1.0),
        integrality=np.ones(len(place)),
        bounds=Bounds(0, 1),
        constraints=LinearConstraint(csr_matrix(np.stack(matrix)), lower, upper),
        # Presolving saves no time on programs of this size.
        options={"mip_rel_gap": _GAP, "node_limit": _NODES, "presolve": False},
    )
    if found.x is None:
        return None
    return tuple(
        options[int(np.argmax(found.x[start:end]))]
        for options, (start, end) in zip(columns, itertools.pairwise(offsets), strict=True)
    )


def _ones(place: Sized, where: Iterable[int]) -> np.ndarray:
    row = np.zeros(len(place))
    row[list(where)] = 1
    return row

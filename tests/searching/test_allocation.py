"""Lagrangian allocation against brute force."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from anyprec.searching.allocation import allocate

LAYERS = st.lists(
    st.lists(st.tuples(st.floats(0, 100), st.integers(1, 50)), min_size=1, max_size=4), min_size=1, max_size=5
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(options=LAYERS, limit=st.integers(0, 150))
def test_the_choice_fits_and_nothing_of_its_cost_is_better(options: list[list[tuple[float, int]]], limit: int) -> None:
    chosen = allocate(options, limit)
    everything = [
        (sum(loss for loss, _ in choice), sum(cost for _, cost in choice)) for choice in itertools.product(*options)
    ]
    if chosen is None:
        assert min(cost for _, cost in everything) > limit
        return
    loss = sum(layer[index][0] for layer, index in zip(options, chosen, strict=True))
    cost = sum(layer[index][1] for layer, index in zip(options, chosen, strict=True))
    assert cost <= limit
    # Prices are found to 60 bisections, so two options of almost the same trade may be taken for each other.
    assert loss <= min(other for other, price in everything if price <= cost) + 1e-6


def test_what_costs_nothing_is_not_given_away() -> None:
    assert allocate([[(5.0, 3), (1.0, 3)]], limit=3) == [1]


def test_a_limit_below_the_cheapest_is_answered_by_none() -> None:
    assert allocate([[(0.0, 4), (1.0, 2)], [(0.0, 4), (1.0, 2)]], limit=3) is None
    assert allocate([[(0.0, 4), (1.0, 2)], [(0.0, 4), (1.0, 2)]], limit=4) == [1, 1]

"""The integer program against brute force."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyprec.searching.algorithms.program import allocate

Table = list[list[tuple[float, int, int]]]

LAYERS = st.lists(
    st.lists(
        st.tuples(st.integers(-100, 100).map(float), st.integers(1, 50), st.integers(1, 50)),
        min_size=1,
        max_size=4,
    ),
    min_size=1,
    max_size=5,
)
thorough = settings(max_examples=100, deadline=None, derandomize=True)


def tables(
    options: Table, limits: tuple[float, ...]
) -> tuple[list[list[float]], list[list[list[float]]]]:
    losses = [[entry[0] for entry in layer] for layer in options]
    shares = [
        [[entry[1 + k] / limit for entry in layer] for layer in options]
        for k, limit in enumerate(limits)
    ]
    return losses, shares


def every_point(options: Table, limits: tuple[float, ...]) -> dict[tuple[int, ...], float]:
    """The loss of every point that fits."""
    points = itertools.product(*(range(len(layer)) for layer in options))
    return {
        point: sum(layer[index][0] for layer, index in zip(options, point, strict=True))
        for point in points
        if all(
            sum(layer[index][1 + k] for layer, index in zip(options, point, strict=True)) <= limit
            for k, limit in enumerate(limits)
        )
    }


@thorough
@given(options=LAYERS, limit=st.integers(1, 150))
def test_the_choice_fits_and_nothing_that_fits_is_better(options: Table, limit: int) -> None:
    fitting = every_point(options, (limit,))
    chosen = allocate(*tables(options, (limit,)))
    assert (chosen is None) == (not fitting)
    if chosen is not None:
        assert fitting[chosen] == pytest.approx(min(fitting.values()), rel=1e-5, abs=1e-3)


@thorough
@given(options=LAYERS, limits=st.tuples(st.integers(20, 150), st.integers(20, 150)))
def test_two_limits_both_hold(options: Table, limits: tuple[int, int]) -> None:
    fitting = every_point(options, limits)
    chosen = allocate(*tables(options, limits))
    assert (chosen is None) == (not fitting)
    if chosen is not None:
        assert fitting[chosen] == pytest.approx(min(fitting.values()), rel=1e-5, abs=1e-3)


@thorough
@given(options=LAYERS, count=st.integers(1, 5), data=st.data())
def test_excluded_points_are_not_proposed(options: Table, count: int, data: st.DataObject) -> None:
    fitting = every_point(options, (150.0,))
    if not fitting:
        return
    excluded = data.draw(st.lists(st.sampled_from(sorted(fitting)), min_size=count, max_size=count))
    left = {point: loss for point, loss in fitting.items() if point not in excluded}
    chosen = allocate(*tables(options, (150.0,)), excluded=excluded)
    assert (chosen is None) == (not left)
    if chosen is not None:
        assert left[chosen] == pytest.approx(min(left.values()), rel=1e-5, abs=1e-3)


@thorough
@given(options=LAYERS, changes=st.integers(0, 3))
def test_near_bounds_how_many_choices_change(options: Table, changes: int) -> None:
    middle = tuple(len(layer) - 1 for layer in options)
    fitting = {
        point: loss
        for point, loss in every_point(options, (150.0,)).items()
        if sum(a != b for a, b in zip(point, middle, strict=True)) <= changes
    }
    chosen = allocate(*tables(options, (150.0,)), near=(middle, changes))
    assert (chosen is None) == (not fitting)
    if chosen is not None:
        assert fitting[chosen] == pytest.approx(min(fitting.values()), rel=1e-5, abs=1e-3)


def test_options_of_infinite_loss_are_ruled_out() -> None:
    shares = [[[0.1, 0.2], [0.1, 0.2]]]
    assert allocate([[math.inf, 3.0], [1.0, 2.0]], shares) == (1, 0)
    assert allocate([[math.inf, 3.0], [1.0, 2.0]], shares, excluded=[(0, 0)]) == (1, 0)
    assert allocate([[math.inf, 3.0], [1.0, 2.0]], shares, near=((0, 1), 1)) == (1, 1)


def test_without_a_difference_in_loss_something_that_fits_is_found() -> None:
    assert allocate([[0.0, 0.0], [0.0, 0.0]], [[[0.8, 0.2], [0.8, 0.2]]]) in {
        (0, 1),
        (1, 0),
        (1, 1),
    }


def test_a_limit_below_the_cheapest_is_answered_by_none() -> None:
    losses, shares = [[0.0, 1.0], [0.0, 1.0]], [[[4.0, 2.0], [4.0, 2.0]]]
    assert allocate(losses, shares, limit=3) is None
    assert allocate(losses, shares, limit=4) == (1, 1)

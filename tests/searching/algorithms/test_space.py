"""What a search may choose: constraints, ties, and the order of options."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anyprec.bits import BitConfig, Bits, LayerCandidates
from anyprec.errors import BitsError
from anyprec.searching.algorithms import make_space
from anyprec.searching.algorithms.space import Choice, dominates

FREE, FIXED = LayerCandidates((2, 4, 8), (2, 4, 8)), LayerCandidates((8,), (8,))
CANDIDATES = {
    "stem": FIXED,
    "block.0.conv": FREE,
    "block.0.skip": FREE,
    "block.1.conv": FREE,
    "fc": FIXED,
}


def names(choice: Choice) -> list[str]:
    return [str(bits) for bits in choice.options]


def options_of(path: str, **arguments: object) -> list[str]:
    space = make_space(CANDIDATES, **arguments)
    return next(names(choice) for choice in space.choices if path in choice.paths)


def test_without_constraints_each_layer_takes_its_candidates() -> None:
    space = make_space(CANDIDATES)
    assert [choice.paths for choice in space.choices] == [(path,) for path in CANDIDATES]
    assert names(space.choices[0]) == ["W8A8"]
    assert names(space.choices[1]) == [f"W{w}A{a}" for w in (2, 4, 8) for a in (2, 4, 8)]
    assert [len(choice.options) for choice in space.choices] == [1, 9, 9, 9, 1]


@pytest.mark.parametrize(
    ("allowed", "expected"),
    [
        ((4, 8), ["W4A4", "W4A8", "W8A4", "W8A8"]),
        (8, ["W8A8"]),
        (("W4A4", "W8A8"), ["W4A4", "W8A8"]),
        (("W4A4", "W4A8", Bits(8, 8), (2, 8)), ["W2A8", "W4A4", "W4A8", "W8A8"]),
        ("W8A8", ["W8A8"]),
        (("W2A4", 8), ["W2A4", "W8A8"]),
        ({"block.*": (4,), "fc": 8}, ["W4A4"]),
        ({"block.0.conv": ("W2A8",)}, ["W2A8"]),
        ({"fc": 8}, [f"W{w}A{a}" for w in (2, 4, 8) for a in (2, 4, 8)]),
        (None, [f"W{w}A{a}" for w in (2, 4, 8) for a in (2, 4, 8)]),
    ],
)
def test_allowed_widths_and_precisions(allowed: object, expected: list[str]) -> None:
    assert options_of("block.0.conv", allowed=allowed) == expected


def test_several_patterns_all_hold() -> None:
    assert options_of(
        "block.0.conv", allowed={"block.*": (4, 8), "block.0.*": ("W4A8", "W2A2")}
    ) == ["W4A8"]


@pytest.mark.parametrize(
    ("allowed", "text"),
    [
        (4, "allowed=4 leaves nothing for layer 'stem', whose candidates are weight bits (8,)"),
        (("W3A3",), "allowed=('W3A3',) leaves nothing for layer 'stem'"),
        ((), "allowed=() leaves nothing: name bit-widths"),
        (9, "allowed bit-width 9"),
        ("W9A9", "weight bit-width 9"),
        ("four", "four"),
        ({"nothing.*": 4}, "nothing.*"),
    ],
)
def test_what_cannot_be_allowed_is_refused(allowed: object, text: str) -> None:
    with pytest.raises(BitsError, match=re.escape(text)):
        make_space(CANDIDATES, allowed=allowed)


def test_tied_layers_are_one_choice_in_network_order() -> None:
    space = make_space(CANDIDATES, tied=[["block.1.conv", "block.0.skip"]])
    assert [choice.paths for choice in space.choices] == [
        ("stem",),
        ("block.0.conv",),
        ("block.0.skip", "block.1.conv"),
        ("fc",),
    ]
    config = space.config(space.highest)
    assert set(config) == set(CANDIDATES)


def test_patterns_tie_and_overlapping_groups_are_one() -> None:
    by_pattern = make_space(CANDIDATES, tied=[["block.*"]])
    chained = make_space(
        CANDIDATES, tied=[["block.0.conv", "block.0.skip"], ["block.0.skip", "block.1.conv"]]
    )
    assert by_pattern == chained
    assert by_pattern.choices[1].paths == ("block.0.conv", "block.0.skip", "block.1.conv")


def test_tied_layers_take_what_all_of_them_may() -> None:
    candidates = {
        "a": LayerCandidates((2, 4), (4, 8)),
        "b": LayerCandidates((4, 8), (2, 8)),
        "c": FIXED,
    }
    assert names(make_space(candidates, tied=[["a", "b"]]).choices[0]) == ["W4A8"]
    with pytest.raises(BitsError, match="have no precision in common"):
        make_space(candidates, tied=[["a", "c"]])


@pytest.mark.parametrize(
    ("tied", "text"),
    [
        (["block.*"], "tied='block.*' is not a list of groups: write tied=[['block.*', ...]]"),
        ([["no.such"]], "no.such"),
    ],
)
def test_what_cannot_be_tied_is_refused(tied: object, text: str) -> None:
    with pytest.raises(BitsError, match=re.escape(text)):
        make_space(CANDIDATES, tied=tied)


def test_neighbours_of_a_full_product_change_one_operand_by_one_step() -> None:
    choice = make_space(CANDIDATES).choices[1]
    where = {name: index for index, name in enumerate(names(choice))}
    assert {names(choice)[i] for i in choice.below[where["W4A8"]]} == {"W2A8", "W4A4"}
    assert {names(choice)[i] for i in choice.above[where["W4A4"]]} == {"W8A4", "W4A8"}
    assert choice.below[where["W2A2"]] == choice.above[where["W8A8"]] == ()


def test_neighbours_of_a_few_precisions_may_change_both_operands() -> None:
    choice = Choice(("a",), (Bits(2, 8), Bits(4, 4), Bits(8, 8)))
    assert choice.below == ((), (), (0, 1))
    assert choice.above == ((2,), (2,), ())


some_options = st.sets(
    st.tuples(st.sampled_from([2, 3, 4, 6, 8]), st.sampled_from([2, 3, 4, 6, 8])), min_size=1
).map(lambda pairs: tuple(Bits(*pair) for pair in sorted(pairs)))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(options=some_options)
def test_neighbours_are_the_next_in_the_order(options: tuple[Bits, ...]) -> None:
    choice = Choice(("a",), options)
    for one, other in itertools.permutations(range(len(options)), 2):
        is_below = dominates(options[one], options[other]) and not any(
            between not in (one, other)
            and dominates(options[one], options[between])
            and dominates(options[between], options[other])
            for between in range(len(options))
        )
        assert (other in choice.below[one]) == is_below == (one in choice.above[other])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(options=some_options, wanted=st.tuples(st.integers(2, 8), st.integers(2, 8)))
def test_rounding_up_is_lowest_among_those_that_are_enough(
    options: tuple[Bits, ...], wanted: tuple[int, int]
) -> None:
    found = options[Choice(("a",), options).at_least(Bits(*wanted))]
    enough = [bits for bits in options if dominates(bits, Bits(*wanted))]
    if enough:
        assert dominates(found, Bits(*wanted))
        assert found.weight + found.activation == min(
            bits.weight + bits.activation for bits in enough
        )


def test_points_and_configurations_are_the_same_thing() -> None:
    space = make_space(CANDIDATES, allowed={"block.*": (4, 8)}, tied=[["block.0.*"]])
    for point in itertools.product(*(range(len(choice.options)) for choice in space.choices)):
        assert space.point(space.config(point)) == point
    untied = space.config(space.highest).replace({"block.0.conv": (4, 4)})
    assert space.point(untied) is None
    assert space.point(space.config(space.highest).replace({"block.1.conv": (2, 2)})) is None
    assert space.config(space.lift(untied)) == space.config(space.highest)


def test_uniform_configurations_round_up_to_what_is_offered() -> None:
    space = make_space(CANDIDATES, allowed=("W4A4", "W8A8"))
    free = [path for path in CANDIDATES if path.startswith("block")]
    fixed = {"stem": (8, 8), "fc": (8, 8)}
    assert space.uniform[:2] == space.equal_widths[:2]
    assert set(space.equal_widths) == {
        BitConfig(dict.fromkeys(free, bits) | fixed) for bits in ((4, 4), (8, 8))
    }
    assert len(make_space(CANDIDATES).uniform) == 9
    assert space.config(space.lowest) == BitConfig(dict.fromkeys(free, (4, 4)) | fixed)
    assert space.config(space.highest) == BitConfig(dict.fromkeys(CANDIDATES, (8, 8)))


def test_pairs_of_a_target_leave_only_what_it_runs() -> None:
    runnable = [Bits(2, 8), Bits(4, 4), Bits(4, 8), Bits(8, 8)]
    pairs = {"block.0.conv": runnable, "stem": [Bits(8, 8)]}
    assert options_of("block.0.conv", pairs=pairs) == ["W2A8", "W4A4", "W4A8", "W8A8"]
    assert options_of("block.0.conv", pairs=pairs, allowed={"block.*": 4}) == ["W4A4"]
    assert len(options_of("block.0.skip", pairs=pairs)) == 9
    with pytest.raises(
        BitsError,
        match="chip can run no precision that layer 'stem' may take: it runs W4A8, and the layer "
        "may take W8A8: convert with hardware='chip'",
    ):
        make_space(CANDIDATES, hardware="chip", pairs={"stem": [Bits(4, 8)]})
    with pytest.raises(BitsError, match="no such layer in integers"):
        make_space(CANDIDATES, hardware="chip", pairs={"fc": []})

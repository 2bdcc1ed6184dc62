"""The vocabulary: what is read, what is refused, and with which words."""

from __future__ import annotations

import copy
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyprec.bits import (
    BitConfig,
    Bits,
    LayerCandidates,
    check_candidates,
    match_paths,
    resolve,
    uniform,
)
from anyprec.errors import BitsError

CANDIDATES = {
    "stem": LayerCandidates((8,), (8,)),
    "a.depthwise": LayerCandidates((3, 4, 8), (3, 4, 8)),
    "a.pointwise": LayerCandidates((2, 3, 4, 8), (2, 4, 8)),
}


@given(st.integers(2, 8), st.integers(2, 8))
def test_notation_is_read_back(weight: int, activation: int) -> None:
    bits = Bits(weight, activation)
    assert Bits.parse(str(bits)) == bits == Bits.of((weight, activation))


@pytest.mark.parametrize("value", [1, 9, 0, -4, 4.0, True, "4"])
def test_a_bit_width_out_of_range_is_refused(value: object) -> None:
    with pytest.raises(
        BitsError, match=r"weight bit-width .* is not supported: use an int from 2 to 8"
    ):
        Bits(value, 4)


@pytest.mark.parametrize("value", [None, 4.5, True, (4,), (4, 4, 4), "W4", "4", "W4A4 "[:3]])
def test_what_is_no_precision_is_refused(value: object) -> None:
    with pytest.raises(BitsError, match="as a precision"):
        Bits.of(value)


@pytest.mark.parametrize(
    ("values", "text"),
    [((), "is empty"), ((4, 4), "twice"), ((4, 16), "bit-width 16"), ((1, 2), "bit-width 1")],
)
def test_bad_candidates_are_refused(values: tuple[int, ...], text: str) -> None:
    with pytest.raises(BitsError, match=text):
        check_candidates(values, what="bits")


def test_candidates_come_out_ascending() -> None:
    assert check_candidates((8, 2, 4)) == (2, 4, 8)


def test_uniform_rounds_up_to_each_layers_candidates() -> None:
    config = uniform(2, CANDIDATES)
    assert config == BitConfig({"stem": 8, "a.depthwise": 3, "a.pointwise": 2})
    assert uniform((3, 3), CANDIDATES)["a.pointwise"] == Bits(3, 4)


def test_a_uniform_bit_width_that_no_layer_has_is_refused() -> None:
    with pytest.raises(
        BitsError,
        match=r"weight bit-width 5 is not a candidate of the network: choose from \(2, 3, 4, 8\)",
    ):
        uniform(5, CANDIDATES)
    with pytest.raises(BitsError, match="activation bit-width 6"):
        uniform((4, 6), CANDIDATES)


def test_exact_paths_overrule_patterns_and_later_patterns_earlier_ones() -> None:
    config = resolve({"a.pointwise": 2, "a.*": 4, "*wise": (3, 8)}, CANDIDATES)
    assert config == BitConfig({"stem": 8, "a.depthwise": (3, 8), "a.pointwise": 2})


def test_layers_that_are_not_named_take_their_highest() -> None:
    assert resolve({"a.pointwise": 2}, CANDIDATES)["a.depthwise"] == Bits(8, 8)


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (
            {"nothing": 4},
            "path 'nothing' matches no layer; layers are 'stem', 'a.depthwise', 'a.pointwise'",
        ),
        ({"b.*": 4}, "pattern 'b.\\*' matches no layer"),
        ({"a.depthwise": 2}, "W2A2 is not a candidate of layer 'a.depthwise'"),
        ({"a.*": 6}, "weight bit-width 6 is not a candidate of the layers that match 'a.\\*'"),
    ],
)
def test_a_request_that_does_not_fit_is_refused(request_: dict[str, int], text: str) -> None:
    with pytest.raises(BitsError, match=text):
        resolve(request_, CANDIDATES)


def test_a_whole_configuration_must_name_every_layer() -> None:
    with pytest.raises(BitsError, match="leaves 2 layers unnamed: 'a.depthwise', 'a.pointwise'"):
        resolve({"stem": 8}, CANDIDATES, partial=False)


def test_a_configuration_is_a_value() -> None:
    config = BitConfig({"x": 4, "y": (2, 8)})
    assert config == BitConfig({"y": (2, 8), "x": 4})
    assert len({config, BitConfig({"y": (2, 8), "x": 4})}) == 1
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config
    assert config.replace({"x": 2}) != config
    assert BitConfig(config.to_json()) == config
    with pytest.raises(BitsError, match="no layer 'z'"):
        config.replace({"z": 4})


def test_many_names_are_shortened_in_messages() -> None:
    with pytest.raises(BitsError, match=r"'l5', \.\.\. \(14 more\)"):
        match_paths("x*", [f"l{index}" for index in range(20)])

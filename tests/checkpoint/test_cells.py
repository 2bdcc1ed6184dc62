"""Cells against the codes that they stand for: no code is lost, whatever weights and steps are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anyprec.checkpoint.cells import cell_count, cells_of, exceptions_of, points_of
from anyprec.nn.functional import integer_codes
from anyprec.nn.packed import PackedOperand


def codes_of(weights: Tensor, steps: Tensor, candidates: tuple[int, ...]) -> list[Tensor]:
    return [
        integer_codes(weights, step, qmin=-(2 ** (bits - 1)), qmax=2 ** (bits - 1) - 1, axis=0)
        for step, bits in zip(steps, candidates, strict=True)
    ]


def told_codes(weights: Tensor, steps: Tensor, candidates: tuple[int, ...]) -> list[Tensor]:
    """The codes after the way through cells, exceptions and points."""
    codes = codes_of(weights, steps, candidates)
    cells = cells_of(codes, candidates)
    found = points_of(cells, steps, candidates, exceptions_of(cells, codes, steps, candidates))
    operand = PackedOperand(
        found.points,
        found.ratios,
        axis=0,
        listed=found.listed.places,
        listed_codes=found.listed.codes,
        moments=None,
    )
    limits = [(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for bits in candidates]
    return [
        operand.codes(index, qmin=low, qmax=high).int() for index, (low, high) in enumerate(limits)
    ]


def assert_no_code_is_lost(weights: Tensor, steps: Tensor, candidates: tuple[int, ...]) -> None:
    for told, code in zip(
        told_codes(weights, steps, candidates), codes_of(weights, steps, candidates), strict=True
    ):
        assert torch.equal(told, code)


@pytest.mark.parametrize(
    ("candidates", "count"),
    [((2, 3, 4, 5, 6), 120), ((2, 3, 4, 5, 6, 8), 375), ((2,), 4), ((8,), 256)],
)
def test_there_is_a_cell_more_than_thresholds(candidates, count):
    assert cell_count(candidates) == count


def test_a_cell_is_the_number_of_thresholds_below_the_weight():
    weights = torch.tensor([[-9.0, -1.1, -0.9, 0.0, 0.7, 9.0]])
    steps = torch.tensor([[1.0], [0.5]])
    # 2 bits: -1.5, -0.5, 0.5; 3 bits: -1.75, -1.25, -0.75, -0.25, 0.25, 0.75, 1.25.
    assert cells_of(codes_of(weights, steps, (2, 3)), (2, 3)).tolist() == [[0, 3, 3, 6, 8, 10]]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    candidates=st.sets(st.integers(2, 8), min_size=1).map(lambda found: tuple(sorted(found))),
    channels=st.integers(1, 5),
    seed=st.integers(0, 2**31),
    scale=st.floats(1e-20, 1e6),
    negative=st.booleans(),
)
def test_every_code_of_random_weights_comes_back(candidates, channels, seed, scale, negative):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(channels, 200, generator=generator) * scale
    steps = torch.rand(len(candidates), channels, generator=generator) * scale + 1e-3 * scale
    assert_no_code_is_lost(weights, -steps if negative else steps, candidates)


def around_thresholds(steps: Tensor, candidates: tuple[int, ...], ulps: int) -> Tensor:
    """Every threshold of one channel, and the float32 numbers next to it."""
    halves = [
        np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, dtype=np.float32) + 0.5
        for bits in candidates
    ]
    thresholds = np.concatenate(
        [half * step for half, step in zip(halves, steps[:, 0].numpy(), strict=True)]
    )
    numbers, up, down = [thresholds], thresholds, thresholds
    for _ in range(ulps):
        up, down = np.nextafter(up, np.float32(np.inf)), np.nextafter(down, np.float32(-np.inf))
        numbers += [up, down]
    return torch.from_numpy(np.concatenate(numbers))[None]


@pytest.mark.parametrize("ratio", [2.0, 1 / 3, 0.1, 0.7, 1.0])
def test_weights_within_rounding_errors_of_thresholds_keep_their_codes(ratio):
    """Thresholds of several candidates coincide or nearly do, and weights lie right on them."""
    candidates = (2, 3, 4, 6, 8)
    steps = torch.tensor([[0.1 * ratio**place] for place in range(5)])
    assert_no_code_is_lost(around_thresholds(steps, candidates, ulps=3), steps, candidates)


def test_codes_that_cells_do_not_tell_are_found():
    candidates = (2, 3, 4, 6, 8)
    steps = torch.tensor([[0.1 / 3**place] for place in range(5)])
    weights = around_thresholds(steps, candidates, ulps=3)
    codes = codes_of(weights, steps, candidates)
    exceptions = exceptions_of(cells_of(codes, candidates), codes, steps, candidates)
    assert 0 < len(exceptions.places) < weights.numel() / 4
    assert torch.equal(exceptions.codes[2].int(), codes[2].flatten()[exceptions.places])


def test_many_channels_are_taken_in_parts(monkeypatch):
    monkeypatch.setattr("anyprec.checkpoint.cells._CHUNK", 1000)
    weights = torch.randn(20, 30)
    assert_no_code_is_lost(weights, torch.rand(3, 20) + 0.01, (2, 4, 8))


def test_a_channel_without_step_size_and_one_of_zeros_keep_their_codes():
    weights = torch.cat((torch.zeros(1, 9), torch.randn(1, 9)))
    assert_no_code_is_lost(weights, torch.tensor([[0.0, 0.1], [0.0, 0.2]]), (2, 4))

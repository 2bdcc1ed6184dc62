"""The laws of the random paths."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

import anyprec
from anyprec.bits import Bits, LayerCandidates
from anyprec.training.samplers import (
    InstabilitySampler,
    SandwichSampler,
    UniformSampler,
    sampler_of,
)

CANDIDATES = {"a": LayerCandidates((2, 3, 4), (4, 8)), "b": LayerCandidates((3, 8), (8,))}
DRAWS = 6000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def near(count: int, probability: float) -> bool:
    """Within five standard deviations of a binomial count."""
    return abs(count - DRAWS * probability) < 5 * math.sqrt(DRAWS * probability * (1 - probability))


def test_the_uniform_sampler_draws_every_pair_as_often() -> None:
    draws = UniformSampler().draw(CANDIDATES, DRAWS, generator=generator(), instability={})
    pairs = Counter(config["a"] for config in draws)
    assert len(pairs) == 6
    assert all(near(count, 1 / 6) for count in pairs.values())
    together = Counter((config["a"].weight, config["b"].weight) for config in draws)
    assert len(together) == 6
    assert all(near(count, 1 / 6) for count in together.values())


def test_the_sandwich_begins_with_the_lowest_precision() -> None:
    draws = SandwichSampler().draw(CANDIDATES, 3, generator=generator(), instability={})
    assert len(draws) == 3
    assert draws[0] == anyprec.BitConfig({"a": Bits(2, 4), "b": Bits(3, 8)})
    assert draws[1:] == UniformSampler().draw(CANDIDATES, 2, generator=generator(), instability={})
    assert SandwichSampler().draw(CANDIDATES, 0, generator=generator(), instability={}) == []


def test_a_single_path_of_the_sandwich_is_the_lowest_precision_in_half_of_the_steps() -> None:
    drawn = generator()
    draws = [
        SandwichSampler().draw(CANDIDATES, 1, generator=drawn, instability={}) for _ in range(DRAWS)
    ]
    assert all(len(paths) == 1 for paths in draws)
    lowest = anyprec.BitConfig({"a": Bits(2, 4), "b": Bits(3, 8)})
    of_uniform_draws = 1 / 12
    assert near(sum(paths[0] == lowest for paths in draws), 1 / 2 + 1 / 2 * of_uniform_draws)


def test_the_instability_sampler_draws_unstable_bit_widths_less_often() -> None:
    instability = {"a": {2: 0.4, 3: 0.3, 4: 0.2, 8: 0.25}, "b": {3: 0.3, 8: 0.1}}
    draws = InstabilitySampler(2.0).draw(
        CANDIDATES, DRAWS, generator=generator(), instability=instability
    )
    unrest = {2: 0.2, 3: 0.1, 4: 0.05}
    mean = sum(unrest.values()) / 3
    shares = {bits: math.exp(-2 * value / mean) for bits, value in unrest.items()}
    counts = Counter(config["a"].weight for config in draws)
    assert all(near(counts[bits], share / sum(shares.values())) for bits, share in shares.items())
    assert counts[2] < counts[3] < counts[4]
    activations = Counter(config["a"].activation for config in draws)
    assert all(near(count, 1 / 2) for count in activations.values())


def test_without_measured_instability_it_draws_uniformly() -> None:
    assert InstabilitySampler().probabilities(CANDIDATES["a"], {}) == (1 / 3,) * 3


def test_samplers_have_names() -> None:
    assert sampler_of("sandwich") == SandwichSampler()
    assert sampler_of(InstabilitySampler(3.0)) == InstabilitySampler(3.0)
    with pytest.raises(
        ValueError,
        match=r"sampler='sandwhich' is not known: use one of \['instability', 'sandwich'",
    ):
        sampler_of("sandwhich")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="or an object with a method draw"):
        sampler_of(7)  # type: ignore[arg-type]


@pytest.mark.parametrize("sampler", ["uniform", "sandwich", "instability"])
def test_a_resumed_sampler_goes_on_where_it_stood(
    sampler: str, net: anyprec.ConvertedModel, images: torch.Tensor, labels: torch.Tensor
) -> None:
    def train(oneshot: anyprec.OneShot) -> list[anyprec.BitConfig]:
        seen = []
        for path in oneshot.paths():
            path.loss(net(images), labels, torch.nn.functional.cross_entropy).backward()
            seen.append(path.config)
        oneshot.step()
        return seen

    scheduler = anyprec.BitWidthScheduler(start=0.0, period=0.2)
    oneshot = anyprec.OneShot(net, total_steps=10, sampler=sampler, scheduler=scheduler, seed=3)
    train(oneshot)
    state = oneshot.state_dict()
    expected = [train(oneshot) for _ in range(2)]
    resumed = anyprec.OneShot(net, total_steps=10, sampler=sampler, scheduler=scheduler, seed=99)
    resumed.load_state_dict(state)
    assert [train(resumed) for _ in range(2)] == expected

"""The bit-width scheduler: its metric, its times, and what it freezes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import anyprec
from anyprec.bits import Bits, LayerCandidates
from anyprec.nn.quantizers import WeightQuantizer
from anyprec.training.scheduler import BitWidthScheduler, layer_instability, unstable_fractions


def fraction_bin_by_bin(weight: Tensor, step: Tensor, bits: int) -> float:
    """The published code's way: look at each bin's weights, one channel at a time."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    count = 0
    for channel, s in zip(weight, step.expand(len(weight)), strict=True):
        codes = (channel / s).round().clamp(low, high)
        for code in range(low, high + 1):
            inside = channel[codes == code]
            if code > low:
                count += int((inside < s * (code - 0.375)).sum())
            if code < high:
                count += int((inside > s * (code + 0.375)).sum())
    return count / weight.numel()


@pytest.mark.parametrize("channels", [None, 6])
def test_unstable_fractions_are_those_found_bin_by_bin(channels: int | None) -> None:
    weight = torch.randn(6, 4, 3, 3)
    quantizer = WeightQuantizer((2, 3, 5, 8), channels=channels)
    quantizer.initialize(weight)
    found = unstable_fractions(weight, quantizer, margin=0.375)
    assert list(found) == [2, 3, 5, 8]
    for index, bits in enumerate(found):
        expected = fraction_bin_by_bin(weight, quantizer.step[index].detach(), bits)
        assert 0 < expected < 0.5
        assert float(found[bits]) == pytest.approx(expected, abs=1e-6)


def test_clipped_weights_are_not_unstable() -> None:
    quantizer = WeightQuantizer((2,), channels=None)
    quantizer.step.data.fill_(1.0)
    # Codes -2 to 1: only 0.45 and -1.55 lie near a threshold; -2.45, 1.45 and 9.45 are clipped.
    weight = torch.tensor([[0.45, -1.55, -2.45, 1.45, 9.45, 0.2, -1.0, 1.0]])
    assert float(unstable_fractions(weight, quantizer, margin=0.375)[2]) == 2 / 8


def test_a_layers_instability_is_the_mean_of_fractions_over_their_bits() -> None:
    assert layer_instability({2: 0.3, 4: 0.2, 8: 0.1}) == pytest.approx((0.15 + 0.05 + 0.0125) / 3)


def test_events_of_the_papers_run_fall_on_its_epochs() -> None:
    """150 epochs of 10 steps: every 2 epochs from the sixth, every 15 after 72 % of training."""
    scheduler = BitWidthScheduler()
    steps = [step for step in range(1500) if scheduler.is_event(step, 1500)]
    assert [step / 10 for step in steps] == [*range(6, 108, 2), *range(108, 150, 15)]


@pytest.mark.parametrize("total", [1, 7, 40, 234, 10_007])
def test_a_run_of_any_length_has_its_events_within_a_step_of_their_times(total: int) -> None:
    scheduler = BitWidthScheduler(start=0.1, period=0.1, late=0.5, late_period=0.2)
    times = [0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9]
    steps = [step for step in range(total) if scheduler.is_event(step, total)]
    expected = sorted({min(int(time * total + 1e-6), total - 1) for time in times})
    assert steps == expected


def test_the_ratio_falls_on_a_cosine() -> None:
    scheduler = BitWidthScheduler(first_ratio=0.6, last_ratio=0.2)
    for time in (0.0, 0.25, 0.5, 1.0):
        assert scheduler.ratio(time) == pytest.approx(0.4 + 0.2 * math.cos(math.pi * time))


def test_the_most_unstable_layers_lose_their_lowest_bit_width() -> None:
    wide, narrow = LayerCandidates((2, 3, 4), (2, 3, 4)), LayerCandidates((3, 4), (3, 4))
    candidates = {
        "first": LayerCandidates((8,), (8,)),
        "a": wide,
        "b": narrow,
        "c": wide,
        "d": wide,
        "e": wide,
    }
    unrest = {"a": 0.1, "b": 0.3, "c": 0.3, "d": 0.2, "e": 0.3}
    instability = {
        path: dict.fromkeys(candidates[path].weight, value) for path, value in unrest.items()
    }
    # Five layers have a choice; half of them, rounded down, are two. Lower bits weigh more, so c
    # comes before b.
    assert BitWidthScheduler().choose_frozen(instability, candidates, 0.0) == {
        "c": Bits(3, 2),
        "e": Bits(3, 2),
    }
    assert BitWidthScheduler().choose_frozen(instability, candidates, 1.0) == {"c": Bits(3, 2)}
    both = BitWidthScheduler(activations=True, first_ratio=1.0)
    assert both.choose_frozen(instability, candidates, 0.0) == {
        "a": Bits(3, 3), "b": Bits(4, 4), "c": Bits(3, 3), "d": Bits(3, 3), "e": Bits(3, 3),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"start": 1.5}, "start=1.5 must be from 0 to 1"),
        ({"last_ratio": -0.1}, "last_ratio=-0.1 must be from 0 to 1"),
        ({"period": 0.0}, "period=0.0 must be positive"),
        ({"margin": 0.7}, "margin=0.7 must be from 0 to 0.5"),
    ],
)
def test_settings_out_of_range_are_refused(arguments: dict[str, float], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        BitWidthScheduler(**arguments)


def run(
    net: anyprec.ConvertedModel,
    oneshot: anyprec.OneShot,
    images: Tensor,
    labels: Tensor,
    steps: int,
) -> None:
    for _ in range(steps):
        for path in oneshot.paths():
            path.loss(net(images), labels, torch.nn.functional.cross_entropy).backward()
        oneshot.step()


def test_frozen_candidates_are_not_drawn_and_decided_anew_at_each_event(
    net: anyprec.ConvertedModel, images: Tensor, labels: Tensor
) -> None:
    scheduler = BitWidthScheduler(
        start=0.0, period=0.5, late=1.0, first_ratio=0.67, last_ratio=0.67
    )
    oneshot = anyprec.OneShot(net, total_steps=2, scheduler=scheduler, seed=1)
    run(net, oneshot, images, labels, 1)
    frozen = net.frozen
    assert len(frozen) == 2  # of depthwise, pointwise and head
    for path, lowest in frozen.items():
        assert lowest.weight == net.candidates[path].weight[1]
        assert lowest.activation == net.candidates[path].activation[0]
        drawn = {config[path].weight for config in oneshot.random_configs(200)}
        assert drawn == set(net.candidates[path].weight[1:])
    (free,) = {"depthwise", "pointwise", "head"} - frozen.keys()
    # All weights of the free layer lie between two codes of every bit-width, others on codes.
    with torch.no_grad():
        for path in ("depthwise", "pointwise", "head"):
            net.get_submodule(path).weight_quantizer.step.fill_(0.5)
            net.get_submodule(path).weight.fill_(0.24 if path == free else 0.0)
    net.freeze({})
    run(net, oneshot, images, labels, 1)
    assert free in net.frozen


def simulated_events(
    instability: dict[str, dict[int, float]],
    candidates: dict[str, LayerCandidates],
    count: int,
    *,
    scheduler: BitWidthScheduler,
) -> list[set[str]]:
    """Layers that each of several events freezes, while the instability stays as it is."""
    frozen_sets = []
    current = dict(candidates)
    for _ in range(count):
        frozen = scheduler.choose_frozen(instability, candidates, 0.5, current=current)
        current = dict(candidates)
        for path, lowest in frozen.items():
            current[path] = candidates[path].above(lowest)
        frozen_sets.append(set(frozen))
    return frozen_sets


def test_the_frozen_set_rotates_while_instability_stays_the_same() -> None:
    """A frozen layer loses the large term of its lowest bit-width, and others come before it."""
    candidates, instability = {}, {}
    for index in range(20):
        widths = (3, 4, 6) if index % 4 == 0 else (2, 3, 4, 6)
        candidates[f"layer{index}"] = LayerCandidates(widths, widths)
        instability[f"layer{index}"] = {
            bits: 0.24 * (1 - 0.004 * index) * (1 - 0.02 * bits) for bits in widths
        }
    scheduler = BitWidthScheduler(first_ratio=0.35, last_ratio=0.35)
    frozen_sets = simulated_events(instability, candidates, 20, scheduler=scheduler)
    assert all(len(frozen) == 7 for frozen in frozen_sets)
    # No layer is frozen twice running: fifteen have 2 bits, which make the largest term.
    for before, after in itertools.pairwise(frozen_sets):
        assert not before & after
    assert len(set.union(*frozen_sets)) >= 14


def test_a_layer_that_stays_far_less_stable_than_others_stays_frozen() -> None:
    widths = LayerCandidates((2, 3), (2, 3))
    candidates = dict.fromkeys(("calm", "wild", "mild"), widths)
    instability = {"calm": {2: 0.01, 3: 0.01}, "wild": {2: 0.5, 3: 0.5}, "mild": {2: 0.1, 3: 0.1}}
    scheduler = BitWidthScheduler(first_ratio=0.34, last_ratio=0.34)
    frozen_sets = simulated_events(instability, candidates, 4, scheduler=scheduler)
    assert frozen_sets == [{"wild"}] * 4


def test_training_ranks_layers_by_the_candidates_in_use(
    net: anyprec.ConvertedModel, images: Tensor, labels: Tensor
) -> None:
    scheduler = BitWidthScheduler(start=0.0, period=0.25, late=1.0, first_ratio=0.4, last_ratio=0.4)
    oneshot = anyprec.OneShot(net, total_steps=4, scheduler=scheduler)
    # Alike but for a little: without rotation the first layer would be frozen at every event.
    wide = {2: 0.3, 3: 0.1, 4: 0.1, 8: 0.1}
    oneshot._drawer._measure_instability = lambda _derived: {
        "depthwise": {3: 0.1, 4: 0.1, 8: 0.1},
        "pointwise": wide,
        "head": {**wide, 2: 0.29},
    }
    frozen = []
    for _ in range(4):
        run(net, oneshot, images, labels, 1)
        frozen.append(set(net.frozen))
    assert frozen == [{"pointwise"}, {"head"}, {"pointwise"}, {"head"}]


def test_frozen_candidates_are_seen_in_the_summary(net: anyprec.ConvertedModel) -> None:
    net.freeze({"head": (3, 2), "depthwise": "W4A8"})
    text = str(net.summary())
    rows = {line.split()[0]: line.split() for line in text.splitlines()[2:]}
    assert rows["head"][4:6] == ["(2),3,4,8", "2,3,4,8"]
    assert rows["depthwise"][4:6] == ["(3),4,8", "(3),(4),8"]
    assert rows["pointwise"][4:6] == ["2,3,4,8", "2,3,4,8"]


def test_freezing_what_does_not_fit_is_refused_and_nothing_changes(
    net: anyprec.ConvertedModel,
) -> None:
    net.freeze({"head": 3})
    with pytest.raises(
        anyprec.BitsError, match="no quantized layer 'heads' to freeze candidates of"
    ):
        net.freeze({"heads": 3})
    with pytest.raises(anyprec.BitsError, match="W5A5 is not a candidate of layer 'head'"):
        net.freeze({"head": 5})
    assert net.frozen == {"head": Bits(3, 3)}
    net.freeze({"head": 2})
    assert net.frozen == {}


def test_search_leaves_out_frozen_candidates(
    net: anyprec.ConvertedModel, images: Tensor, labels: Tensor
) -> None:
    net.freeze({"head": 4, "pointwise": (3, 2)})
    result = anyprec.search(net, [(images, labels)], "W4A4")
    assert all(
        config["head"].weight >= 4 and config["pointwise"].weight >= 3
        for config in result.evaluated
    )
    with pytest.raises(anyprec.BudgetError):
        anyprec.search(net, [(images, labels)], "W2A2")
    net.set_bits(2)  # a frozen candidate has its step sizes all the same
    assert net.bits["head"] == Bits(2, 2)

"""`search` on a real (small) network: contracts of the result, objectives, and the model left as it was."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

import anyprec
from anyprec.bits import BitConfig, Bits
from anyprec.cost import cost_model
from anyprec.errors import BudgetError, NotCalibratedError
from anyprec.searching.evaluator import Evaluator


@pytest.fixture
def batches(images: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(images[:5], labels[:5]), (images[5:], labels[5:])]


@pytest.mark.parametrize("budget", ["W4A4", "W3A3", "60%", 0.5, anyprec.Budget(size=4000), "5.5 bits"])
@pytest.mark.parametrize("objective", ["loss", "divergence"])
def test_the_result_fits_and_is_not_worse_than_uniform_configurations_that_fit(
    budget: object, objective: str, net: anyprec.ConvertedModel, batches: list[tuple[Tensor, Tensor]]
) -> None:
    result = anyprec.search(net, batches, budget, objective=objective)
    assert result.utilisation <= 1
    costs = cost_model(net)
    for name, limit in result.budget.limits.items():
        assert getattr(costs, name)(result.config) <= limit
    net.eval()
    evaluator = Evaluator(net, batches, objective)
    assert evaluator(result.config) == result.score
    for bits in (2, 3, 4, 8):
        config = net.resolve_bits(bits)
        if all(getattr(costs, name)(config) <= limit for name, limit in result.budget.limits.items()):
            assert result.score <= evaluator(config)


def test_the_search_comes_close_to_the_best_of_all_configurations(
    net: anyprec.ConvertedModel, batches: list[tuple[Tensor, Tensor]]
) -> None:
    result = anyprec.search(net, batches, "W3A3", objective="divergence")
    costs, limit = cost_model(net), result.budget.limits["bitops"]
    evaluator = Evaluator(net.eval(), batches, "divergence")
    choices = [[Bits(w, a) for w in layer.weight for a in layer.activation] for layer in net.candidates.values()]
    everything = (BitConfig(dict(zip(net.candidates, bits, strict=True))) for bits in itertools.product(*choices))
    fitting = [config for config in everything if costs.bitops(config) <= limit]
    scores = sorted(evaluator(config) for config in fitting[:: max(1, len(fitting) // 400)])
    # A few images make neighbouring configurations a matter of rounding: among the best percent is what counts.
    assert result.score <= scores[len(scores) // 100]


def test_the_model_is_left_as_it_was_also_after_an_exception(
    net: anyprec.ConvertedModel, batches: list[tuple[Tensor, Tensor]]
) -> None:
    net.train()
    net.stem_norm.eval()
    net.set_bits({"head": 2})
    before, bits = {name: value.clone() for name, value in net.state_dict().items()}, net.bits

    def broken(model: anyprec.ConvertedModel) -> float:
        model.set_bits(8)
        raise RuntimeError("no power")

    anyprec.search(net, batches, "W4A4", max_evaluations=8)
    with pytest.raises(RuntimeError, match="no power"):
        anyprec.search(net, batches, "W4A4", objective=broken)
    assert net.bits == bits
    assert net.training
    assert not net.stem_norm.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_users_function_is_the_objective_and_nothing_is_evaluated_twice(net: anyprec.ConvertedModel) -> None:
    seen: list[BitConfig] = []

    def objective(model: anyprec.ConvertedModel) -> float:
        assert not torch.is_grad_enabled()
        assert not model.training
        seen.append(model.bits)
        return sum(4.0**-bits.weight + 4.0**-bits.activation for bits in model.bits.values())

    result = anyprec.search(net, [], "W4A4", objective=objective)
    assert len(seen) == len(set(seen)) == result.evaluations == len(result.evaluated)
    assert (
        result.evaluated[result.config]
        == result.score
        == min(
            score
            for config, score in result.evaluated.items()
            if cost_model(net).bitops(config) <= result.budget.bitops
        )
    )
    assert "GBitOPs" in str(result)


def test_objectives_are_their_definitions(
    net: anyprec.ConvertedModel, batches: list[tuple[Tensor, Tensor]], images: Tensor, labels: Tensor
) -> None:
    config = net.resolve_bits(2)
    with torch.no_grad():
        with net.using_bits(config):
            logits = net(images)
        with net.using_bits(8):
            reference = net(images)
    loss = nn.functional.cross_entropy(logits, labels)
    target = reference.softmax(dim=1)
    divergence = (target * (reference.log_softmax(dim=1) - logits.log_softmax(dim=1))).sum(dim=1).mean()
    assert Evaluator(net, batches, "loss")(config) == pytest.approx(float(loss), rel=1e-5)
    assert Evaluator(net, batches, "divergence")(config) == pytest.approx(float(divergence), rel=1e-4)
    assert Evaluator(net, batches, "loss", max_batches=1)(config) != pytest.approx(float(loss), rel=1e-5)


def test_an_output_that_is_not_finite_counts_as_infinitely_bad(
    net: anyprec.ConvertedModel, batches: list[tuple[Tensor, Tensor]]
) -> None:
    evaluator = Evaluator(net, batches, lambda _: math.nan)
    assert evaluator(net.resolve_bits(4)) == math.inf


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"budget": "2 GBitFlops"}, BudgetError, "cannot read '2 GBitFlops' as a budget"),
        ({"budget": "W9A9"}, BudgetError, "weight bit-width 9 is not supported"),
        ({"budget": "1 KBitOPs"}, BudgetError, "no configuration fits the budget 1 KBitOPs: achievable are"),
        ({"objective": "accuracy"}, ValueError, "objective 'accuracy' is unknown: use one of"),
        ({"max_evaluations": 1}, BudgetError, "max_evaluations=1 is too few"),
        ({"alpha": 0.0}, BudgetError, "alpha=0.0"),
        ({"val_loader": []}, ValueError, "the loader yields no batch"),
    ],
)
def test_what_cannot_be_searched_is_refused_and_the_model_stays(
    arguments: dict[str, object],
    error: type[Exception],
    text: str,
    net: anyprec.ConvertedModel,
    batches: list[tuple[Tensor, Tensor]],
) -> None:
    net.set_bits(3)
    before = net.bits
    with pytest.raises(error, match=text):
        anyprec.search(net, **{"val_loader": batches, "budget": "W4A4", **arguments})
    assert net.bits == before


def test_an_uncalibrated_network_is_refused(float_net: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> None:
    model = anyprec.convert(float_net, example_input=batches[0][0])
    with pytest.raises(NotCalibratedError, match=r"anyprec\.calibrate"):
        anyprec.search(model, batches, "W4A4")

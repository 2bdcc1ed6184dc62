"""`search` on a small network: contracts of the result, objectives, the model left as it was."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import anyprec
from anyprec.bits import BitConfig, Bits, LayerCandidates
from anyprec.errors import BitsError, BudgetError, NotCalibratedError, SearchError
from anyprec.model.cost import CostModel, LayerCost
from anyprec.model.costing import cost_model
from anyprec.searching.measuring.evaluator import Evaluator


@pytest.fixture
def batches(images: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(images[:5], labels[:5]), (images[5:], labels[5:])]


@pytest.mark.parametrize(
    "budget", ["W3A3", 0.5, anyprec.Budget(size=4000), "5.5 bits", "5 activation bits and W4A4"]
)
@pytest.mark.parametrize("objective", ["loss", "divergence", "error"])
def test_the_result_fits_and_is_not_worse_than_uniform_configurations_that_fit(
    budget: object,
    objective: str,
    net: anyprec.ConvertedModel,
    batches: list[tuple[Tensor, Tensor]],
) -> None:
    result = anyprec.search(net, batches, budget, objective=objective, max_evaluations=24)
    assert result.utilisation <= 1
    costs = cost_model(net)
    for name, limit in result.budget.limits.items():
        assert costs.total(name, result.config) <= limit
    net.eval()
    evaluator = Evaluator(net, batches, objective)
    assert evaluator(result.config) == result.score
    for bits in (2, 3, 4, 8):
        config = net.resolve_bits(bits)
        if all(costs.total(name, config) <= limit for name, limit in result.budget.limits.items()):
            assert result.score <= evaluator(config)


def test_the_search_comes_close_to_the_best_of_all_configurations(
    net: anyprec.ConvertedModel, batches: list[tuple[Tensor, Tensor]]
) -> None:
    result = anyprec.search(net, batches, "W3A3", objective="divergence")
    costs, limit = cost_model(net), result.budget.limits["bitops"]
    evaluator = Evaluator(net.eval(), batches, "divergence")
    choices = [
        [Bits(w, a) for w in layer.weight for a in layer.activation]
        for layer in net.candidates.values()
    ]
    everything = (
        BitConfig(dict(zip(net.candidates, bits, strict=True)))
        for bits in itertools.product(*choices)
    )
    fitting = [config for config in everything if costs.bitops(config) <= limit]
    scores = sorted(evaluator(config) for config in fitting[:: max(1, len(fitting) // 200)])
    # With few images neighbours differ by roundings: to be among the best percent counts.
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


def test_a_users_function_is_the_objective_and_nothing_is_evaluated_twice(
    net: anyprec.ConvertedModel,
) -> None:
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
    net: anyprec.ConvertedModel,
    batches: list[tuple[Tensor, Tensor]],
    images: Tensor,
    labels: Tensor,
) -> None:
    config = net.resolve_bits(2)
    with torch.no_grad():
        with net.using_bits(config):
            logits = net(images)
        with net.using_bits(None):
            reference = net(images)
    loss = nn.functional.cross_entropy(logits, labels)
    target = reference.softmax(dim=1)
    divergence = (
        (target * (reference.log_softmax(dim=1) - logits.log_softmax(dim=1))).sum(dim=1).mean()
    )
    assert Evaluator(net, batches, "loss")(config) == pytest.approx(float(loss), rel=1e-5)
    assert Evaluator(net, batches, "divergence")(config) == pytest.approx(
        float(divergence), rel=1e-4
    )
    error = float((logits.argmax(dim=1) != labels).float().mean())
    assert Evaluator(net, batches, "error")(config) == error
    without_labels = [images for images, _ in batches]
    assert Evaluator(net, without_labels, "divergence")(config) == pytest.approx(
        float(divergence), rel=1e-4
    )
    assert Evaluator(net, batches, "loss", batches=1)(config) != pytest.approx(
        float(loss), rel=1e-5
    )


def test_an_output_that_is_not_finite_counts_as_infinitely_bad(
    net: anyprec.ConvertedModel, batches: list[tuple[Tensor, Tensor]]
) -> None:
    def objective(model: anyprec.ConvertedModel) -> float:
        return math.nan if model.bits == model.resolve_bits(3) else cheap(model)

    result = anyprec.search(net, batches, "W4A4", objective=objective)
    assert result.evaluated[net.resolve_bits(3)] == math.inf
    assert result.not_finite == 1
    assert "(1 without a finite score)" in repr(result)
    assert "(1 without a finite score)" in str(result)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"budget": "2 GBitFlops"}, BudgetError, "cannot read '2 GBitFlops' as a budget"),
        ({"budget": "W9A9"}, BudgetError, "weight bit-width 9 is not supported"),
        (
            {"budget": "1 KBitOPs"},
            BudgetError,
            "no configuration fits the budget 1 KBitOPs: achievable are",
        ),
        ({"objective": "accuracy"}, SearchError, "objective 'accuracy' is unknown: use one of"),
        ({"max_evaluations": 1}, SearchError, "max_evaluations=1 is too few"),
        ({"alpha": 0.0}, SearchError, "alpha=0.0"),
        ({"val_loader": []}, SearchError, "the loader yields no batch"),
        ({"algorithm": "magic"}, SearchError, "algorithm 'magic' is unknown: use one of"),
        ({"norms": "none"}, SearchError, "norms='none' is unknown"),
        ({"max_seconds": 0}, SearchError, "max_seconds=0 leaves nothing to do"),
        ({"budget": []}, BudgetError, "names no budget"),
        ({"budget": "2 ms"}, BudgetError, "nothing is known of the cost 'latency'"),
        ({"tied": "heads"}, SearchError, "tied='heads' is unknown"),
        ({"allowed": "W5A5"}, BitsError, "leaves nothing for layer"),
        ({"costs": {"latency": {}}}, BudgetError, "the cost table 'latency' lacks"),
        (
            {"costs": {"size": lambda path, bits: 1.0}},
            BudgetError,
            "would replace a cost that every network has",
        ),
        (
            {"costs": {"energy": lambda path, bits: -1.0}},
            BudgetError,
            "use a number that is not negative",
        ),
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


def test_an_uncalibrated_network_is_refused(
    float_net: nn.Module, batches: list[tuple[Tensor, Tensor]]
) -> None:
    model = anyprec.convert(float_net, example_input=batches[0][0])
    with pytest.raises(NotCalibratedError, match=r"anyprec\.calibrate"):
        anyprec.search(model, batches, "W4A4")


# Constraints, costs, budgets


def cheap(model: anyprec.ConvertedModel) -> float:
    """Prefers bits of later layers."""
    return sum(
        (index + 1) * (4.0**-b.weight + 4.0**-b.activation)
        for index, b in enumerate(model.bits.values())
    )


@pytest.mark.parametrize(
    ("allowed", "widths"), [((4, 8), {4, 8}), (("W4A4", "W8A8"), {4, 8}), ({"head": 3}, {3})]
)
def test_only_what_is_allowed_is_evaluated(
    allowed: object, widths: set[int], net: anyprec.ConvertedModel
) -> None:
    if not isinstance(allowed, dict):
        allowed = {"pointwise": allowed, "head": allowed}
    result = anyprec.search(net, [], 0.6, objective=cheap, allowed=allowed)
    seen = {config["head"] for config in result.evaluated}
    assert {bits.weight for bits in seen} | {bits.activation for bits in seen} == widths
    if allowed["head"] == ("W4A4", "W8A8"):
        assert seen == {Bits(4, 4), Bits(8, 8)}


def test_tied_layers_have_one_precision_in_everything_evaluated(
    net: anyprec.ConvertedModel,
) -> None:
    result = anyprec.search(net, [], "W4A4", objective=cheap, tied=[("depthwise", "head")])
    assert all(config["depthwise"] == config["head"] for config in result.evaluated)
    assert any(config["depthwise"] != config["pointwise"] for config in result.evaluated)


class Blocks(nn.Module):
    """Two branches that read the same tensor, and are added."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
        self.main, self.skip, self.last = (nn.Conv2d(8, 8, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.main(x)) + self.skip(x)
        return self.fc(self.last(x).mean(dim=(2, 3)))


@pytest.mark.parametrize("tied", ["inputs", "residual"])
def test_layers_of_the_same_input_or_sum_are_tied(tied: str, images: Tensor) -> None:
    model = anyprec.convert(Blocks().eval(), bits=(2, 4, 8), example_input=images[:1])
    anyprec.calibrate(model, [images])
    result = anyprec.search(model, [], "W4A4", objective=cheap, tied=tied)
    assert all(config["main"] == config["skip"] for config in result.evaluated)
    assert any(config["main"] != config["last"] for config in result.evaluated)


def test_own_costs_and_several_limits_hold(net: anyprec.ConvertedModel) -> None:
    table = {
        path: {Bits(w, a): 1e-3 * max(w, a) for w in (2, 3, 4, 8) for a in (2, 3, 4, 8)}
        for path in net.candidates
    }
    energy = lambda path, bits: float(bits.weight + bits.activation)  # noqa: E731
    result = anyprec.search(
        net,
        [],
        "27 ms and 50 energy and W4A4",
        objective=cheap,
        costs={"latency": table, "energy": energy},
    )
    assert sum(1e-3 * max(b.weight, b.activation) for b in result.config.values()) <= 0.027
    assert sum(b.weight + b.activation for b in result.config.values()) <= 50
    assert set(result.budget.limits) == {"bitops", "latency", "energy"}


def test_norms_of_the_batch_are_used(
    net: anyprec.ConvertedModel, batches: list[tuple[Tensor, Tensor]]
) -> None:
    stored, batch = (
        anyprec.search(net, batches, "W3A3", norms=norms, max_evaluations=12)
        for norms in ("stored", "batch")
    )
    assert batch.norms == "batch"
    shared = set(stored.evaluated) & set(batch.evaluated)
    assert shared
    assert all(stored.evaluated[config] != batch.evaluated[config] for config in shared)
    assert Evaluator(net.eval(), batches, norms="batch")(batch.config) == batch.score


def test_a_list_of_budgets_is_searched_together(net: anyprec.ConvertedModel) -> None:
    result = anyprec.search(net, [], ["W3A3", "W4A4", "5 bits"], objective=cheap)
    assert (
        result.budget == anyprec.search(net, [], "W3A3", objective=cheap, max_evaluations=4).budget
    )
    for budget in ("W3A3", "W4A4", "5 bits"):
        alone = anyprec.search(net, [], budget, objective=cheap)
        assert result.at(budget).score <= 1.01 * alone.score
    assert result.at("W3A3").config == result.config


def test_without_a_budget_the_whole_range_is_searched(net: anyprec.ConvertedModel) -> None:
    result = anyprec.search(net, [], objective=cheap)
    costs = cost_model(net)
    bitops = [found.cost.bitops for found in result.frontier]
    assert bitops[0] == min(costs.bitops(net.resolve_bits(bits)) for bits in (2, 3, 4, 8))
    assert bitops[-1] == costs.bitops(net.resolve_bits(8))
    assert len(bitops) > 8


# When it stops


def test_time_that_is_used_up_ends_the_search(
    net: anyprec.ConvertedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count()
    monkeypatch.setattr(
        "anyprec.searching.algorithms.evaluations.time.monotonic",
        lambda: float(next(clock)),
    )
    result = anyprec.search(net, [], "W3A3", objective=cheap, max_seconds=15)
    assert result.stopped == "max_seconds"
    assert 5 < result.evaluations < 16
    assert result.utilisation <= 1
    assert "(stopped: max_seconds)" in str(result)


def test_an_interrupt_returns_the_best_so_far(net: anyprec.ConvertedModel) -> None:
    bits, calls = net.bits, itertools.count()

    def objective(model: anyprec.ConvertedModel) -> float:
        if next(calls) == 9:
            raise KeyboardInterrupt
        return cheap(model)

    result = anyprec.search(net, [], "W4A4", objective=objective)
    assert (result.stopped, result.evaluations) == ("interrupted", 9)
    limit = result.budget.bitops
    assert result.score == min(
        s for c, s in result.evaluated.items() if cost_model(net).bitops(c) <= limit
    )
    assert net.bits == bits


# The result


@pytest.fixture
def result(
    net: anyprec.ConvertedModel, batches: list[tuple[Tensor, Tensor]]
) -> anyprec.SearchResult:
    return anyprec.search(net, batches, "W3A3", report_loader=batches[::-1], max_evaluations=25)


def test_the_frontier_holds_what_nothing_beats(result: anyprec.SearchResult) -> None:
    frontier = result.frontier
    assert all(
        a.cost.bitops < b.cost.bitops and a.score > b.score for a, b in itertools.pairwise(frontier)
    )
    for config, score in result.evaluated.items():
        bitops = result.costs.bitops(config)
        assert any(found.cost.bitops <= bitops and found.score <= score for found in frontier)


def test_another_budget_is_answered_from_what_was_evaluated(result: anyprec.SearchResult) -> None:
    found = result.at("W4A4")
    limit = result.costs.bitops(result.at("W4A4").config.replace({}))
    assert found.score == min(
        s for c, s in result.evaluated.items() if result.costs.bitops(c) <= limit
    )
    assert result.at(result.budget).config == result.config
    with pytest.raises(
        BudgetError, match="no configuration fits the budget 1 KBitOPs: achievable are"
    ):
        result.at("1 KBitOPs")


def test_accuracies_are_top_1_on_the_report_images(
    result: anyprec.SearchResult, net: anyprec.ConvertedModel, batches: list[tuple[Tensor, Tensor]]
) -> None:
    judge = Evaluator(net.eval(), batches, "error")
    shown = {found.config for found in result.frontier} | set(result.uniform) | {result.config}
    assert set(result.accuracies) == shown
    for config, accuracy in result.accuracies.items():
        assert accuracy == pytest.approx(100 * (1 - judge(config)))
    assert all(found.accuracy == result.accuracies[found.config] for found in result.frontier)


def test_a_result_is_saved_and_loaded_whole(result: anyprec.SearchResult, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    result.save(path)
    loaded = anyprec.SearchResult.load(path)
    assert loaded == result
    assert list(loaded.evaluated.items()) == list(result.evaluated.items())
    assert loaded.frontier == result.frontier
    assert [entry.name for entry in tmp_path.iterdir()] == ["result.json"]


def test_own_costs_and_infinite_scores_are_saved_too(
    net: anyprec.ConvertedModel, tmp_path: Path
) -> None:
    def objective(model: anyprec.ConvertedModel) -> float:
        energy = sum(bits.weight + bits.activation for bits in model.bits.values())
        return 1 / energy if energy > 50 else math.nan

    result = anyprec.search(
        net,
        [],
        "60 energy",
        objective=objective,
        max_evaluations=12,
        costs={"energy": lambda path, bits: float(bits.weight + bits.activation)},
    )
    assert result.not_finite > 0
    result.save(tmp_path / "r")
    loaded = anyprec.SearchResult.load(tmp_path / "r")
    assert loaded == result
    assert loaded.at("56 energy").config == result.at("56 energy").config
    with pytest.raises(BudgetError, match=r"none of the .* that fit 50 energy has a finite score"):
        loaded.at("50 energy")


def test_a_stored_result_without_a_finite_score_is_refused(
    result: anyprec.SearchResult, tmp_path: Path
) -> None:
    file = tmp_path / "r"
    result.save(file)
    stored = json.loads(file.read_text())
    for entry in stored["evaluated"]:
        entry["score"] = None
    file.write_text(json.dumps(stored))
    with pytest.raises(SearchError, match="the configuration that it found has no finite score"):
        anyprec.SearchResult.load(file)


@pytest.mark.parametrize("damage", ["{", "[]", "{}", '{"format": "other"}', "cut", "config"])
def test_a_damaged_result_is_refused(
    damage: str, result: anyprec.SearchResult, tmp_path: Path
) -> None:
    path = tmp_path / "r"
    result.save(path)
    text = path.read_text()
    document = json.loads(text)
    document["config"][0] = [2, 3]
    path.write_text(
        {"cut": text[: len(text) // 2], "config": json.dumps(document)}.get(damage, damage)
    )
    with pytest.raises(SearchError, match="is no search result, or is damaged"):
        anyprec.SearchResult.load(path)
    with pytest.raises(SearchError, match="cannot read the search result"):
        anyprec.SearchResult.load(tmp_path / "missing")
    with pytest.raises(SearchError, match="cannot write"):
        result.save(tmp_path / "missing" / "r")


def test_pictures_and_table(result: anyprec.SearchResult, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result.plot(tmp_path / "frontier.png", title="t")
    result.plot_bits(tmp_path / "bits.png")
    result.plot_bits(tmp_path / "other.png", budget="W4A4")
    assert all(
        (tmp_path / name).stat().st_size > 5000
        for name in ("frontier.png", "bits.png", "other.png")
    )
    table = result.table()
    assert "top-1 %" in [column.header for column in table.columns]
    names = list(table.columns[0].cells)
    assert "W3A3" in names
    assert table.row_count == len({f.config for f in result.frontier} | set(result.uniform))


def many_layers(count: int) -> anyprec.SearchResult:
    """A result for so many layers with long paths, of which each has another precision."""
    paths = [f"stages.{index // 100}.blocks.{index}.mlp.fc1" for index in range(count)]
    widths = tuple(range(2, 9))
    precisions = itertools.cycle(itertools.product(widths, repeat=2))
    config = BitConfig(dict(zip(paths, precisions, strict=False)))
    costs = CostModel(
        layers={path: LayerCost(path, 10**7, 10**5) for path in paths},
        candidates=dict.fromkeys(paths, LayerCandidates(widths, widths)),
    )
    uniform = [BitConfig(dict.fromkeys(paths, bits)) for bits in (2, 4, 8)]
    evaluated = {config: 0.01234, **dict.fromkeys(uniform, 0.5)}
    return anyprec.SearchResult(
        config=config,
        score=0.01234,
        budget=anyprec.Budget(bitops=200e9, size=10**9, own={"energy": 10}),
        evaluated=evaluated,
        uniform=tuple(uniform),
        costs=costs.with_costs({"energy": lambda path, bits: bits.weight / count}),
        objective="divergence",
        norms="stored",
        stopped="max_evaluations",
        layer_runs=100,
    )


def test_a_result_is_shown_on_a_screen_however_many_layers_there_are() -> None:
    result = many_layers(700)
    assert len(str(result)) <= 200
    text = repr(result)
    assert len(text) <= 1200
    assert len(text.splitlines()) <= 20
    assert max(map(len, text.splitlines())) <= 120
    assert "700 layers: 15 x W2A2, " in text
    assert "43 more precisions" in text
    assert "divergence   0.01234" in text
    assert f"{result.cost.bitops / 1e9:.4g} GBitOPs" in text
    assert f"{result.budget}, {result.utilisation:.1%} used" in text
    assert "4, max_evaluations" in text
    assert ".config" in text
    assert '.at("5 MiB")' in text
    for part in (result.frontier[0], result.cost, result.costs):
        assert len(repr(part)) <= 300


def test_a_measured_configuration_of_few_layers_is_counted_by_precision(
    result: anyprec.SearchResult,
) -> None:
    line = next(line for line in repr(result).splitlines() if "layers:" in line)
    counts = [part.split(" x ") for part in line.split("layers: ")[1].split(", ")]
    bits = list(result.config.values())
    assert {(int(count), name) for count, name in counts} == {
        (bits.count(each), str(each)) for each in bits
    }

"""Partial execution: bit for bit what a whole forward pass gives, with fewer layers executed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import anyprec
from anyprec.bits import BitConfig
from anyprec.searching.measuring.evaluator import Evaluator
from anyprec.searching.measuring.execution import PartialExecution


class Owner(nn.Module):
    """Multiplies by parameters without calling a layer for it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(F.linear(x, self.weight))


class OwnerNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, stride=4)
        self.first, self.second = Owner(), Owner()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = x + self.second(self.first(x))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.fc(x.mean(dim=1))


class Branching(nn.Module):
    """Its forward asks for values, which no graph has."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.middle(x) if x.mean() > -100 else x
        return self.fc(x.mean(dim=(2, 3)))


class InPlace(nn.Module):
    """Changes what a layer read, after it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle, self.fc = (
            nn.Conv2d(3, 8, 3),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Linear(8, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.middle(x)
        x += 1.0
        return self.fc((x * y).mean(dim=(2, 3)))


def own_network(network: nn.Module) -> anyprec.ConvertedModel:
    images = torch.randn(4, 3, 16, 16)
    model = anyprec.convert(network.eval(), bits=(2, 4, 8), example_input=images[:1])
    anyprec.calibrate(model, [images])
    return model.eval()


NETWORKS = {
    "resnet": ("test_resnet", {"size": 32}),
    "vit": ("test_vit", {"size": 160}),
    "StdConv": ("test_nfnet", {"size": 32}),
    "norm per bits": ("test_efficientnet", {"size": 32}),
    "functional": (OwnerNet, {"size": 16}),
}


@pytest.fixture
def make(
    converted: Callable[..., anyprec.ConvertedModel],
) -> Callable[[str], tuple[anyprec.ConvertedModel, Tensor]]:
    def network(name: str) -> tuple[anyprec.ConvertedModel, Tensor]:
        kind, options = NETWORKS[name]
        size = options["size"]
        model = converted(kind, size=size) if isinstance(kind, str) else own_network(kind())
        return model.eval(), torch.randn(2, 3, size, size)

    return network


def changes_of_one_layer(
    model: anyprec.ConvertedModel, count: int
) -> tuple[BitConfig, list[BitConfig]]:
    """A configuration, and others that differ from it in one layer."""
    anchor = model.resolve_bits(4)
    free = [path for path, layer in model.candidates.items() if layer.lowest != layer.highest]
    some = free[:: max(1, len(free) // count)]
    return anchor, [anchor.replace({path: model.candidates[path].lowest}) for path in some]


def layer_calls(execution: PartialExecution) -> int:
    """Executions of quantized layers in one whole forward pass."""
    return sum(execution._layers.values())


def outputs(
    model: anyprec.ConvertedModel, config: BitConfig, images: Tensor, execution: PartialExecution
) -> bool:
    with model.using_bits(config), torch.no_grad():
        return torch.equal(model(images), execution.run(0, images))


@pytest.mark.parametrize("name", NETWORKS)
def test_the_output_is_bit_identical_and_fewer_layers_run(name: str, make: Callable) -> None:
    model, images = make(name)
    execution, reason = PartialExecution.of(model, [images])
    assert reason is None
    assert execution is not None
    anchor, changed = changes_of_one_layer(model, 5)
    execution.set_anchor(anchor)
    assert outputs(model, anchor, images, execution)
    assert execution.layer_runs == layer_calls(execution)
    assert all(outputs(model, config, images, execution) for config in changed)
    assert execution.layer_runs < (1 + len(changed)) * layer_calls(execution)
    # The anchor may move, also to where nothing is the same.
    execution.set_anchor(changed[-1])
    assert all(
        outputs(model, config, images, execution)
        for config in (changed[-1], anchor, model.resolve_bits(2))
    )
    execution.set_anchor(model.resolve_bits(8))
    assert all(outputs(model, model.resolve_bits(bits), images, execution) for bits in (8, 2, 8, 4))


def test_a_configuration_seen_before_at_the_anchor_costs_no_layer_but_the_last(
    make: Callable,
) -> None:
    model, images = make("resnet")
    execution, _ = PartialExecution.of(model, [images])
    anchor = model.resolve_bits(4)
    execution.set_anchor(anchor)
    assert outputs(model, anchor, images, execution)
    before = execution.layer_runs
    assert outputs(model, anchor, images, execution)
    assert execution.layer_runs - before <= 1


@pytest.mark.parametrize("memory", [0, 20_000])
def test_little_memory_changes_no_output_and_saves_less(memory: int, make: Callable) -> None:
    model, images = make("resnet")
    anchor, changed = changes_of_one_layer(model, 6)
    runs = []
    for room in (memory, 2**30):
        execution, reason = PartialExecution.of(model, [images], memory=room)
        assert reason is None
        execution.set_anchor(anchor)
        assert all(outputs(model, config, images, execution) for config in (anchor, *changed))
        runs.append(execution.layer_runs)
        whole = layer_calls(execution) * (1 + len(changed))
    assert runs[1] < runs[0] <= whole
    assert memory > 0 or runs[0] == whole


def test_own_statistics_of_a_configuration_are_part_of_what_changes(
    net: anyprec.ConvertedModel, images: Tensor
) -> None:
    net.eval()
    execution, _ = PartialExecution.of(net, [images])
    anchor, changed = changes_of_one_layer(net, 4)
    anyprec.update_norms(net, [images], changed[1])
    execution.set_anchor(anchor)
    assert all(outputs(net, config, images, execution) for config in (anchor, *changed, anchor))
    execution.set_anchor(changed[1])
    assert all(outputs(net, config, images, execution) for config in (changed[1], *changed, anchor))


@pytest.mark.parametrize(
    ("network", "reason"),
    [(Branching, "torch.fx cannot trace it"), (InPlace, "")],
)
def test_a_network_without_a_faithful_graph_is_run_whole_and_says_why(
    network: type[nn.Module], reason: str
) -> None:
    model = own_network(network())
    images = torch.randn(3, 3, 16, 16)
    batches = [(images, torch.arange(3))]
    evaluator, plain = Evaluator(model, batches), Evaluator(model, batches, reuse=False)
    assert plain.unable == "reuse=False"
    if network is Branching:
        assert reason in evaluator.unable
    anchor, changed = changes_of_one_layer(model, 2)
    evaluator.set_anchor(anchor)
    for config in (anchor, *changed, anchor):
        assert evaluator(config) == plain(config)
    result = anyprec.search(model, batches, "W4A4", max_evaluations=8)
    assert result.layer_runs >= 8 * len(model.candidates) or evaluator.unable is None


def test_a_network_whose_input_has_a_default_and_that_holds_constants_runs_in_parts() -> None:
    class Defaulted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor | None = None, scale: float = 2.0) -> Tensor:
            shifted = self.b(self.a(x).relu()) + torch.tensor([1.0, 2.0, 3.0, 4.0])
            return self.c(shifted) * scale

    images = torch.randn(6, 4)
    model = anyprec.convert(Defaulted().eval(), example_input=images)
    anyprec.calibrate(model, [images])
    execution, reason = PartialExecution.of(model, [images])
    assert reason is None
    model.set_bits(4)
    with torch.no_grad():
        assert torch.equal(execution.run(0, images), model(images))


def test_a_function_of_the_model_runs_it_whole(net: anyprec.ConvertedModel) -> None:
    evaluator = Evaluator(net.eval(), [], lambda _: 0.0)
    assert evaluator.unable == "the objective is a function of the whole model"
    evaluator.set_anchor(net.resolve_bits(4))


@pytest.mark.parametrize("norms", ["stored", "batch"])
@pytest.mark.parametrize("objective", ["loss", "divergence"])
def test_a_search_finds_the_same_with_and_without_reuse(
    objective: str, norms: str, net: anyprec.ConvertedModel, images: Tensor, labels: Tensor
) -> None:
    batches = [(images[:5], labels[:5]), (images[5:], labels[5:])]

    def run(**options: object) -> anyprec.SearchResult:
        return anyprec.search(
            net, batches, "W3A3", objective=objective, norms=norms, max_evaluations=25, **options
        )

    whole = run(reuse=False)
    assert whole.layer_runs == whole.evaluations * 2 * len(net.candidates)
    for options in ({}, {"memory": 0}, {"memory": 30_000}):
        partial = run(**options)
        assert list(partial.evaluated.items()) == list(whole.evaluated.items())
        assert (partial.config, partial.score) == (whole.config, whole.score)
        assert partial.layer_runs <= whole.layer_runs
        if not options:
            assert partial.layer_runs < 0.8 * whole.layer_runs


@pytest.mark.parametrize("name", ["resnet", "functional"])
def test_a_search_of_a_larger_network_is_the_same_with_and_without_reuse(
    name: str, make: Callable
) -> None:
    model, images = make(name)
    results = [
        anyprec.search(
            model, [images], "60%", objective="divergence", max_evaluations=25, reuse=reuse
        )
        for reuse in (True, False)
    ]
    assert list(results[0].evaluated.items()) == list(results[1].evaluated.items())
    assert results[0].config == results[1].config
    assert results[0].layer_runs < results[1].layer_runs

"""How layers are connected: first and last layers, constants, norms and features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anyprec.network.analysis import analyze
from anyprec.network.facts import NetworkFacts

WIDTH = 6


class Parts(nn.Module):
    """Layers, and a forward that a test gives."""

    def __init__(self, forward: Callable[[Parts, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.c, self.d = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.product = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.position = nn.Parameter(torch.randn(1, WIDTH))
        self.norm, self.act, self.layer_norm = (
            nn.BatchNorm1d(WIDTH), nn.GELU(), nn.LayerNorm(WIDTH),
        )  # fmt: skip
        self.run = forward

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def facts_of(forward: Callable[[Any, Tensor], Any]) -> NetworkFacts:
    return analyze(Parts(forward), torch.randn(2, WIDTH))


def paths(facts: NetworkFacts, role: str) -> set[str]:
    return {path for path, layer in facts.layers.items() if getattr(layer, role)}


def without_graph(y: Tensor) -> Tensor:
    """What torch.fx cannot follow."""
    if y.sum() > 1e9:
        y = -y
    return y


@dataclass(slots=True)
class Detection:
    boxes: Tensor
    scores: list[Tensor]


def sized(m: Parts, x: Tensor) -> Tensor:
    y = m.b(m.a(x)) * x.shape[-1] + len(x) + x.size(0) + x.numel()
    return m.c(y + torch.zeros_like(x) + x.new_ones(x.shape))


def looped(m: Parts, x: Tensor) -> Tensor:
    for _ in range(3):
        x = m.b(m.a(x))
    return x


def preallocated(m: Parts, x: Tensor) -> Tensor:
    result = torch.empty(len(x), 2 * WIDTH)
    result[:, :WIDTH] = m.c(x)
    result[:, WIDTH:] = m.d(x)
    return result


def written_into(m: Parts, x: Tensor) -> Tensor:
    result = torch.empty(len(x), 2 * WIDTH)
    torch.mm(x, m.a.weight.T, out=result[:, :WIDTH])
    torch.mm(x, m.b.weight.T, out=result[:, WIDTH:])
    return result


def masked(m: Parts, x: Tensor) -> Tensor:
    return m.c(m.b(m.a(x)) * (x != 0))


CONNECTED: dict[str, tuple[Callable[[Any, Tensor], Any], str, str]] = {
    "a shape is no data": (sized, "a", "c"),
    "a mask is no image": (masked, "a", "c"),
    "two stems": (lambda m, x: m.c(m.a(x) + m.b(x)), "ab", "c"),
    "two heads": (lambda m, x: (m.c(m.a(x)), [m.d(m.a(x))]), "a", "cd"),
    "heads without a graph": (lambda m, x: {"c": m.c(y := without_graph(m.a(x))), "d": m.d(y)},
                              "a", "cd"),
    "heads in an object": (lambda m, x: Detection(m.c(m.a(x)), [m.d(m.b(x))]), "ab", "cd"),
    "the end of a residual stream": (lambda m, x: (y := m.a(x)) + m.b(y), "a", "b"),
    "a layer on its own output": (lambda m, x: m.a(m.a(x)), "a", "a"),
    "the end of a loop": (looped, "a", "b"),
    "an output that was allocated before": (preallocated, "cd", "cd"),
    "an output of parts": (written_into, "ab", "ab"),
    "an output that leaves torch": (lambda m, x: m.c(m.a(x)).numpy(), "a", "c"),
    "a side branch that nobody reads": (lambda m, x: (m.b(m.a(x)), m.c(m.a(x)))[1], "a", "c"),
    "the input beside the output": (lambda m, x: (x, m.c(m.a(x))), "a", "c"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONNECTED)
def test_first_and_last_layers_are_those_at_the_ends(name: str) -> None:
    forward, first, last = CONNECTED[name]
    facts = facts_of(forward)
    assert (paths(facts, "first"), paths(facts, "last")) == (set(first), set(last))


def test_a_bare_parameter_may_be_the_last_layer() -> None:
    facts = facts_of(lambda m, x: m.b(m.a(x)) @ m.product)
    assert paths(facts, "last") == {"matrices.product"}


def test_the_first_argument_is_the_input_even_with_a_default() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor | None = None, *rest: Any, scale: float = 1.0) -> Tensor:
            return self.b(self.a(x)) * scale

    facts = analyze(Optional(), torch.randn(2, WIDTH))
    assert (paths(facts, "first"), paths(facts, "last")) == ({"a"}, {"b"})
    assert not paths(facts, "constant")


def test_only_layers_on_values_of_the_code_and_the_weights_are_constant() -> None:
    def positions(m: Parts, x: Tensor) -> Tensor:
        table = m.c(m.b(m.position.expand(len(x), -1)))
        return m.d(m.a(x) + table + torch.ones_like(x))

    assert paths(facts_of(positions), "constant") == {"b", "c"}


def test_a_number_that_has_left_torch_may_come_back() -> None:
    def averaged(m: Parts, x: Tensor) -> Tensor:
        mean = float(m.a(x).mean())
        return m.d(m.b(torch.full_like(x, mean)))

    assert not paths(facts_of(averaged), "constant")


def test_norms_and_features_are_found_without_a_graph() -> None:
    def forward(m: Parts, x: Tensor) -> Tensor:
        y = without_graph(m.norm(m.a(x).clone()))
        return m.layer_norm(m.c(m.act(m.b(y))))

    facts = facts_of(forward)
    assert facts.untraceable is not None
    assert facts.norms == {"norm": "a"}
    assert facts.layers["b"].feature == "act"
    assert facts.layers["c"].feature == "layer_norm"


def test_what_changes_in_place_before_a_norm_ends_the_pairing() -> None:
    def forward(m: Parts, x: Tensor) -> Tensor:
        y = m.a(x)
        y[:, 0].mul_(2)
        return m.norm(y)

    assert facts_of(forward).norms == {"norm": None}


def test_a_norm_of_two_layers_belongs_to_none() -> None:
    facts = facts_of(lambda m, x: without_graph(m.norm(m.a(x))) + m.norm(m.b(x)))
    assert facts.norms == {"norm": None}

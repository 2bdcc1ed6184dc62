"""What is left to choose under a budget, and that what the solver says is checked against it."""

from __future__ import annotations

from typing import ClassVar

import pytest

from anyprec.bits import BitConfig, Bits, LayerCandidates
from anyprec.searching.algorithms import make_space, moves
from anyprec.searching.algorithms.evaluations import Evaluations
from anyprec.searching.algorithms.moves import Walk
from anyprec.searching.algorithms.predictor import Predictor
from anyprec.searching.algorithms.problem import Problem
from anyprec.searching.algorithms.space import Point
from anyprec.searching.budget.budgets import Budget


class Costs:
    """One layer. Its size is its weight bits; 4-bit weights run as fast as 2-bit ones."""

    names = ("bitops", "size", "latency")
    candidates: ClassVar = {"fc": LayerCandidates((2, 4, 8), (4, 8))}

    def of_layer(self, name: str, path: str, bits: Bits) -> float:
        latency = max(bits.weight, 4) * bits.activation
        return {"bitops": bits.weight * bits.activation, "size": bits.weight, "latency": latency}[
            name
        ]

    def divisor(self, name: str) -> int:
        return 1

    def total(self, name: str, config: BitConfig) -> float:
        return self.of_layer(name, "fc", config["fc"])


def problem(**limits: float) -> Problem:
    return Problem(make_space(Costs.candidates), Budget(**limits), Costs())


@pytest.mark.parametrize(
    ("limits", "left"),
    [
        ({"bitops": 64}, ["W2A4", "W2A8", "W4A4", "W4A8", "W8A4", "W8A8"]),
        ({"size": 8}, ["W2A8", "W4A8", "W8A8"]),
        ({"latency": 64}, ["W4A4", "W4A8", "W8A4", "W8A8"]),
        ({"size": 8, "latency": 64}, ["W2A4", "W2A8", "W4A4", "W4A8", "W8A4", "W8A8"]),
    ],
)
def test_options_that_another_beats_at_no_more_cost_are_left_out(
    limits: dict[str, float], left: list[str]
) -> None:
    assert list(map(str, problem(**limits).space.options[0])) == left


def test_an_answer_of_the_solver_that_exceeds_the_budget_is_not_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = problem(bitops=16)
    answers: list[tuple[float, Point]] = []

    def beside_the_limit(losses: object, shares: object, *, limit: float, **_: object) -> Point:
        bits = Bits(4, 8) if limit == 1 else Bits(4, 4)
        answers.append((limit, asked.space.at_least(bits)))
        return answers[-1][1]

    monkeypatch.setattr(moves, "allocate", beside_the_limit)
    found = Walk(asked, Evaluations(evaluate=None), Predictor(asked.space)).allocate([[0.0] * 6])
    assert found == asked.space.at_least(Bits(4, 4))
    assert len(answers) == 2
    assert answers[1][0] < 1

"""The tables of operators: costs, and the bodies of functions that hide what they run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from anyprec.nn.bodies import body_of
from anyprec.nn.operators import OPERATORS, operands
from anyprec.nn.products import product_macs, product_operands


class Opening(TorchFunctionMode):
    """Runs bodies in place of what hides them, and keeps the weights that operators meet."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        body = body_of(func, args)
        if body is not None:
            with self:
                return body(*args, **(kwargs or {}))
        if func in OPERATORS:
            self.weights.append(operands(args, kwargs or {})[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("bias", "batch_first"), [(True, True), (False, False)])
def test_the_lstm_body_equals_torchs(
    layers: int, bidirectional: bool, bias: bool, batch_first: bool
) -> None:
    lstm = nn.LSTM(
        3, 4, layers, bias=bias, batch_first=batch_first, bidirectional=bidirectional
    ).double()
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    expected, states = lstm(x)
    opening = Opening()
    with opening:
        found, found_states = lstm(x)
    # Sums in another order than the fused kernel's: a few units in the last place of float64.
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found_states, states, rtol=1e-12, atol=1e-14)
    matrices = {id(parameter) for parameter in lstm.parameters() if parameter.ndim == 2}
    assert {id(weight) for weight in opening.weights} == matrices


@pytest.mark.filterwarnings("ignore:LSTM with projections")  # torch says that it will be slower
@pytest.mark.parametrize("lstm", [nn.LSTM(3, 4, proj_size=2), nn.LSTM(3, 4)])
def test_an_lstm_that_cannot_be_opened_runs_as_it_is(lstm: nn.LSTM) -> None:
    x: Any = torch.randn(5, 2, 3)
    if not lstm.proj_size:
        x = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3]))
    opening = Opening()
    with opening:
        found = lstm(x)[1][0]
    assert torch.equal(found, lstm(x)[1][0])
    assert not opening.weights


@pytest.mark.parametrize("across", [False, True])
def test_attention_is_opened_without_changing_a_bit(across: bool) -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 5, 8)
    memory = torch.randn(2, 7, 8) if across else x
    expected, weights = attention(x, memory, memory)
    opening = Opening()
    with opening:
        found, found_weights = attention(x, memory, memory)
    assert torch.equal(found, expected)
    assert torch.equal(found_weights, weights)
    sources = {id(weight if weight._base is None else weight._base) for weight in opening.weights}
    assert sources == {id(attention.in_proj_weight), id(attention.out_proj.weight)}


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [
        ("bnd,hkd->bnhk", [(2, 3, 4), (5, 6, 4)]),
        ("byhwc,hkc->byhwk", [(2, 3, 4, 5, 6), (4, 7, 6)]),
        ("...ij,...jk->...ik", [(2, 3, 4, 5), (2, 3, 5, 6)]),
        ("ij,jk", [(3, 4), (4, 5)]),
    ],
)
def test_macs_of_einsum_equal_those_of_torchs_counter(
    equation: str, shapes: list[tuple[int, ...]]
) -> None:
    factors = [torch.randn(shape) for shape in shapes]
    with FlopCounterMode(display=False) as counter:
        result = torch.einsum(equation, *factors)
    args = (equation, *factors)
    assert product_operands(torch.einsum, args, {}) == factors
    assert product_macs(torch.einsum, args, factors, result) == counter.get_total_flops() / 2


def test_operands_of_products_are_found_however_they_are_passed() -> None:
    bias, left, right = torch.randn(4), torch.randn(2, 3), torch.randn(3, 4)
    assert product_operands(torch.addmm, (bias, left, right), {}) == [left, right]
    assert product_operands(torch.addmm, (), {"input": bias, "mat1": left, "mat2": right}) == [
        left,
        right,
    ]
    assert product_operands(torch.matmul, (left,), {"other": right}) == [left, right]
    assert product_operands(torch.einsum, ("ij,jk->ik", (left, right)), {}) == [left, right]


def test_only_what_hides_operators_has_a_body() -> None:
    assert body_of(F.linear, (torch.zeros(1),)) is None
    assert body_of(F.multi_head_attention_forward, ()) is not None

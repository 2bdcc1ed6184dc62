"""Bodies of functions that hide their operators: each computes what torch's function does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from anyprec.nn.bodies import body_of
from anyprec.nn.operators import OPERATORS, operands


class Opening(TorchFunctionMode):
    """Runs bodies in place of what hides them; keeps weights of operators, sizes of products."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []
        self.products: list[tuple[int, ...]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        body = body_of(func, args, kwargs)
        if body is not None:
            with self:
                return body(*args, **(kwargs or {}))
        if func is torch.matmul:
            self.products.append((*args[0].shape, args[1].shape[-1]))
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


RECURRENT: list[Callable[..., nn.Module]] = [
    nn.GRU,
    nn.RNN,
    lambda *sizes, **settings: nn.RNN(*sizes, nonlinearity="relu", **settings),
]


@pytest.mark.parametrize("recurrent", RECURRENT)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("bias", "batch_first"), [(True, True), (False, False)])
def test_the_body_of_a_recurrent_layer_equals_torchs(
    recurrent: Callable[..., nn.Module],
    layers: int,
    bidirectional: bool,
    bias: bool,
    batch_first: bool,
) -> None:
    layer = recurrent(
        3, 4, num_layers=layers, bias=bias, batch_first=batch_first, bidirectional=bidirectional
    ).double()
    start = torch.randn(layers * (1 + bidirectional), 2 if batch_first else 5, 4).double()
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    for arguments in ((x,), (x, start), (x[0],)):
        opening = Opening()
        with opening:
            computed = layer(*arguments)
        # Sums in another order than the fused kernel's: a few units in the last place of float64.
        torch.testing.assert_close(computed, layer(*arguments), rtol=1e-12, atol=1e-14)
        matrices = {id(parameter) for parameter in layer.parameters() if parameter.ndim == 2}
        assert {id(weight) for weight in opening.weights} == matrices


CELLS: list[Callable[..., nn.Module]] = [
    nn.LSTMCell,
    nn.GRUCell,
    nn.RNNCell,
    lambda *sizes, **settings: nn.RNNCell(*sizes, nonlinearity="relu", **settings),
]


@pytest.mark.parametrize("create", CELLS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(3,), (2, 3)])
def test_the_body_of_a_cell_equals_torchs(
    create: Callable[..., nn.Module], bias: bool, shape: tuple[int, ...]
) -> None:
    cell = create(3, 4, bias=bias).double()
    first, second = torch.randn(2, *shape, dtype=torch.float64)
    opening = Opening()
    with opening:
        computed = cell(second, cell(first))
    torch.testing.assert_close(computed, cell(second, cell(first)), rtol=1e-12, atol=1e-14)
    assert {id(weight) for weight in opening.weights} == {id(cell.weight_ih), id(cell.weight_hh)}


def test_a_packed_sequence_of_a_gru_runs_as_it_is() -> None:
    gru = nn.GRU(3, 4)
    x: Any = nn.utils.rnn.pack_padded_sequence(torch.randn(5, 2, 3), torch.tensor([5, 3]))
    opening = Opening()
    with opening:
        computed = gru(x)[1]
    assert torch.equal(computed, gru(x)[1])
    assert not opening.weights


@pytest.mark.parametrize("bias", [False, True])
def test_the_body_of_a_bilinear_form_equals_torchs(bias: bool) -> None:
    form = nn.Bilinear(3, 4, 5, bias=bias).double()
    left, right = torch.randn(2, 6, 3).double(), torch.randn(2, 6, 4).double()
    opening = Opening()
    with opening:
        computed = form(left, right)
    torch.testing.assert_close(computed, form(left, right), rtol=1e-12, atol=1e-14)
    assert [weight._base for weight in opening.weights] == [form.weight]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("run", [torch.convolution, torch.ops.aten.convolution.default])
def test_the_body_of_a_convolution_equals_torchs(
    run: Callable[..., Tensor], axes: int, transposed: bool
) -> None:
    x, weight = torch.randn(2, 4, *[5] * axes), torch.randn(4, 2, *[3] * axes)
    bias = torch.randn(4)
    extra = [1] * axes if transposed else [0] * axes
    settings = ([2] * axes, [1] * axes, [1] * axes, transposed, extra, 2)
    opening = Opening()
    with opening:
        computed = run(x, weight, bias, *settings)
    assert torch.equal(computed, run(x, weight, bias, *settings))
    assert opening.weights == [weight]


@pytest.mark.filterwarnings("ignore:torch.chain_matmul is deprecated")
def test_a_chain_of_products_starts_where_the_input_stands() -> None:
    x = torch.randn(2, 3, dtype=torch.float64)
    narrow = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
    wide = nn.Parameter(torch.randn(4, 5, dtype=torch.float64))
    for run in (lambda *factors: torch.linalg.multi_dot(factors), torch.chain_matmul):
        opening = Opening()
        with opening:
            computed = run(x, narrow, wide)
            mirrored = run(wide.t(), narrow.t(), x.t())
        torch.testing.assert_close(computed, x @ narrow @ wide, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(mirrored, computed.t(), rtol=1e-12, atol=1e-14)
        # Rows of the left factor: always those of the input, and never a weight times a weight.
        assert opening.products == [(2, 3, 4), (2, 4, 5), (4, 3, 2), (5, 4, 2)]


def test_a_call_with_a_place_for_its_result_has_no_body() -> None:
    assert body_of(torch.linalg.multi_dot, ([],), {"out": torch.zeros(1)}) is None


def test_only_what_hides_operators_has_a_body() -> None:
    assert body_of(F.linear, (torch.zeros(1),)) is None
    assert body_of(F.multi_head_attention_forward, ()) is not None

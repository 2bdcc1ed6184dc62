"""The tables of products and operators: factors, costs, and axes of output channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from anyprec.nn.operators import OPERATORS, operands
from anyprec.nn.products import product_axis, product_macs, product_operands


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


# A product of batch 2 or 6, of 3 or 4 in and 5 out, with its MACs by hand.
MACS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], int]] = {
    "inner": (torch.inner, (torch.ones(2, 3), torch.ones(5, 3)), 2 * 3 * 5),
    "tensordot, axes": (
        torch.tensordot,
        (torch.ones(2, 3, 4), torch.ones(5, 4, 3), ([1, 2], [2, 1])),
        2 * 3 * 4 * 5,
    ),
    "tensordot, number": (torch.tensordot, (torch.ones(2, 3), torch.ones(3, 5), 1), 2 * 3 * 5),
    "addmv": (torch.addmv, (torch.ones(5), torch.ones(5, 3), torch.ones(3)), 5 * 3),
    "addbmm": (
        torch.addbmm,
        (torch.ones(2, 5), torch.ones(6, 2, 3), torch.ones(6, 3, 5)),
        6 * 2 * 3 * 5,
    ),
    "dot": (torch.dot, (torch.ones(3), torch.ones(3)), 3),
    "in place": (
        Tensor.addmm_,
        (torch.ones(2, 5), torch.ones(2, 3), torch.ones(3, 5)),
        2 * 3 * 5,
    ),
    "torch.ops": (torch.ops.aten.mm.default, (torch.ones(2, 3), torch.ones(3, 5)), 2 * 3 * 5),
    "einsum of numbers": (
        torch.einsum,
        (torch.ones(2, 3), [0, 1], torch.ones(5, 3), [2, 1], [0, 2]),
        2 * 3 * 5,
    ),
}


@pytest.mark.parametrize("name", MACS)
def test_macs_of_products_are_those_by_hand(name: str) -> None:
    product, args, macs = MACS[name]
    factors = product_operands(product, args, {})
    assert len(factors) == 2
    assert product_macs(product, args, factors, product(*args)) == macs


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="of a later torch")
def test_macs_of_a_grouped_product_are_those_of_its_tokens() -> None:
    tokens, experts = torch.randn(16, 32), torch.randn(4, 32, 8)
    ends = torch.tensor([4, 4, 12, 16], dtype=torch.int32)
    factors = product_operands(F.grouped_mm, (tokens, experts, ends), {})
    result = F.grouped_mm(tokens, experts, offs=ends)
    assert product_macs(F.grouped_mm, (), factors, result) == 16 * 32 * 8


def test_macs_of_a_convolution_over_time_are_those_by_hand() -> None:
    x, weight, bias = torch.randn(7, 2, 4), torch.randn(3, 4, 5), torch.zeros(5)
    operator = OPERATORS[torch.conv_tbc]
    output = torch.conv_tbc(x, weight, bias, 1)
    assert operator.macs(x, weight, output) == 7 * 2 * 5 * 3 * 4
    assert weight.shape[operator.channel_axis] == 5


def test_operators_of_torch_ops_have_their_operands_under_other_names() -> None:
    x, weight = torch.randn(7, 2, 4), torch.randn(3, 4, 5)
    assert operands((), {"self": x, "weight": weight})[0] is x
    assert torch.ops.aten.conv_tbc.default in OPERATORS


@pytest.mark.parametrize(
    ("product", "args", "index", "expected"),
    [
        (torch.matmul, (), 1, 1),
        (torch.matmul, (), 0, 0),
        (torch.inner, (), 1, 0),
        (torch.tensordot, (1,), 1, 1),
        (torch.tensordot, (1,), 0, 0),
        (torch.tensordot, (([2], [1]),), 1, 0),
        (torch.tensordot, (([2], [-2]),), 1, 1),
        (torch.tensordot, (2,), 1, None),
        (torch.einsum, (), 1, None),
    ],
)
def test_the_axis_of_output_channels_is_the_one_that_is_not_summed_over(
    product: Callable[..., Any], args: tuple[Any, ...], index: int, expected: int | None
) -> None:
    weight = torch.randn(3, 4)
    for factor, found in (
        (weight, expected),
        (weight.t(), None if expected is None else 1 - expected),
    ):
        axis = product_axis(
            product, (None, None, *args), {}, parameter=weight, factor=factor, index=index
        )
        assert axis == found


def test_experts_have_a_step_size_for_each_output_channel() -> None:
    experts = torch.randn(4, 6, 8)
    grouped = torch.ops.aten._grouped_mm.default
    for factor, expected in ((experts, 2), (experts.transpose(1, 2), 1)):
        axis = product_axis(grouped, (), {}, parameter=experts, factor=factor, index=1)
        assert axis == expected

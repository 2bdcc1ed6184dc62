"""Budgets: what may be written for one, what it means, and what it costs to miss it."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyprec.bits import BitConfig, Bits, LayerCandidates, uniform
from anyprec.errors import BitsError, BudgetError
from anyprec.searching.algorithms.constraints import make_space
from anyprec.searching.algorithms.problem import Problem
from anyprec.searching.budget import Budget, parse_budget
from anyprec.searching.budget.budgets import utilisation

WIDTHS = (2, 3, 4, 6)


class FakeCosts:
    """Three layers; the first is fixed at 8 bits, as in the paper."""

    def __init__(self, scale: int = 1, own: tuple[str, ...] = ()) -> None:
        self.scale = scale
        self.macs = {"stem": 100_000_000, "conv": 300_000_000, "fc": 7_000_001}
        self.weights = {"stem": 1_001, "conv": 500_000, "fc": 123_457}
        fixed, free = LayerCandidates((8,), (8,)), LayerCandidates(WIDTHS, WIDTHS)
        self.candidates = {"stem": fixed, "conv": free, "fc": free}
        self.names = ("bitops", "size", "average_bits", "average_activation_bits", *own)

    def of_layer(self, name: str, path: str, bits: Bits) -> float:
        if name == "bitops":
            return self.scale * self.macs[path] * bits.weight * bits.activation
        if name == "average_activation_bits":
            return self.macs[path] * bits.activation
        if name == "average_bits":
            return self.weights[path] * bits.weight
        return self.scale * self.weights[path] * bits.weight

    def divisor(self, name: str) -> int:
        divisors = {
            "average_bits": sum(self.weights.values()),
            "average_activation_bits": sum(self.macs.values()),
        }
        return divisors.get(name, 1)

    def total(self, name: str, config: BitConfig) -> float:
        return sum(self.of_layer(name, path, bits) for path, bits in config.items()) / self.divisor(
            name
        )


NAMES = ("bitops", "size", "average_bits", "average_activation_bits")


def require_reachable(budget: Budget, costs: FakeCosts) -> None:
    Problem(make_space(costs.candidates), budget, costs)


@pytest.fixture
def costs() -> FakeCosts:
    return FakeCosts()


def uniform_bitops(width: int) -> int:
    """Written out by hand: the stem keeps its 8 bits."""
    return 100_000_000 * 64 + 307_000_001 * width**2


# Budget


def test_a_budget_needs_a_limit():
    with pytest.raises(
        BudgetError,
        match=r"limits nothing: give at least one of bitops, size \(in bits\), average_bits, ",
    ):
        Budget()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, True, "5 MiB"])
def test_a_limit_is_positive_and_finite(name, value):
    with pytest.raises(
        BudgetError,
        match=re.escape(f"{name}={value!r} is not a limit: use a positive finite number"),
    ):
        Budget(**{name: value})


def test_limits_have_names_only():
    with pytest.raises(TypeError, match="positional"):
        Budget(20e9)


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        (Budget(bitops=20e9), "20 GBitOPs"),
        (Budget(bitops=34_713_000_000), "34.71 GBitOPs"),
        (Budget(bitops=1.5e12), "1.5 TBitOPs"),
        (Budget(bitops=2e6), "2 MBitOPs"),
        (Budget(bitops=16_000), "16 KBitOPs"),
        (Budget(bitops=999), "999 BitOPs"),
        (Budget(size=5 * 8 * 2**20), "5 MiB"),
        (Budget(size=900 * 8 * 1024), "900 KiB"),
        (Budget(size=800), "100 B"),
        (Budget(size=3 * 8 * 2**30), "3 GiB"),
        (Budget(average_bits=4.5), "4.5 bits"),
        (Budget(average_activation_bits=4.5), "4.5 activation bits"),
        (Budget(latency=2.5e-3), "2.5 ms"),
        (Budget(latency=2.0), "2 s"),
        (Budget(latency=30e-6), "30 us"),
        (Budget(latency=12e-9), "12 ns"),
        (Budget(own={"energy": 3.25}), "3.25 energy"),
        (Budget(bitops=20e9, own={"energy": 3, "heat": 4}), "20 GBitOPs and 3 energy and 4 heat"),
        (
            Budget(bitops=20e9, size=5 * 8 * 2**20, average_bits=4),
            "20 GBitOPs and 5 MiB and 4 bits",
        ),
    ],
)
def test_a_budget_reads_in_the_units_of_people(budget, text):
    assert str(budget) == text


# parse_budget


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("20 GBitOPs", Budget(bitops=20e9)),
        ("20G BitOPs", Budget(bitops=20e9)),
        ("20gbitops", Budget(bitops=20e9)),
        ("  20 G  BITOPS ", Budget(bitops=20e9)),
        ("1.5 TBitOPs", Budget(bitops=1.5e12)),
        ("14.37 GBitOPs", Budget(bitops=14_370_000_000)),
        ("250 MBitOPs", Budget(bitops=250e6)),
        (".5 KBitOPs", Budget(bitops=500)),
        ("2e9 BitOPs", Budget(bitops=2e9)),
        ("5 MiB", Budget(size=5 * 8 * 2**20)),
        ("5mib", Budget(size=5 * 8 * 2**20)),
        ("5 MB", Budget(size=5 * 8 * 10**6)),
        ("900 KiB", Budget(size=900 * 8 * 2**10)),
        ("900 kB", Budget(size=900 * 8 * 10**3)),
        ("0.5 GiB", Budget(size=8 * 2**29)),
        ("2 TiB", Budget(size=8 * 2**41)),
        ("7 B", Budget(size=56)),
        ("4.5 bits", Budget(average_bits=4.5)),
        ("1 bit", Budget(average_bits=1)),
        ("4.5 weight bits", Budget(average_bits=4.5)),
        ("4.5 activation bits", Budget(average_activation_bits=4.5)),
        ("1 Activation  Bit", Budget(average_activation_bits=1)),
        ("W4A4 and 5 MiB", Budget(bitops=uniform_bitops(4), size=5 * 8 * 2**20)),
        ("5 MiB  AND 50% of w4a4", Budget(bitops=uniform_bitops(4) / 2, size=5 * 8 * 2**20)),
        (
            "20 GBitOPs and 5 MiB and 4 bits and 3 activation bits",
            Budget(bitops=20e9, size=5 * 8 * 2**20, average_bits=4, average_activation_bits=3),
        ),
        ("W4A4", Budget(bitops=uniform_bitops(4))),
        (" w4a4 ", Budget(bitops=uniform_bitops(4))),
        ("W2A6", Budget(bitops=100_000_000 * 64 + 307_000_001 * 12)),
        ("50% of W4A4", Budget(bitops=uniform_bitops(4) / 2)),
        ("50 % OF w4a4", Budget(bitops=uniform_bitops(4) / 2)),
        ("0.5 x W4A4", Budget(bitops=uniform_bitops(4) / 2)),
        ("0.5*W4A4", Budget(bitops=uniform_bitops(4) / 2)),
        ("150% of W4A4", Budget(bitops=uniform_bitops(4) * 1.5)),
        ("50%", Budget(bitops=uniform_bitops(6) / 2)),
        ("100%", Budget(bitops=uniform_bitops(6))),
        (0.5, Budget(bitops=uniform_bitops(6) / 2)),
        (1.0, Budget(bitops=uniform_bitops(6))),
        (1, Budget(bitops=uniform_bitops(6))),
    ],
)
def test_every_accepted_form_is_read(text, budget, costs):
    assert parse_budget(text, costs) == budget


def test_a_budget_is_returned_as_it_is(costs):
    budget = Budget(size=1)
    assert parse_budget(budget, costs) is budget


@pytest.mark.parametrize(
    "text",
    ["20 GBitOPs", "5 MiB", "900 KiB", "4.5 bits", "4.5 activation bits", "20 GBitOPs and 5 MiB"],
)
def test_a_budget_is_written_as_it_is_read(text, costs):
    assert str(parse_budget(text, costs)) == text


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("2.5 ms", Budget(latency=0.0025)),
        ("2.5ms", Budget(latency=0.0025)),
        ("0.5 S", Budget(latency=0.5)),
        ("30 us", Budget(latency=30e-6)),
        ("7 ns", Budget(latency=7e-9)),
        ("3 energy", Budget(own={"energy": 3})),
        ("1e-3 energy and 2 ms", Budget(latency=0.002, own={"energy": 0.001})),
        ("W4A4 and 3 energy", Budget(bitops=uniform_bitops(4), own={"energy": 3})),
    ],
)
def test_costs_that_are_given_can_be_limited_by_name(text, budget):
    costs = FakeCosts(own=("latency", "energy"))
    assert parse_budget(text, costs) == budget
    assert str(parse_budget(str(budget), costs)) == str(budget)


@pytest.mark.parametrize("value", ["2.5 ms", "1 s", Budget(latency=0.0025)])
def test_a_latency_without_a_table_is_refused_with_how_to_give_one(value, costs):
    expected = r"nothing is known of the cost 'latency': give search costs=\{'latency': \.\.\.\}"
    expected += r".* known are bitops, size"
    with pytest.raises(BudgetError, match=expected):
        parse_budget(value, costs)


def test_a_cost_of_unknown_name_is_refused(costs):
    with pytest.raises(BudgetError, match="cannot read '3 energy' as a budget: write"):
        parse_budget("3 energy", costs)
    with pytest.raises(BudgetError, match="nothing is known of the cost 'energy'"):
        parse_budget(Budget(own={"energy": 3}), costs)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("5 MiB and 4 MiB", "size"),
        ("W4A4 and 20 GBitOPs", "bitops"),
        ("50% and 0.5 x W6A6", "bitops"),
        ("4 bits and 3 weight bits", "average bits"),
    ],
)
def test_a_cost_is_limited_once(text, what, costs):
    with pytest.raises(
        BudgetError,
        match=re.escape(f"cannot read {text!r} as a budget: ") + f".*limits {what} twice",
    ):
        parse_budget(text, costs)


@pytest.mark.parametrize(
    "text", ["W4A4 and", "and 5 MiB", "W4A4 and much", "W4A4 and 0 MiB", "W4A4, 5 MiB"]
)
def test_every_part_of_several_must_be_readable(text, costs):
    with pytest.raises(BudgetError, match=re.escape(f"cannot read {text!r} as a budget: ")):
        parse_budget(text, costs)


def test_own_limits_do_not_shadow_fields():
    with pytest.raises(
        BudgetError, match=r"own=\{'size': \.\.\.\} has the name of a field: write Budget\(size="
    ):
        Budget(own={"size": 3})
    with pytest.raises(BudgetError, match="energy=0 is not a limit"):
        Budget(own={"energy": 0})


def test_limits_by_name_make_the_budget_again():
    budget = Budget(bitops=20e9, latency=0.1, own={"energy": 3})
    assert budget.limits == {"bitops": 20e9, "latency": 0.1, "energy": 3}
    assert Budget.of(budget.limits) == budget


@pytest.mark.parametrize(
    "value",
    [
        "",
        "much",
        "20",
        "GBitOPs",
        "-5 MiB",
        "5 iB",
        "5 MiBs",
        "4..5 bits",
        "W4A",
        "x W4A4",
        "60% W8A8",
        None,
        [1],
    ],
)
def test_anything_else_is_refused_with_the_accepted_forms(value, costs):
    expected = rf"cannot read {re.escape(repr(value))} as a budget: write '20 GBitOPs'"
    expected += ".*'5 MiB'.*'W4A4'.*or a Budget"
    with pytest.raises(BudgetError, match=expected):
        parse_budget(value, costs)


@pytest.mark.parametrize("value", [0, 0.0, -0.5, 1.5, 20, math.nan, math.inf])
def test_a_number_is_a_share_between_0_and_1(value, costs):
    expected = rf"cannot read {value!r} as a budget: a number is a share of BitOPs, in \(0, 1\]; "
    expected += "with a unit, write '20 G"
    with pytest.raises(BudgetError, match=expected):
        parse_budget(value, costs)


def test_true_is_no_share(costs):
    with pytest.raises(BudgetError, match="cannot read True as a budget: write '20 GBitOPs'"):
        parse_budget(True, costs)


def test_a_share_of_the_highest_candidates_is_at_most_all_of_it(costs):
    with pytest.raises(
        BudgetError,
        match="'101%' as a budget: a share of the BitOPs at the highest candidates is at most",
    ):
        parse_budget("101%", costs)


@pytest.mark.parametrize(
    "text",
    [
        "0 MiB",
        "0 GBitOPs",
        "0 bits",
        "0% of W4A4",
        "0%",
        "1e999 GBitOPs",
        "1e99999999999999999999 B",
    ],
)
def test_a_limit_of_nothing_or_without_end_is_refused(text, costs):
    with pytest.raises(
        BudgetError, match=rf"cannot read '{text}' as a budget: \w+=(0.0|inf|nan) is not a limit"
    ):
        parse_budget(text, costs)


def test_weight_bits_alone_are_refused_with_what_to_write(costs):
    with pytest.raises(
        BudgetError,
        match=r"'W4' as a budget: it names weight bits only; write 'W4A4' .* or '4 bits'",
    ):
        parse_budget("W4", costs)


@pytest.mark.parametrize(
    ("text", "remedy"), [("5 Mb", "write 'MB' for bytes or MiB"), ("5 b", "write 'B' for bytes")]
)
def test_megabits_are_not_taken_for_megabytes(text, remedy, costs):
    with pytest.raises(
        BudgetError, match=f"cannot read '{text}' as a budget: .* may mean bits; {remedy}"
    ):
        parse_budget(text, costs)


@pytest.mark.parametrize("text", ["W9A9", "60% of W9A9", "0.6 x W9A9"])
def test_an_unsupported_precision_is_refused_with_its_reason(text, costs):
    with pytest.raises(
        BudgetError, match=f"cannot read '{text}' as a budget: weight bit-width 9 is not supp"
    ) as caught:
        parse_budget(text, costs)
    assert isinstance(caught.value.__cause__, BitsError)


def test_a_precision_that_the_network_does_not_offer_is_refused(costs):
    expected = "'W5A5' as a budget: weight bit-width 5 is not a candidate of the network: "
    expected += r"choose from \(2, 3, 4, 6, 8\)"
    with pytest.raises(BudgetError, match=expected):
        parse_budget("W5A5", costs)


# utilisation


def test_utilisation_is_that_of_the_tightest_limit(costs):
    config = uniform(4, costs.candidates)
    bitops, size = costs.total("bitops", config), costs.total("size", config)
    budget = Budget(bitops=bitops * 4, size=size * 2, average_bits=8)
    assert utilisation(config, budget, costs) == max(
        0.25, 0.5, costs.total("average_bits", config) / 8
    )
    assert utilisation(config, Budget(bitops=bitops * 4), costs) == 0.25


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", NAMES)
def test_a_configuration_fits_its_own_cost_and_not_a_hair_less(width, name, costs):
    config = uniform(width, costs.candidates)
    cost = costs.total(name, config)
    assert utilisation(config, Budget(**{name: cost}), costs) == 1
    assert utilisation(config, Budget(**{name: math.nextafter(cost, 0)}), costs) > 1


@pytest.mark.parametrize("width", WIDTHS)
def test_a_uniform_configuration_fits_the_budget_of_its_name(width, costs):
    budget = parse_budget(f"W{width}A{width}", costs)
    assert utilisation(uniform(width, costs.candidates), budget, costs) == 1


# Budgets that nothing fits


@pytest.mark.parametrize("name", NAMES)
def test_the_lowest_cost_is_reachable_and_a_hair_less_is_not(name, costs):
    lowest = costs.total(name, uniform(2, costs.candidates))
    require_reachable(Budget(**{name: lowest}), costs)
    with pytest.raises(BudgetError, match="no configuration fits the budget"):
        require_reachable(Budget(**{name: math.nextafter(lowest, 0)}), costs)


def test_an_impossible_budget_is_refused_with_what_is_achievable(costs):
    expected = (
        "no configuration fits the budget 1 KBitOPs and 5 MiB and 1 bits: achievable are "
        "7.629 GBitOPs to 17.45 GBitOPs and 153.2 KiB to 457.6 KiB and 2.01 bits to 6.003 bits "
        "(each by itself), every layer at its cheapest to every layer at its highest option; "
        "raise the budget, or offer lower candidate bit-widths"
    )
    with pytest.raises(BudgetError, match=re.escape(expected)):
        require_reachable(Budget(bitops=1000, size=5 * 8 * 2**20, average_bits=1), costs)


@given(scale=st.integers(1, 10**6), name=st.sampled_from(NAMES))
def test_the_lowest_figure_of_the_refusal_is_itself_reachable(scale, name):
    costs = FakeCosts(scale)
    with pytest.raises(BudgetError) as caught:
        require_reachable(Budget(**{name: 1e-3}), costs)
    named = re.search(r"achievable are (.*?) to ", str(caught.value))[1]
    require_reachable(parse_budget(named, costs), costs)

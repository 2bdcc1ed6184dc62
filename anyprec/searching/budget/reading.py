"""Reading a budget as a user writes it: "20 GBitOPs", "5 MiB", "60% of W8A8", several with "and".

A form is a pattern and a reader, in `_READERS`. Shares and precisions become BitOPs by way of the
costs of a network, so a budget that was read has absolute limits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from decimal import Decimal

from anyprec.bits import Bits, highest_config, uniform
from anyprec.errors import BitsError, BudgetError
from anyprec.model.cost import CostModel
from anyprec.searching.budget.budgets import (
    BINARY_PREFIXES,
    BITS_PER_BYTE,
    DECIMAL_PREFIXES,
    EXACT,
    SECONDS,
    Budget,
)

ACCEPTED_FORMS = (
    "'20 GBitOPs' (K, M, G or T), '5 MiB' or '5 MB' (size of the quantized weights), "
    "'4.5 bits' (average weight bits), '4.5 activation bits', "
    "'W4A4' (BitOPs of that uniform configuration), '60% of W8A8', '0.6 x W8A8', "
    "'60%' or a float in (0, 1] (of the BitOPs at the highest candidates), "
    "'2.5 ms' (needs a latency table), '3 NAME' for a cost NAME of your own, "
    "several of these with 'and', or a Budget"
)

BudgetLike = Budget | str | float
"""What a user may write for a budget; see `parse_budget`."""

_NUMBER = r"(?P<number>(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)"
_PRECISION = r"(?P<precision>w\d+a\d+)"
_BITOPS = re.compile(rf"{_NUMBER}\s*(?P<prefix>[kmgt]?)\s*bitops", re.IGNORECASE)
_SIZE = re.compile(
    rf"{_NUMBER}\s*(?P<prefix>[kmgt]?)(?P<binary>(?<=[kmgt])i)?(?P<unit>b)", re.IGNORECASE
)
_AVERAGE_BITS = re.compile(rf"{_NUMBER}\s*(?:weight\s+)?bits?", re.IGNORECASE)
_AVERAGE_ACTIVATION_BITS = re.compile(rf"{_NUMBER}\s*activation\s+bits?", re.IGNORECASE)
_LATENCY = re.compile(rf"{_NUMBER}\s*(?P<prefix>m|u|n)?s", re.IGNORECASE)
_USER_COST = re.compile(rf"{_NUMBER}\s*(?P<name>[A-Za-z_]\w*)")
_AND = re.compile(r"\s+and\s+", re.IGNORECASE)
_UNIFORM = re.compile(_PRECISION, re.IGNORECASE)
_WEIGHT_ONLY = re.compile(r"w(?P<bits>\d+)", re.IGNORECASE)
_PERCENTAGE = re.compile(rf"{_NUMBER}\s*%(?:\s*of\s+{_PRECISION})?", re.IGNORECASE)
_MULTIPLE = re.compile(rf"{_NUMBER}\s*[x*]\s*{_PRECISION}", re.IGNORECASE)


def parse_budget(value: BudgetLike, costs: CostModel) -> Budget:
    """Read a budget as a user writes it.

    Case and spaces do not matter, except that a size in powers of 1000 needs its capital B
    (`5 MB`), since `5 Mb` may mean megabits.

    Args:
        value: One of

            - `"20 GBitOPs"`: BitOPs of one sample, with K, M, G, T (powers of 1000) or none;
            - `"5 MiB"`, `"900 KiB"` (powers of 1024), `"5 MB"` (of 1000): size of the quantized
              weights' codes;
            - `"4.5 bits"`, `"4.5 activation bits"`: average weight bits, or activation bits;
            - `"2.5 ms"` (s, ms, us, ns): latency, if `costs` has it;
            - `"3 energy"`: a limit of a cost that `costs` has by this name;
            - `"W4A4"`: BitOPs of that uniform configuration (see `anyprec.bits.uniform`);
            - `"60% of W8A8"`, `"0.6 x W8A8"`: a share of such BitOPs;
            - `"60%"`, or a number in (0, 1]: a share of the BitOPs with every layer at its highest
              candidates;
            - several of these, as in `"W4A4 and 5 MiB"`; each cost at most once;
            - a `Budget`, which is returned as it is.
        costs: Costs of the network that the budget is for.

    Returns:
        The budget, with absolute limits.

    Raises:
        BudgetError: `value` is none of these forms, is not positive, or names a precision that the
            network does not offer (chained from the `BitsError`).

    Example:
        >>> from anyprec.bits import LayerCandidates
        >>> from anyprec.model.cost import LayerCost
        >>> layers = {"fc": LayerCost("fc", macs=1000, weights=100)}
        >>> costs = CostModel(layers, {"fc": LayerCandidates((2, 4, 8), (2, 4, 8))})
        >>> parse_budget("W4A4", costs).bitops
        16000.0
        >>> str(parse_budget(0.5, costs))
        '32 KBitOPs'
    """
    if isinstance(value, Budget):
        _require_known(value, costs)
        return value
    try:
        if isinstance(value, str):
            return _read_text(value.strip(), costs)
        return _read_number(value, costs)
    except (BitsError, BudgetError) as error:
        msg = f"cannot read {value!r} as a budget: {error}"
        raise BudgetError(msg) from error


def parse_budgets(
    value: BudgetLike | Sequence[BudgetLike] | None, costs: CostModel
) -> tuple[Budget, ...]:
    """Read one budget, or several; None is none at all.

    Raises:
        BudgetError: as `parse_budget`, or `value` is an empty list.
    """
    if value is None:
        return ()
    if isinstance(value, (str, Budget)) or not isinstance(value, Sequence):
        return (parse_budget(value, costs),)
    if not value:
        msg = f"budget={value!r} names no budget: pass at least one, or None for the whole range"
        raise BudgetError(msg)
    return tuple(parse_budget(entry, costs) for entry in value)


def _read_text(text: str, costs: CostModel) -> Budget:
    limits: dict[str, float] = {}
    for part in _AND.split(text):
        for name, limit in _read_part(part.strip(), costs).limits.items():
            if name in limits:
                msg = f"it limits {name.replace('_', ' ')} twice"
                raise BudgetError(msg)
            limits[name] = limit
    return Budget.of(limits)


def _read_part(text: str, costs: CostModel) -> Budget:
    for pattern, reader in _READERS:
        match = pattern.fullmatch(text)
        budget = None if match is None else reader(match, costs)
        if budget is not None:
            return budget
    msg = f"write {ACCEPTED_FORMS}"
    raise BudgetError(msg)


def _read_number(value: object, costs: CostModel) -> Budget:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        msg = f"write {ACCEPTED_FORMS}"
        raise BudgetError(msg)
    if not 0 < value <= 1:
        msg = f"a number is a share of BitOPs, in (0, 1]; with a unit, write {ACCEPTED_FORMS}"
        raise BudgetError(msg)
    return Budget(bitops=value * costs.total("bitops", highest_config(costs.candidates)))


def _read_bitops(match: re.Match[str], _costs: CostModel) -> Budget:
    return Budget(bitops=_scaled(match, DECIMAL_PREFIXES[match["prefix"].lower()]))


def _read_size(match: re.Match[str], _costs: CostModel) -> Budget:
    return Budget(size=_scaled(match, _bytes_per_unit(match) * BITS_PER_BYTE))


def _read_average_bits(match: re.Match[str], _costs: CostModel) -> Budget:
    return Budget(average_bits=_scaled(match, 1))


def _read_average_activation_bits(match: re.Match[str], _costs: CostModel) -> Budget:
    return Budget(average_activation_bits=_scaled(match, 1))


def _read_uniform(match: re.Match[str], costs: CostModel) -> Budget:
    return Budget(bitops=float(_bitops_of(match, costs)))


def _read_percentage(match: re.Match[str], costs: CostModel) -> Budget:
    return _share(EXACT.divide(_number(match), Decimal(100)), match, costs)


def _read_multiple(match: re.Match[str], costs: CostModel) -> Budget:
    return _share(_number(match), match, costs)


def _read_user_cost(match: re.Match[str], costs: CostModel) -> Budget | None:
    if match["name"] not in costs.names:
        return None
    return Budget.of({match["name"]: _scaled(match, 1)})


def _read_latency(match: re.Match[str], costs: CostModel) -> Budget:
    budget = Budget(latency=_scaled(match, SECONDS[(match["prefix"] or "").lower()]))
    _require_known(budget, costs)
    return budget


def _refuse_weight_only(match: re.Match[str], _costs: CostModel) -> Budget:
    bits = match["bits"]
    msg = f"it names weight bits only; write 'W{bits}A{bits}' for BitOPs, "
    msg += f"or '{bits} bits' for average weight bits"
    raise BudgetError(msg)


_READERS: tuple[tuple[re.Pattern[str], Callable[[re.Match[str], CostModel], Budget | None]], ...]
_READERS = (
    (_BITOPS, _read_bitops),
    (_SIZE, _read_size),
    (_AVERAGE_BITS, _read_average_bits),
    (_AVERAGE_ACTIVATION_BITS, _read_average_activation_bits),
    (_UNIFORM, _read_uniform),
    (_PERCENTAGE, _read_percentage),
    (_MULTIPLE, _read_multiple),
    (_USER_COST, _read_user_cost),
    (_LATENCY, _read_latency),
    (_WEIGHT_ONLY, _refuse_weight_only),
)
"""What each form means, the first that matches; None where it means nothing for this network."""


def _share(share: Decimal, match: re.Match[str], costs: CostModel) -> Budget:
    if match["precision"] is None and share > 1:
        msg = "a share of the BitOPs at the highest candidates is at most 100%"
        raise BudgetError(msg)
    return Budget(bitops=float(EXACT.multiply(share, Decimal(_bitops_of(match, costs)))))


def _bitops_of(match: re.Match[str], costs: CostModel) -> float:
    """BitOPs of the uniform precision in `match`, or of the highest candidates if it names none."""
    config = highest_config(costs.candidates)
    if match["precision"]:
        config = uniform(Bits.parse(match["precision"]), costs.candidates)
    return costs.total("bitops", config)


def _require_known(budget: Budget, costs: CostModel) -> None:
    for name in budget.limits:
        if name not in costs.names:
            msg = f"nothing is known of the cost {name!r}: give search costs={{{name!r}: ...}}, "
            msg += f"a table or function of layer and bits; known are {', '.join(costs.names)}"
            raise BudgetError(msg)


def _bytes_per_unit(match: re.Match[str]) -> int:
    prefix = match["prefix"].lower()
    if match["binary"]:
        return BINARY_PREFIXES[prefix]
    if match["unit"] == "b":
        unit = match["prefix"].upper()
        remedy = f"write '{unit}B' for bytes"
        if unit:
            remedy += f" or {unit}iB"
        msg = f"'{match['prefix']}b' may mean bits; {remedy}"
        raise BudgetError(msg)
    return DECIMAL_PREFIXES[prefix]


def _number(match: re.Match[str]) -> Decimal:
    return EXACT.create_decimal(match["number"])


def _scaled(match: re.Match[str], scale: int | Decimal) -> float:
    return float(EXACT.multiply(_number(match), Decimal(scale)))

"""Budgets: what a configuration may cost, in BitOPs, in bytes or in average weight bits.

`Budget` is the value, `parse_budget` reads what a user writes, `utilisation` says how much of a budget a
configuration uses, `require_reachable` refuses a budget that nothing fits. What a configuration costs comes
from outside, through the protocol `Costs`; counting MACs is not done here.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_HALF_EVEN, Context, Decimal
from typing import Protocol

from anyprec.bits import BitConfig, Bits, Candidates, uniform
from anyprec.errors import BitsError, BudgetError

ACCEPTED_FORMS = (
    "'20 GBitOPs' (K, M, G or T), '5 MiB' or '5 MB' (size of the quantized weights), "
    "'4.5 bits' (average weight bits), 'W4A4' (BitOPs of that uniform configuration), '60% of W8A8', '0.6 x W8A8', "
    "'60%' or a float in (0, 1] (of the BitOPs at the highest candidates), or a Budget"
)

_BITS_PER_BYTE = 8
_SHOWN_DIGITS = 4
_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
# Decimal arithmetic, so that '14.37 GBitOPs' is exactly 14370000000; overflow gives infinity, which is refused.
_EXACT = Context(prec=40, traps=[])

_NUMBER = r"(?P<number>(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)"
_PRECISION = r"(?P<precision>w\d+a\d+)"
_BITOPS = re.compile(rf"{_NUMBER}\s*(?P<prefix>[kmgt]?)\s*bitops", re.IGNORECASE)
_SIZE = re.compile(rf"{_NUMBER}\s*(?P<prefix>[kmgt]?)(?P<binary>(?<=[kmgt])i)?(?P<unit>b)", re.IGNORECASE)
_AVERAGE_BITS = re.compile(rf"{_NUMBER}\s*bits?", re.IGNORECASE)
_UNIFORM = re.compile(_PRECISION, re.IGNORECASE)
_WEIGHT_ONLY = re.compile(r"w(?P<bits>\d+)", re.IGNORECASE)
_PERCENTAGE = re.compile(rf"{_NUMBER}\s*%(?:\s*of\s+{_PRECISION})?", re.IGNORECASE)
_MULTIPLE = re.compile(rf"{_NUMBER}\s*[x*]\s*{_PRECISION}", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a configuration may cost at most. Several limits at once must all hold.

    Attributes:
        bitops: BitOPs of one sample (MACs x weight bits x activation bits, summed over the layers).
        size: Bits of the codes of all quantized weights.
        average_bits: Weight bits averaged over all quantized weights.

    Raises:
        BudgetError: no limit is given, or one is not a positive finite number.

    Example:
        >>> str(Budget(bitops=20e9, size=5 * 8 * 2**20))
        '20 GBitOPs and 5 MiB'
    """

    bitops: float | None = None
    size: float | None = None
    average_bits: float | None = None

    def __post_init__(self) -> None:
        """Check the limits."""
        if not self.limits:
            msg = "Budget() limits nothing: give at least one of bitops, size (in bits) and average_bits"
            raise BudgetError(msg)
        for name, limit in self.limits.items():
            _check_limit(name, limit)

    def __str__(self) -> str:
        """Each limit in the unit that people read."""
        return " and ".join(_show(name, limit) for name, limit in self.limits.items())

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are set, by name."""
        every = {"bitops": self.bitops, "size": self.size, "average_bits": self.average_bits}
        return {name: limit for name, limit in every.items() if limit is not None}


BudgetLike = Budget | str | float
"""What a user may write for a budget; see `parse_budget`."""


class Costs(Protocol):
    """What configurations of one network cost. Structural: any object with these members will do.

    No cost may rise when a bit-width falls.
    """

    @property
    def candidates(self) -> Candidates:
        """Candidates of every quantized layer, by path."""
        ...

    def bitops(self, config: BitConfig) -> int:
        """BitOPs of one sample."""
        ...

    def size(self, config: BitConfig) -> int:
        """Bits of the codes of all quantized weights."""
        ...

    def average_bits(self, config: BitConfig) -> float:
        """Weight bits averaged over all quantized weights."""
        ...


def parse_budget(value: BudgetLike, costs: Costs) -> Budget:
    """Read a budget as a user writes it.

    Case and spaces do not matter, except that a size in powers of 1000 needs its capital B (`5 MB`), since `5 Mb`
    may mean megabits. Shares and precisions become BitOPs by way of `costs`.

    Args:
        value: One of

            - `"20 GBitOPs"`: BitOPs of one sample, with K, M, G, T (powers of 1000) or none;
            - `"5 MiB"`, `"900 KiB"` (powers of 1024), `"5 MB"` (of 1000): size of the quantized weights' codes;
            - `"4.5 bits"`: average weight bits;
            - `"W4A4"`: BitOPs of that uniform configuration (see `anyprec.bits.uniform`);
            - `"60% of W8A8"`, `"0.6 x W8A8"`: a share of such BitOPs;
            - `"60%"`, or a number in (0, 1]: a share of the BitOPs with every layer at its highest candidates;
            - a `Budget`, which is returned as it is.
        costs: Costs of the network that the budget is for.

    Returns:
        The budget, with absolute limits.

    Raises:
        BudgetError: `value` is none of these forms, is not positive, or names a precision that the network does
            not offer (chained from the `BitsError`).

    Example:
        >>> from types import SimpleNamespace
        >>> from anyprec.bits import LayerCandidates
        >>> costs = SimpleNamespace(
        ...     candidates={"fc": LayerCandidates(weight=(2, 4, 8), activation=(2, 4, 8))},
        ...     bitops=lambda config: 1000 * config["fc"].weight * config["fc"].activation,
        ... )
        >>> parse_budget("W4A4", costs)
        Budget(bitops=16000.0, size=None, average_bits=None)
        >>> str(parse_budget(0.5, costs))
        '32 KBitOPs'
    """
    if isinstance(value, Budget):
        return value
    try:
        return _read_text(value.strip(), costs) if isinstance(value, str) else _read_number(value, costs)
    except (BitsError, BudgetError) as error:
        msg = f"cannot read {value!r} as a budget: {error}"
        raise BudgetError(msg) from error


def utilisation(config: BitConfig, budget: Budget, costs: Costs) -> float:
    """The share of a budget that a configuration uses: it fits if and only if this is at most 1.

    Args:
        config: Bits of every layer.
        budget: The limits.
        costs: Costs of the network.

    Returns:
        The largest cost / limit over the limits that are set.

    Example:
        >>> from types import SimpleNamespace
        >>> costs = SimpleNamespace(bitops=lambda config: 1000 * config["fc"].weight * config["fc"].activation)
        >>> utilisation(BitConfig({"fc": (4, 4)}), Budget(bitops=32000), costs)
        0.5
    """
    return max(_cost(name, config, costs) / limit for name, limit in budget.limits.items())


def require_reachable(budget: Budget, costs: Costs) -> None:
    """Refuse a budget that not even the lowest bit-widths fit.

    Args:
        budget: The limits.
        costs: Costs of the network.

    Raises:
        BudgetError: with every layer at its lowest candidates, a limit is exceeded. The message names what is
            achievable for each limit that is set.

    Example:
        >>> from types import SimpleNamespace
        >>> from anyprec.bits import LayerCandidates
        >>> costs = SimpleNamespace(
        ...     candidates={"fc": LayerCandidates(weight=(2, 4, 8), activation=(8,))},
        ...     size=lambda config: 4096 * config["fc"].weight,
        ... )
        >>> require_reachable(Budget(size=8192), costs)
        >>> require_reachable(parse_budget("0.5 KiB", costs), costs)
        Traceback (most recent call last):
        ...
        anyprec.errors.BudgetError: no configuration fits the budget 512 B: achievable are 1 KiB to 4 KiB ...
    """
    if utilisation(_lowest(costs), budget, costs) <= 1:
        return
    ranges = " and ".join(_range(name, costs) for name in budget.limits)
    msg = (
        f"no configuration fits the budget {budget}: achievable are {ranges} (every layer at its lowest to every "
        "layer at its highest candidates); raise the budget, or offer lower candidate bit-widths"
    )
    raise BudgetError(msg)


def _read_text(text: str, costs: Costs) -> Budget:
    if match := _BITOPS.fullmatch(text):
        return Budget(bitops=_scaled(match, _DECIMAL[match["prefix"].lower()]))
    if match := _SIZE.fullmatch(text):
        return Budget(size=_scaled(match, _bytes_per_unit(match) * _BITS_PER_BYTE))
    if match := _AVERAGE_BITS.fullmatch(text):
        return Budget(average_bits=_scaled(match, 1))
    if match := _UNIFORM.fullmatch(text):
        return Budget(bitops=float(_bitops_of(match, costs)))
    if match := _PERCENTAGE.fullmatch(text):
        return _share(_EXACT.divide(_number(match), Decimal(100)), match, costs)
    if match := _MULTIPLE.fullmatch(text):
        return _share(_number(match), match, costs)
    if match := _WEIGHT_ONLY.fullmatch(text):
        bits = match["bits"]
        msg = f"it names weight bits only; write 'W{bits}A{bits}' for BitOPs, or '{bits} bits' for average weight bits"
        raise BudgetError(msg)
    msg = f"write {ACCEPTED_FORMS}"
    raise BudgetError(msg)


def _read_number(value: object, costs: Costs) -> Budget:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        msg = f"write {ACCEPTED_FORMS}"
        raise BudgetError(msg)
    if not 0 < value <= 1:
        msg = f"a number is a share of BitOPs, in (0, 1]; with a unit, write {ACCEPTED_FORMS}"
        raise BudgetError(msg)
    return Budget(bitops=value * costs.bitops(_highest(costs)))


def _share(share: Decimal, match: re.Match[str], costs: Costs) -> Budget:
    if match["precision"] is None and share > 1:
        msg = "a share of the BitOPs at the highest candidates is at most 100%"
        raise BudgetError(msg)
    return Budget(bitops=float(_EXACT.multiply(share, Decimal(_bitops_of(match, costs)))))


def _bitops_of(match: re.Match[str], costs: Costs) -> int:
    """BitOPs of the uniform precision in `match`, or of the highest candidates where it names none."""
    precision = match["precision"]
    config = uniform(Bits.parse(precision), costs.candidates) if precision else _highest(costs)
    return costs.bitops(config)


def _bytes_per_unit(match: re.Match[str]) -> int:
    prefix = match["prefix"].lower()
    if match["binary"]:
        return _BINARY[prefix]
    if match["unit"] == "b":
        unit = match["prefix"].upper()
        msg = f"'{match['prefix']}b' may mean bits; write '{unit}B' for bytes{f' or {unit}iB' if unit else ''}"
        raise BudgetError(msg)
    return _DECIMAL[prefix]


def _number(match: re.Match[str]) -> Decimal:
    return _EXACT.create_decimal(match["number"])


def _scaled(match: re.Match[str], scale: int) -> float:
    return float(_EXACT.multiply(_number(match), Decimal(scale)))


def _check_limit(name: str, limit: object) -> None:
    if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not 0 < limit < math.inf:
        msg = f"{name}={limit!r} is not a limit: use a positive finite number"
        raise BudgetError(msg)


def _cost(name: str, config: BitConfig, costs: Costs) -> float:
    if name == "bitops":
        return costs.bitops(config)
    return costs.size(config) if name == "size" else costs.average_bits(config)


def _range(name: str, costs: Costs) -> str:
    """What is achievable; the lower end is rounded up, so that it is itself a budget that can be reached."""
    lower = _show(name, _cost(name, _lowest(costs), costs), rounding=ROUND_CEILING)
    return f"{lower} to {_show(name, _cost(name, _highest(costs), costs))}"


def _lowest(costs: Costs) -> BitConfig:
    return BitConfig({path: layer.lowest for path, layer in costs.candidates.items()})


def _highest(costs: Costs) -> BitConfig:
    return BitConfig({path: layer.highest for path, layer in costs.candidates.items()})


def _show(name: str, value: float, *, rounding: str = ROUND_HALF_EVEN) -> str:
    """A cost in the unit that people read, e.g. '34.71 GBitOPs'; `rounding` of the `decimal` module."""
    if name == "average_bits":
        return f"{_digits(Decimal(str(value)), rounding)} bits"
    if name == "bitops":
        prefix, number = _prefixed(value, _DECIMAL)
        return f"{_digits(number, rounding)} {prefix.upper()}BitOPs"
    prefix, number = _prefixed(value / _BITS_PER_BYTE, _BINARY)
    return f"{_digits(number, rounding)} {prefix.upper()}{'i' if prefix else ''}B"


def _prefixed(value: float, scales: dict[str, int]) -> tuple[str, Decimal]:
    """The largest prefix that leaves a number of at least 1, and that number."""
    prefix = next((prefix for prefix in reversed(scales) if value >= scales[prefix]), "")
    return prefix, _EXACT.divide(Decimal(str(value)), Decimal(scales[prefix]))


def _digits(number: Decimal, rounding: str) -> str:
    return f"{float(Context(prec=_SHOWN_DIGITS, rounding=rounding).plus(number)):.{_SHOWN_DIGITS}g}"

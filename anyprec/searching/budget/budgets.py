"""Budgets: what a configuration may cost, in BitOPs, bytes, average bits, seconds or any unit of the user's own.

`Budget` is the value, `parse_budget` reads what a user writes, `utilisation` says how much of a budget a
configuration uses, `unreachable` is the error for a budget that nothing fits. What a configuration costs comes
from outside, through the protocol `Costs`; counting MACs is not done here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import ROUND_CEILING, ROUND_HALF_EVEN, Context, Decimal
from typing import Protocol

from anyprec.bits import BitConfig, Bits, Candidates, highest_config, uniform
from anyprec.errors import BitsError, BudgetError

ACCEPTED_FORMS = (
    "'20 GBitOPs' (K, M, G or T), '5 MiB' or '5 MB' (size of the quantized weights), "
    "'4.5 bits' (average weight bits), '4.5 activation bits', 'W4A4' (BitOPs of that uniform configuration), "
    "'60% of W8A8', '0.6 x W8A8', '60%' or a float in (0, 1] (of the BitOPs at the highest candidates), '2.5 ms' (needs a "
    "latency table), '3 NAME' for a cost NAME of your own, several of these with 'and', or a Budget"
)

_BITS_PER_BYTE = 8
_SHOWN_DIGITS = 4
_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
_FIELDS = ("bitops", "size", "average_bits", "average_activation_bits", "latency")
_PLAIN_UNITS = {"average_bits": "bits", "average_activation_bits": "activation bits"}
# Decimal arithmetic, so that '14.37 GBitOPs' is exactly 14370000000; overflow gives infinity, which is refused.
_EXACT = Context(prec=40, traps=[])

_NUMBER = r"(?P<number>(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)"
_PRECISION = r"(?P<precision>w\d+a\d+)"
_BITOPS = re.compile(rf"{_NUMBER}\s*(?P<prefix>[kmgt]?)\s*bitops", re.IGNORECASE)
_SIZE = re.compile(
    rf"{_NUMBER}\s*(?P<prefix>[kmgt]?)(?P<binary>(?<=[kmgt])i)?(?P<unit>b)", re.IGNORECASE
)
_AVERAGE_BITS = re.compile(rf"{_NUMBER}\s*(?:weight\s+)?bits?", re.IGNORECASE)
_AVERAGE_ACTIVATION_BITS = re.compile(rf"{_NUMBER}\s*activation\s+bits?", re.IGNORECASE)
_LATENCY = re.compile(rf"{_NUMBER}\s*(?P<prefix>m|u|n)?s", re.IGNORECASE)
_OWN = re.compile(rf"{_NUMBER}\s*(?P<name>[A-Za-z_]\w*)")
_AND = re.compile(r"\s+and\s+", re.IGNORECASE)
_SECONDS = {"": Decimal(1), "m": Decimal("1e-3"), "u": Decimal("1e-6"), "n": Decimal("1e-9")}
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
        average_activation_bits: Activation bits averaged over all MACs.
        latency: Seconds, by the table that `search` is given as `costs={"latency": ...}`.
        own: Limits of other costs that `search` is given, by name.

    Raises:
        BudgetError: no limit is given, or one is not a positive finite number.

    Example:
        >>> str(Budget(bitops=20e9, size=5 * 8 * 2**20))
        '20 GBitOPs and 5 MiB'
    """

    bitops: float | None = None
    size: float | None = None
    average_bits: float | None = None
    average_activation_bits: float | None = None
    latency: float | None = None
    own: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the limits."""
        if not self.limits:
            msg = "Budget() limits nothing: give at least one of bitops, size (in bits), average_bits, "
            msg += "average_activation_bits, latency (in seconds) and own"
            raise BudgetError(msg)
        if taken := sorted(set(self.own) & set(_FIELDS)):
            msg = f"own={{{taken[0]!r}: ...}} has the name of a field: write Budget({taken[0]}=...)"
            raise BudgetError(msg)
        for name, limit in self.limits.items():
            _check_limit(name, limit)

    def __str__(self) -> str:
        """Each limit in the unit that people read."""
        return " and ".join(_show(name, limit) for name, limit in self.limits.items())

    @classmethod
    def of(cls, limits: Mapping[str, float]) -> Budget:
        """The budget with these limits by name.

        Raises:
            BudgetError: as the constructor.
        """
        own = {name: limit for name, limit in limits.items() if name not in _FIELDS}
        return cls(**{name: limit for name, limit in limits.items() if name in _FIELDS}, own=own)

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are set, by name."""
        every = {name: getattr(self, name) for name in _FIELDS}
        return {name: limit for name, limit in every.items() if limit is not None} | dict(self.own)


BudgetLike = Budget | str | float
"""What a user may write for a budget; see `parse_budget`."""


class Costs(Protocol):
    """What configurations of one network cost: sums over layers. Structural: any object with these members will do."""

    @property
    def names(self) -> tuple[str, ...]:
        """The costs that are known."""
        ...

    @property
    def candidates(self) -> Candidates:
        """Candidates of every quantized layer, by path."""
        ...

    def total(self, name: str, config: BitConfig) -> float:
        """The cost `name` of a configuration: the sum over its layers, divided by `divisor`."""
        ...

    def of_layer(self, name: str, path: str, bits: Bits) -> float:
        """What one layer adds to the sum; infinite if the layer cannot have `bits`."""
        ...

    def divisor(self, name: str) -> float:
        """What the sum is divided by: an average is one over all weights, for example."""
        ...


def parse_budget(value: BudgetLike, costs: Costs) -> Budget:
    """Read a budget as a user writes it.

    Case and spaces do not matter, except that a size in powers of 1000 needs its capital B (`5 MB`), since `5 Mb`
    may mean megabits. Shares and precisions become BitOPs by way of `costs`.

    Args:
        value: One of

            - `"20 GBitOPs"`: BitOPs of one sample, with K, M, G, T (powers of 1000) or none;
            - `"5 MiB"`, `"900 KiB"` (powers of 1024), `"5 MB"` (of 1000): size of the quantized weights' codes;
            - `"4.5 bits"`, `"4.5 activation bits"`: average weight bits, or activation bits;
            - `"2.5 ms"` (s, ms, us, ns): latency, if `costs` has it;
            - `"3 energy"`: a limit of a cost that `costs` has by this name;
            - `"W4A4"`: BitOPs of that uniform configuration (see `anyprec.bits.uniform`);
            - `"60% of W8A8"`, `"0.6 x W8A8"`: a share of such BitOPs;
            - `"60%"`, or a number in (0, 1]: a share of the BitOPs with every layer at its highest candidates;
            - several of these, as in `"W4A4 and 5 MiB"`; each cost at most once;
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
        ...     names=("bitops",),
        ...     total=lambda name, config: 1000 * config["fc"].weight * config["fc"].activation,
        ... )
        >>> parse_budget("W4A4", costs).bitops
        16000.0
        >>> str(parse_budget(0.5, costs))
        '32 KBitOPs'
    """
    if isinstance(value, Budget):
        _require_known(value, costs)
        return value
    try:
        return (
            _read_text(value.strip(), costs)
            if isinstance(value, str)
            else _read_number(value, costs)
        )
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
        >>> costs = SimpleNamespace(total=lambda name, config: 1000 * config["fc"].weight * config["fc"].activation)
        >>> utilisation(BitConfig({"fc": (4, 4)}), Budget(bitops=32000), costs)
        0.5
    """
    return max(costs.total(name, config) / limit for name, limit in budget.limits.items())


def unreachable(budget: Budget, ranges: Mapping[str, tuple[float, float]]) -> BudgetError:
    """The error for a budget that nothing fits.

    Args:
        budget: The limits.
        ranges: The lowest and the highest total of each cost that is limited.

    Example:
        >>> str(unreachable(Budget(size=4096), {"size": (8192, 32768)}))[:80]
        'no configuration fits the budget 512 B: achievable are 1 KiB to 4 KiB, every lay'
    """
    # The lower end is rounded up, so that it is itself a budget that can be reached.
    shown = [
        f"{_show(name, low, rounding=ROUND_CEILING)} to {_show(name, high)}"
        for name, (low, high) in ranges.items()
    ]
    each = " (each by itself)" if len(shown) > 1 else ""
    msg = (
        f"no configuration fits the budget {budget}: achievable are {' and '.join(shown)}{each}, every layer at its cheapest "
        "to every layer at its highest option; raise the budget, or offer lower candidate bit-widths"
    )
    return BudgetError(msg)


def _read_text(text: str, costs: Costs) -> Budget:
    parts = [_read_part(part.strip(), costs) for part in _AND.split(text)]
    limits: dict[str, float] = {}
    for name, limit in (entry for part in parts for entry in part.limits.items()):
        if name in limits:
            msg = f"it limits {name.replace('_', ' ')} twice"
            raise BudgetError(msg)
        limits[name] = limit
    return Budget.of(limits)


def _read_part(text: str, costs: Costs) -> Budget:
    for pattern, reader in _READERS:
        if (match := pattern.fullmatch(text)) and (budget := reader(match, costs)) is not None:
            return budget
    msg = f"write {ACCEPTED_FORMS}"
    raise BudgetError(msg)


def _read_own(match: re.Match[str], costs: Costs) -> Budget | None:
    return Budget.of({match["name"]: _scaled(match, 1)}) if match["name"] in costs.names else None


def _read_latency(match: re.Match[str], costs: Costs) -> Budget:
    budget = Budget(latency=_scaled(match, _SECONDS[(match["prefix"] or "").lower()]))
    _require_known(budget, costs)
    return budget


def _refuse_weight_only(match: re.Match[str], _costs: Costs) -> Budget:
    bits = match["bits"]
    msg = f"it names weight bits only; write 'W{bits}A{bits}' for BitOPs, or '{bits} bits' for average weight bits"
    raise BudgetError(msg)


_READERS: tuple[tuple[re.Pattern[str], Callable[[re.Match[str], Costs], Budget | None]], ...] = (
    (_BITOPS, lambda match, _: Budget(bitops=_scaled(match, _DECIMAL[match["prefix"].lower()]))),
    (_SIZE, lambda match, _: Budget(size=_scaled(match, _bytes_per_unit(match) * _BITS_PER_BYTE))),
    (_AVERAGE_BITS, lambda match, _: Budget(average_bits=_scaled(match, 1))),
    (_AVERAGE_ACTIVATION_BITS, lambda match, _: Budget(average_activation_bits=_scaled(match, 1))),
    (_UNIFORM, lambda match, costs: Budget(bitops=float(_bitops_of(match, costs)))),
    (
        _PERCENTAGE,
        lambda match, costs: _share(_EXACT.divide(_number(match), Decimal(100)), match, costs),
    ),
    (_MULTIPLE, lambda match, costs: _share(_number(match), match, costs)),
    (_OWN, _read_own),
    (_LATENCY, _read_latency),
    (_WEIGHT_ONLY, _refuse_weight_only),
)
"""What each form means; None where it means nothing for this network."""


def _read_number(value: object, costs: Costs) -> Budget:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        msg = f"write {ACCEPTED_FORMS}"
        raise BudgetError(msg)
    if not 0 < value <= 1:
        msg = f"a number is a share of BitOPs, in (0, 1]; with a unit, write {ACCEPTED_FORMS}"
        raise BudgetError(msg)
    return Budget(bitops=value * costs.total("bitops", highest_config(costs.candidates)))


def _share(share: Decimal, match: re.Match[str], costs: Costs) -> Budget:
    if match["precision"] is None and share > 1:
        msg = "a share of the BitOPs at the highest candidates is at most 100%"
        raise BudgetError(msg)
    return Budget(bitops=float(_EXACT.multiply(share, Decimal(_bitops_of(match, costs)))))


def _require_known(budget: Budget, costs: Costs) -> None:
    for name in budget.limits:
        if name not in costs.names:
            msg = f"nothing is known of the cost {name!r}: give search costs={{{name!r}: ...}}, a table or function of "
            msg += f"layer and bits; known are {', '.join(costs.names)}"
            raise BudgetError(msg)


def _bitops_of(match: re.Match[str], costs: Costs) -> float:
    """BitOPs of the uniform precision in `match`, or of the highest candidates where it names none."""
    precision = match["precision"]
    config = (
        uniform(Bits.parse(precision), costs.candidates)
        if precision
        else highest_config(costs.candidates)
    )
    return costs.total("bitops", config)


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


def _scaled(match: re.Match[str], scale: int | Decimal) -> float:
    return float(_EXACT.multiply(_number(match), Decimal(scale)))


def _check_limit(name: str, limit: object) -> None:
    if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not 0 < limit < math.inf:
        msg = f"{name}={limit!r} is not a limit: use a positive finite number"
        raise BudgetError(msg)


def _show(name: str, value: float, *, rounding: str = ROUND_HALF_EVEN) -> str:
    """A cost in the unit that people read, e.g. '34.71 GBitOPs'; `rounding` of the `decimal` module."""
    if name in _PLAIN_UNITS:
        return f"{_digits(Decimal(str(value)), rounding)} {_PLAIN_UNITS[name]}"
    if name == "latency":
        unit = next((unit for unit in ("", "m", "u") if value >= float(_SECONDS[unit])), "n")
        return f"{_digits(Decimal(str(value)) / _SECONDS[unit], rounding)} {unit}s"
    if name not in _FIELDS:
        return f"{_digits(Decimal(str(value)), rounding)} {name}"
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

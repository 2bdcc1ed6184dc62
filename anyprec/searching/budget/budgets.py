"""Budgets: what a configuration may cost, in BitOPs, bytes, average bits, seconds or any own unit.

`Budget` is the value, `utilisation` says how much of a budget a configuration uses, `unreachable`
is the error for a budget that nothing fits. What a user writes for a budget is read in
`reading.py`; what a configuration costs is counted in `anyprec.model.cost`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import ROUND_CEILING, ROUND_HALF_EVEN, Context, Decimal

from anyprec.bits import BitConfig
from anyprec.errors import BudgetError
from anyprec.model.cost import CostModel

BITS_PER_BYTE = 8
DECIMAL_PREFIXES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
BINARY_PREFIXES = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
SECONDS = {"": Decimal(1), "m": Decimal("1e-3"), "u": Decimal("1e-6"), "n": Decimal("1e-9")}

# So that '14.37 GBitOPs' is exactly 14370000000; overflow gives infinity, which is refused.
EXACT = Context(prec=40, traps=[])

_SHOWN_DIGITS = 4
_FIELDS = ("bitops", "size", "average_bits", "average_activation_bits", "latency")
_PLAIN_UNITS = {"average_bits": "bits", "average_activation_bits": "activation bits"}


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
            msg = "Budget() limits nothing: give at least one of bitops, size (in bits), "
            msg += "average_bits, average_activation_bits, latency (in seconds) and own"
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
        fields: dict[str, float] = {}
        user_limits: dict[str, float] = {}
        for name, limit in limits.items():
            group = fields if name in _FIELDS else user_limits
            group[name] = limit
        return cls(**fields, own=user_limits)

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are set, by name."""
        limits = {}
        for name in _FIELDS:
            limit = getattr(self, name)
            if limit is not None:
                limits[name] = limit
        return limits | dict(self.own)


def utilisation(config: BitConfig, budget: Budget, costs: CostModel) -> float:
    """The share of a budget that a configuration uses: it fits if and only if this is at most 1.

    Args:
        config: Bits of every layer.
        budget: The limits.
        costs: Costs of the network.

    Returns:
        The largest cost / limit over the limits that are set.

    Example:
        >>> from anyprec.bits import LayerCandidates
        >>> from anyprec.model.cost import LayerCost
        >>> layers = {"fc": LayerCost("fc", macs=1000, weights=100)}
        >>> costs = CostModel(layers, {"fc": LayerCandidates((2, 4, 8), (2, 4, 8))})
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
    shown = []
    for name, (low, high) in ranges.items():
        shown.append(f"{_show(name, low, rounding=ROUND_CEILING)} to {_show(name, high)}")
    each = " (each by itself)" if len(shown) > 1 else ""
    msg = f"no configuration fits the budget {budget}: achievable are {' and '.join(shown)}{each}, "
    msg += "every layer at its cheapest to every layer at its highest option; raise the budget, "
    msg += "or offer lower candidate bit-widths"
    return BudgetError(msg)


def _check_limit(name: str, limit: object) -> None:
    if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not 0 < limit < math.inf:
        msg = f"{name}={limit!r} is not a limit: use a positive finite number"
        raise BudgetError(msg)


def _show(name: str, value: float, *, rounding: str = ROUND_HALF_EVEN) -> str:
    """A cost in the unit that people read, e.g. '34.71 GBitOPs'; `rounding` as in `decimal`."""
    if name in _PLAIN_UNITS:
        return f"{_digits(Decimal(str(value)), rounding)} {_PLAIN_UNITS[name]}"
    if name == "latency":
        unit = next((unit for unit in ("", "m", "u") if value >= float(SECONDS[unit])), "n")
        return f"{_digits(Decimal(str(value)) / SECONDS[unit], rounding)} {unit}s"
    if name not in _FIELDS:
        return f"{_digits(Decimal(str(value)), rounding)} {name}"
    if name == "bitops":
        prefix, number = _prefixed(value, DECIMAL_PREFIXES)
        return f"{_digits(number, rounding)} {prefix.upper()}BitOPs"
    prefix, number = _prefixed(value / BITS_PER_BYTE, BINARY_PREFIXES)
    return f"{_digits(number, rounding)} {prefix.upper()}{'i' if prefix else ''}B"


def _prefixed(value: float, scales: dict[str, int]) -> tuple[str, Decimal]:
    """The largest prefix that leaves a number of at least 1, and that number."""
    prefix = next((prefix for prefix in reversed(scales) if value >= scales[prefix]), "")
    return prefix, EXACT.divide(Decimal(str(value)), Decimal(scales[prefix]))


def _digits(number: Decimal, rounding: str) -> str:
    rounded = Context(prec=_SHOWN_DIGITS, rounding=rounding).plus(number)
    return f"{float(rounded):.{_SHOWN_DIGITS}g}"

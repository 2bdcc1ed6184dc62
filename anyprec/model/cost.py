"""What a configuration costs: MACs, BitOPs, size and costs of the user's own, without torch.

BitOPs are the sum over layers of MACs x weight bits x activation bits, for one sample. Size is
the sum of weights x weight bits; layers that share a weight store its codes once for each weight
bit-width that they have. Layers with fixed bits count with theirs. What is not counted is listed,
never dropped in silence. The costs of a converted network are read in `costing.py`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from anyprec.bits import BitConfig, Bits, BitsLike, LayerCandidates, shorten
from anyprec.errors import BitsError, BudgetError

FLOAT_BITS = 32

COST_NAMES = ("bitops", "size", "average_bits", "average_activation_bits")
"""What every configuration of every network costs."""

UserCost = Mapping[str, Mapping[BitsLike, float]] | Callable[[str, Bits], float]
"""A cost per layer and bits: a table `{path: {"W4A8": 0.0012, ...}}`, or a function of path and
`Bits`. Costs add up over layers. A precision that a table does not have cannot be chosen."""

CostTable = Mapping[str, Mapping[Bits, float]]
"""A cost of the user's as it is stored: layer path to bits to cost."""


@dataclass(frozen=True)
class LayerCost:
    """What one quantized layer costs.

    Attributes:
        path: Its path.
        macs: MACs for one sample.
        weights: Number of its weights.
        weights_of: Path of an earlier layer that has the same weight; None if it is its own.
        codes_of: Path of an earlier layer whose codes are the same at equal weight bits, or None.
    """

    path: str
    macs: int
    weights: int
    weights_of: str | None = None
    codes_of: str | None = None

    def bitops(self, bits: Bits) -> int:
        """MACs x weight bits x activation bits."""
        return self.macs * bits.weight * bits.activation

    def size(self, bits: Bits) -> int:
        """Bits of its weight codes."""
        return self.weights * bits.weight


@dataclass(frozen=True)
class Uncounted:
    """Something with a cost that BitOPs leave out.

    Attributes:
        name: Its path, or the name of the operator.
        calls: Calls per forward pass.
        macs: MACs per sample.
        reason: Why it is not counted.
    """

    name: str
    calls: int
    macs: int
    reason: str


@dataclass(frozen=True, repr=False)
class CostModel:
    """Costs of every configuration of one network, at one input size.

    Each cost is a sum over layers, divided by `divisor`: 1 for a total, the number of codes or
    MACs for an average. Only layers that share codes are no plain sum: `total` is exact for them,
    and `of_layer` gives each its part as if all of them had equal bits.

    Attributes:
        layers: MACs and weights of every quantized layer, by path.
        candidates: The bit-widths that each may take.
        uncounted: What the BitOPs leave out.
        float_parameters: Parameters that stay in floating point (norms, biases, layers that are not
            quantized).
        steps: Step sizes stored with the weights of one configuration.
        input_shape: Shape of one sample.
        user_costs: Costs of the user's own by name; see `with_costs`.
    """

    layers: Mapping[str, LayerCost]
    candidates: Mapping[str, LayerCandidates]
    uncounted: tuple[Uncounted, ...] = ()
    float_parameters: int = 0
    steps: int = 0
    input_shape: tuple[int, ...] = ()
    user_costs: Mapping[str, CostTable] = field(default_factory=dict)

    def __repr__(self) -> str:
        figures = f"{len(self.layers)} layers, {self.macs:,} MACs, {self.weights:,} weights"
        return f"CostModel({figures}; costs: {', '.join(self.names)})"

    def with_costs(self, costs: Mapping[str, UserCost] | None) -> CostModel:
        """These costs, and others of the user's own: seconds, energy, anything that adds up.

        Raises:
            BudgetError: A name is taken, a layer is missing or unknown, or a cost is negative or no
                number.

        Example:
            >>> import timm, anyprec
            >>> costs = anyprec.cost_model(anyprec.convert(timm.create_model("test_resnet")))
            >>> costs.with_costs({"energy": lambda path, bits: float(bits.weight)}).names[-1]
            'energy'
        """
        tables = {
            name: _read_cost(name, cost, self.candidates) for name, cost in (costs or {}).items()
        }
        return dataclasses.replace(self, user_costs={**self.user_costs, **tables})

    @property
    def macs(self) -> int:
        """MACs of all quantized layers, for one sample."""
        return sum(layer.macs for layer in self.layers.values())

    @property
    def weights(self) -> int:
        """Number of quantized weights; one that several layers share counts once."""
        return sum(layer.weights for layer in self.layers.values() if layer.weights_of is None)

    def bitops(self, config: BitConfig) -> int:
        """BitOPs of `config`, for one sample."""
        return sum(layer.bitops(config[path]) for path, layer in self.layers.items())

    def size(self, config: BitConfig) -> int:
        """Bits of the weight codes of `config`, each stored once."""
        return sum(layer.size(config[layer.path]) for layer in self._storing(config))

    @property
    def names(self) -> tuple[str, ...]:
        """The costs that are known: what a budget can limit."""
        return (*COST_NAMES, *self.user_costs)

    def total(self, name: str, config: BitConfig) -> float:
        """The cost `name` of `config`; infinite if a layer cannot have its bits."""
        if self._readers and name in ("size", "average_bits"):
            size = float(self.size(config))
            return size if name == "size" else size / self.stored_codes(config)
        costs = [self.of_layer(name, path, config[path]) for path in self.layers]
        # Exact for counts below 2^53, and for seconds independent of the order of layers.
        return math.fsum(costs) / self.divisor(name)

    def of_layer(self, name: str, path: str, bits: Bits) -> float:
        """What one layer adds to the sum of the cost `name`; infinite if it cannot have `bits`."""
        if name in self.user_costs:
            return self.user_costs[name][path].get(bits, math.inf)
        layer = self.layers[path]
        if name == "bitops":
            return layer.bitops(bits)
        if name == "average_activation_bits":
            return layer.macs * bits.activation
        if self._readers:
            return layer.size(bits) / self._readers.get(layer.codes_of or path, 1)
        return layer.size(bits)

    def divisor(self, name: str) -> int:
        """What the sum over layers is divided by."""
        if name == "average_bits":
            return sum(layer.weights for layer in self.layers.values() if not layer.codes_of) or 1
        if name == "average_activation_bits":
            return self.macs or 1
        return 1

    def stored_codes(self, config: BitConfig) -> int:
        """Number of weight codes of `config`: layers of equal bits may share theirs."""
        return sum(layer.weights for layer in self._storing(config))

    def _storing(self, config: BitConfig) -> list[LayerCost]:
        """The layers whose codes are stored: of those that share, one for each weight bit-width."""
        storing: dict[tuple[str, int], LayerCost] = {}
        for path, layer in self.layers.items():
            storing.setdefault((layer.codes_of or path, config[path].weight), layer)
        return list(storing.values())

    @cached_property
    def _readers(self) -> dict[str, int]:
        """Path of each layer whose codes others share, to the number of layers that read them."""
        shared = Counter(layer.codes_of for layer in self.layers.values() if layer.codes_of)
        return {path: 1 + count for path, count in shared.items()}

    def cost(self, config: BitConfig | None) -> Cost:
        """The figures of `config` together; None is the float network at 32 bits.

        Raises:
            BitsError: `config` does not name exactly the layers of this network.
        """
        if config is None:
            bitops, size = self.macs * FLOAT_BITS**2, self.weights * FLOAT_BITS
            return Cost(None, self, bitops, size)
        if different := sorted(set(config) ^ set(self.layers)):
            msg = "the configuration does not fit this network: "
            msg += f"{len(different)} layers differ, e.g. {different[0]!r}"
            raise BitsError(msg)
        return Cost(config, self, self.bitops(config), self.size(config))


@dataclass(frozen=True)
class Cost:
    """What one configuration costs.

    Attributes:
        config: The configuration; None is the float network.
        model: Where the figures come from: per-layer costs, and what is not counted.
        bitops: BitOPs for one sample.
        size: Bits of all weight codes.
    """

    config: BitConfig | None = field(repr=False)
    model: CostModel
    bitops: int
    size: int

    @property
    def average_bits(self) -> float:
        """Weight bits averaged over all weight codes."""
        if self.config is None:
            return float(FLOAT_BITS)
        return self.size / self.model.stored_codes(self.config)

    def __str__(self) -> str:
        text = f"{self.bitops / 1e9:.3f} GBitOPs, {self.size / 8 / 2**20:.3f} MiB of weight codes"
        uncounted = ", ".join(f"{entry.name} x{entry.calls}" for entry in self.model.uncounted)
        return f"{text} (not counted: {uncounted})" if uncounted else text


def _read_cost(name: str, cost: UserCost, candidates: Mapping[str, LayerCandidates]) -> CostTable:
    """The table of one cost of the user's, checked: what each layer costs at each of its bits."""
    if name in COST_NAMES:
        msg = f"costs={{{name!r}: ...}} would replace a cost that every network has: "
        msg += "choose another name"
        raise BudgetError(msg)
    if not callable(cost):
        _require_same_layers(name, cost, candidates)
    table = {}
    for path, layer in candidates.items():
        options = [Bits(*pair) for pair in itertools.product(layer.weight, layer.activation)]
        table[path] = _read_row(cost, path, options)
        for bits, value in table[path].items():
            _require_number(value, what=f"the cost {name!r} of layer {path!r} at {bits}")
    return table


def _read_row(cost: UserCost, path: str, options: Iterable[Bits]) -> dict[Bits, float]:
    if callable(cost):
        return {bits: cost(path, bits) for bits in options}
    row = {Bits.of(bits): value for bits, value in cost[path].items()}
    return {bits: row[bits] for bits in options if bits in row}


def _require_same_layers(
    name: str, cost: Mapping[str, object], candidates: Mapping[str, LayerCandidates]
) -> None:
    if missing := sorted(set(candidates) - set(cost)):
        msg = f"the cost table {name!r} lacks {shorten(missing)}"
        raise BudgetError(msg)
    if unknown := sorted(set(cost) - set(candidates)):
        msg = f"the cost table {name!r} has a layer that the network does not: {shorten(unknown)}"
        raise BudgetError(msg)


def _require_number(value: object, *, what: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        msg = f"{what} is {value!r}: use a number that is not negative"
        raise BudgetError(msg)

"""What a configuration costs: MACs, BitOPs and size, per layer and in total. Plain numbers, no torch.

BitOPs are the sum over layers of MACs x weight bits x activation bits, for one sample; size is the sum of weights x
weight bits. Layers with fixed bits count with their own. What is not counted is listed, never dropped in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from anyprec.bits import BitConfig, Bits, LayerCandidates
from anyprec.errors import BitsError
from anyprec.model.converted import ConvertedModel, Request, require_converted

FLOAT_BITS = 32

COST_NAMES = ("bitops", "size", "average_bits", "average_activation_bits")
"""What every configuration of every network costs."""


@dataclass(frozen=True)
class LayerCost:
    """MACs for one sample and number of weights of one quantized layer."""

    path: str
    macs: int
    weights: int

    def bitops(self, bits: Bits) -> int:
        """MACs x weight bits x activation bits."""
        return self.macs * bits.weight * bits.activation

    def size(self, bits: Bits) -> int:
        """Bits of all weight codes."""
        return self.weights * bits.weight


@dataclass(frozen=True)
class Uncounted:
    """Something with a cost that BitOPs leave out: its name, calls per forward pass, MACs per sample, and why."""

    name: str
    calls: int
    macs: int
    reason: str


@dataclass(frozen=True)
class CostModel:
    """Costs of every configuration of one network, at one input size.

    Attributes:
        layers: MACs and weights of every quantized layer, by path.
        candidates: The bit-widths that each may take.
        uncounted: What the BitOPs leave out.
        float_parameters: Parameters that stay in floating point (norms, biases, layers that are not quantized).
        steps: Step sizes stored with the weights of one configuration.
        input_shape: Shape of one sample.
    """

    layers: Mapping[str, LayerCost]
    candidates: Mapping[str, LayerCandidates]
    uncounted: tuple[Uncounted, ...]
    float_parameters: int
    steps: int
    input_shape: tuple[int, ...]

    @property
    def macs(self) -> int:
        """MACs of all quantized layers, for one sample."""
        return sum(layer.macs for layer in self.layers.values())

    @property
    def weights(self) -> int:
        """Number of quantized weights."""
        return sum(layer.weights for layer in self.layers.values())

    def bitops(self, config: BitConfig) -> int:
        """BitOPs of `config`, for one sample."""
        return sum(layer.bitops(config[path]) for path, layer in self.layers.items())

    def size(self, config: BitConfig) -> int:
        """Bits of the weight codes of `config`."""
        return sum(layer.size(config[path]) for path, layer in self.layers.items())

    def average_bits(self, config: BitConfig) -> float:
        """Weight bits of `config`, averaged over all quantized weights."""
        return self.size(config) / self.weights

    def average_activation_bits(self, config: BitConfig) -> float:
        """Activation bits of `config`, averaged over all MACs."""
        return self.total("average_activation_bits", config)

    @property
    def names(self) -> tuple[str, ...]:
        """What can be limited; each is a sum over layers, divided by `divisor`."""
        return COST_NAMES

    def total(self, name: str, config: BitConfig) -> float:
        """The cost `name` of `config`."""
        return sum(self.of_layer(name, path, config[path]) for path in self.layers) / self.divisor(
            name
        )

    def of_layer(self, name: str, path: str, bits: Bits) -> float:
        """What one layer at `bits` adds to the sum of the cost `name`."""
        layer = self.layers[path]
        if name == "bitops":
            return layer.bitops(bits)
        return (
            layer.macs * bits.activation if name == "average_activation_bits" else layer.size(bits)
        )

    def divisor(self, name: str) -> int:
        """What the sum over layers is divided by: 1 for a total, all weights or all MACs for an average."""
        return {"average_bits": self.weights, "average_activation_bits": self.macs}.get(
            name, 1
        ) or 1

    def cost(self, config: BitConfig | None) -> Cost:
        """The figures of `config` together; None is the float network at 32 bits.

        Raises:
            BitsError: `config` does not name exactly the layers of this network.
        """
        if config is None:
            bitops, size = self.macs * FLOAT_BITS**2, self.weights * FLOAT_BITS
            return Cost(None, self, bitops, size)
        if set(config) != set(self.layers):
            strange = sorted(set(config) ^ set(self.layers))
            msg = f"the configuration does not fit this network: {len(strange)} layers differ, e.g. {strange[0]!r}"
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

    config: BitConfig | None
    model: CostModel
    bitops: int
    size: int

    @property
    def average_bits(self) -> float:
        """Weight bits averaged over all quantized weights."""
        return self.size / self.model.weights

    def __str__(self) -> str:
        text = f"{self.bitops / 1e9:.3f} GBitOPs, {self.size / 8 / 2**20:.3f} MiB of weight codes"
        left = ", ".join(f"{entry.name} x{entry.calls}" for entry in self.model.uncounted)
        return f"{text} (not counted: {left})" if left else text


def cost_model(model: ConvertedModel) -> CostModel:
    """The costs of every configuration of a converted model, at the input size that it was converted with.

    Raises:
        ConversionError: `model` is not converted.
    """
    require_converted(model, purpose="cost_model")
    record = model.anyprec_record
    quantized = model.quantized_layers
    layers = {
        path: LayerCost(path, record.facts.layers[path].macs, record.facts.layers[path].weights)
        for path in quantized
    }
    own = ("weight_quantizer.", "input_quantizer.", "bank.")
    names = [name for name, _ in model.named_parameters() if not any(part in name for part in own)]
    total = sum(model.get_parameter(name).numel() for name in names)
    steps = sum(layer.weight_quantizer.step.shape[1] + 1 for layer in quantized.values())
    return CostModel(
        layers=layers,
        candidates=model.candidates,
        uncounted=_uncounted(model),
        float_parameters=total - sum(layer.weights for layer in layers.values()),
        steps=steps,
        input_shape=record.facts.example_shape[1:],
    )


def cost_of(model: ConvertedModel, bits: Request | BitConfig = "active") -> Cost:
    """What a configuration of a converted model costs.

    Args:
        model: A converted model.
        bits: Anything that `set_bits` takes; by default the active configuration.

    Raises:
        ConversionError: `model` is not converted.
        BitsError: `bits` does not fit the model.

    Example:
        >>> import timm, anyprec
        >>> model = anyprec.convert(timm.create_model("test_resnet"))
        >>> anyprec.cost_of(model, 4).bitops < anyprec.cost_of(model, 8).bitops
        True
    """
    require_converted(model, purpose="cost_of")
    config = model.bits if bits == "active" else model.resolve_bits(bits)
    return cost_model(model).cost(config)


def _uncounted(model: ConvertedModel) -> tuple[Uncounted, ...]:
    facts = model.anyprec_record.facts
    entries = [
        Uncounted(
            row.path,
            facts.layers[row.path].calls,
            facts.layers[row.path].macs,
            f"float layer: {row.reason}",
        )
        for row in model.coverage
        if row.status != "quantized"
    ]
    entries += [
        Uncounted(name, calls, macs, "no Conv or Linear layer: runs in floating point")
        for name, (calls, macs) in facts.uncounted.items()
    ]
    return tuple(entries)

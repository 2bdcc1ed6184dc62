"""What a converted network knows of itself: settings, facts, coverage, named configurations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from anyprec.bits import BitConfig, Bits
from anyprec.network.facts import NetworkFacts
from anyprec.nn.layers import QuantizedLayer
from anyprec.nn.norm_bank import Statistics
from anyprec.nn.norms import NormSharing


@dataclass(frozen=True)
class Coverage:
    """What became of one layer of the float network that multiplies its input by a weight.

    Attributes:
        path: Its path.
        kind: Its class in the float network; "Parameter" for a bare parameter of a module.
        status: "quantized"; "exempt" (by a rule or on request); "skipped" (it could not be quantized).
        reason: Why it is not quantized; empty if it is.
    """

    path: str
    kind: str
    status: str
    reason: str = ""


@dataclass(frozen=True)
class ConvertSettings:
    """The arguments of `convert`, as plain values that a checkpoint can keep."""

    bits: tuple[int, ...]
    activation_bits: tuple[int, ...]
    first_last_bits: int | None
    depthwise_min_bits: int
    per_channel: bool
    include: tuple[str, ...] | None
    exclude: tuple[str, ...]
    norm: NormSharing = "per-pair"
    only: BitConfig | None = None
    """The one precision that each layer has, of a network that was loaded for a single configuration."""


@dataclass(frozen=True)
class ConfigNote:
    """What is known of a named configuration.

    Attributes:
        bitops: BitOPs of one sample.
        size: Bits of all weight codes.
        score: What the search that found it minimised, or None.
        found: How it was found: plain texts and numbers.
    """

    bitops: int
    size: int
    score: float | None = None
    found: Mapping[str, str | int | float] = field(default_factory=dict)


@dataclass
class ConversionRecord:
    """What a converted model knows of itself."""

    settings: ConvertSettings
    facts: NetworkFacts
    coverage: tuple[Coverage, ...]
    norms: dict[str, str | None]
    """Path of every switchable norm to the quantized layer that sets its row, or None for a single row."""
    configs: dict[str, BitConfig] = field(default_factory=dict)
    """Named configurations, kept in the checkpoint."""
    notes: dict[str, ConfigNote] = field(default_factory=dict)
    """What is known of named configurations, as the checkpoint had it."""
    frozen: dict[str, Bits] = field(default_factory=dict)
    """Lowest precision in use, of the layers where that is not the lowest candidate."""
    statistics: dict[BitConfig, dict[str, Statistics]] = field(default_factory=dict)
    """Norm statistics that belong to one configuration, by path of the norm."""
    removed: dict[str, QuantizedLayer] = field(default_factory=dict)
    """Classifiers that `reset_classifier` took out without a new one, as patterns for one to come."""

    @property
    def quantized(self) -> tuple[str, ...]:
        """Paths of the quantized layers, in network order."""
        return tuple(row.path for row in self.coverage if row.status == "quantized")

"""What a converted network knows of itself: how it was converted, and its state since then."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from anyprec.bits import BitConfig, Bits
from anyprec.model.pairs import LayerPairs
from anyprec.model.placement import Placement
from anyprec.network.facts import NetworkFacts
from anyprec.nn.grids import ActivationGrid, ActivationScale, GridRule
from anyprec.nn.layers import QuantizedLayer
from anyprec.nn.norm_bank import Statistics
from anyprec.nn.norms import NormSharing, SwitchableNorm


@dataclass(frozen=True)
class Coverage:
    """What became of one layer of the float network that multiplies its input by a weight.

    Attributes:
        path: Its path.
        kind: Its class in the float network; "Parameter" for a bare parameter of a module.
        status: "quantized"; "exempt" (by a rule or on request); "skipped" (it could not be
            quantized).
        reason: Why it is not quantized; empty if it is.
    """

    path: str
    kind: str
    status: str
    reason: str = ""


@dataclass(frozen=True)
class ConvertSettings:
    """The arguments of `convert`, as plain values that a checkpoint can keep.

    `only` is None in them. In a network that was loaded for a single configuration it is that
    configuration, the one precision that each layer has. `pairs` are what `hardware` allowed when
    the network was converted, so that a file means the same after the table of hardware has
    changed.
    """

    bits: tuple[int, ...]
    activation_bits: tuple[int, ...]
    first_last_bits: int | None
    depthwise_min_bits: int
    per_channel: bool
    include: tuple[str, ...] | None
    exclude: tuple[str, ...]
    norm: NormSharing = "per-pair"
    only: BitConfig | None = None
    activation_grid: ActivationGrid = "affine"
    activation_scale: ActivationScale = "any"
    hardware: str | None = None
    pairs: LayerPairs | None = None
    placement: Placement = "layers"

    @property
    def grid_rule(self) -> GridRule:
        """What is allowed of the grid of every input and output."""
        return GridRule(self.activation_grid, self.activation_scale)


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


@dataclass(frozen=True)
class ConversionRecord:
    """What a converted network knows of itself, under its one attribute `anyprec_record`.

    Settings, facts, coverage and norms are those of the network as it was converted. If its layers
    change later (another classifier, a single configuration), it gets another record. The
    dictionaries are its state: they change in place.

    Attributes:
        settings: The arguments of `convert`.
        facts: What the float network is.
        coverage: What became of each of its layers.
        norms: Path of every switchable norm to the quantized layer that sets its row, or None for a
            single row.
        configs: State: named configurations, kept in the checkpoint.
        notes: State: what is known of named configurations, as the checkpoint had it.
        frozen: State: lowest precision in use, of layers where that is not the lowest candidate.
        statistics: State: norm statistics of single configurations, by path of the norm.
        removed: State: classifiers that `reset_classifier` took out without a new one. A later one
            is quantized like them.
        removed_norms: State: the same of norms.
    """

    settings: ConvertSettings
    facts: NetworkFacts
    coverage: tuple[Coverage, ...]
    norms: Mapping[str, str | None]
    configs: dict[str, BitConfig] = field(default_factory=dict)
    notes: dict[str, ConfigNote] = field(default_factory=dict)
    frozen: dict[str, Bits] = field(default_factory=dict)
    statistics: dict[BitConfig, dict[str, Statistics]] = field(default_factory=dict)
    removed: dict[str, QuantizedLayer] = field(default_factory=dict)
    removed_norms: dict[str, SwitchableNorm] = field(default_factory=dict)

    @property
    def quantized(self) -> tuple[str, ...]:
        """Paths of the quantized layers, in network order."""
        return quantized_paths(self.coverage)

    def take_over(
        self,
        *,
        configs: Mapping[str, BitConfig],
        notes: Mapping[str, ConfigNote],
        statistics: Mapping[BitConfig, dict[str, Statistics]],
    ) -> None:
        """Know these configurations from now on, and no others."""
        self.configs.clear()
        self.configs.update(configs)
        self.notes.clear()
        self.notes.update(notes)
        self.statistics.clear()
        self.statistics.update(statistics)

    def narrowed(self, config: BitConfig) -> ConversionRecord:
        """The record of the same network for this configuration alone."""
        names = [name for name, named in self.configs.items() if named == config]
        return dataclasses.replace(
            self,
            settings=dataclasses.replace(self.settings, only=config),
            configs=dict.fromkeys(names, config),
            notes={name: self.notes[name] for name in names if name in self.notes},
            frozen={},
        )


def quantized_paths(coverage: Iterable[Coverage]) -> tuple[str, ...]:
    """Paths of the quantized layers among all."""
    return tuple(row.path for row in coverage if row.status == "quantized")

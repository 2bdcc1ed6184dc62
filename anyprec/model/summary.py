"""The table of a converted network: each layer with its candidates, or why it stays in float."""

from __future__ import annotations

from dataclasses import dataclass

from anyprec.bits import Bits, LayerCandidates
from anyprec.model.record import ConversionRecord, Coverage
from anyprec.network.facts import OutputFacts
from anyprec.nn.layers import QuantizedLayer
from anyprec.nn.outputs import OUTPUT_BITS, OutputQuantizer
from anyprec.runtime.tables import TableContent

_OUTPUT_HEADER = ("value between layers", "made by", "in", "bits", "grid", "active")
_HEADER = ("layer", "class", "weights", "MACs", "weight bits", "input bits", "input", "active")


@dataclass(frozen=True)
class SummaryRow:
    """One line of `Summary`.

    Attributes:
        path: Where the layer is in the network.
        kind: Its class.
        macs: Multiply-accumulates for one sample.
        weights: Number of weights.
        candidates: The bit-widths that it may take; None if it is not quantized.
        input_kind: The grid of its input quantizer.
        bits: The active precision; None in floating point.
        lowest: The lowest precision in use; None where nothing is frozen.
        reason: Why it is not quantized; empty if it is.
    """

    path: str
    kind: str
    macs: int
    weights: int
    candidates: LayerCandidates | None
    input_kind: str
    bits: Bits | None
    lowest: Bits | None
    reason: str


@dataclass(frozen=True)
class OutputRow:
    """A value between layers with a quantizer of its own (`placement="integer"`).

    Attributes:
        path: Of its quantizer.
        source: Path of the layer that makes it, or name of the function (`"add"`, `"mean"`).
        owner: Path of the module in whose forward it is made; empty for the network itself.
        grid: `"unsigned"`, `"signed"` or `"affine"`.
        active: Whether it is quantized at present.
    """

    path: str
    source: str
    owner: str
    grid: str
    active: bool


@dataclass(frozen=True)
class Summary:
    """Every layer of a converted network; prints as a table, frozen candidates in parentheses.

    Attributes:
        name: Class of the network.
        rows: Its layers.
        outputs: Values between layers with quantizers of their own: a second table, if any.
    """

    name: str
    rows: tuple[SummaryRow, ...]
    outputs: tuple[OutputRow, ...] = ()

    def __str__(self) -> str:
        cells = [_cells(row) for row in self.rows]
        quantized = sum(row.candidates is not None for row in self.rows)
        title = f"{self.name}: {quantized} of {len(self.rows)} layers quantized"
        layers = TableContent(_HEADER, cells, numbers=("weights", "MACs"), title=title).text()
        if not self.outputs:
            return layers
        title = f"{len(self.outputs)} values between layers quantized"
        cells = [_output_cells(row) for row in self.outputs]
        return f"{layers}\n\n{TableContent(_OUTPUT_HEADER, cells, title=title).text()}"


def _cells(row: SummaryRow) -> tuple[str, ...]:
    layer = (row.path, row.kind, f"{row.weights:,}", f"{row.macs:,}")
    if row.candidates is None:
        return (*layer, "-", "-", "", row.reason)
    lowest = row.lowest or row.candidates.lowest
    weight = _candidates_cell(row.candidates.weight, lowest.weight)
    activation = _candidates_cell(row.candidates.activation, lowest.activation)
    active = "float" if row.bits is None else str(row.bits)
    return (*layer, weight, activation, row.input_kind, active)


def _output_cells(row: OutputRow) -> tuple[str, ...]:
    active = f"A{OUTPUT_BITS}" if row.active else "float"
    return (row.path, row.source, row.owner or "(network)", str(OUTPUT_BITS), row.grid, active)


def _candidates_cell(candidates: tuple[int, ...], lowest: int) -> str:
    cells = [f"({bits})" if bits < lowest else str(bits) for bits in candidates]
    return ",".join(cells)


def summary_row(
    coverage: Coverage, record: ConversionRecord, layer: QuantizedLayer | None
) -> SummaryRow:
    """The line of one layer; `layer` is None where it is not quantized."""
    facts = record.facts.layers[coverage.path]
    candidates, bits, input_kind = None, None, ""
    if layer is not None:
        candidates, bits = layer.candidates, layer.bits
        input_kind = layer.input_quantizer.kind
    return SummaryRow(
        path=coverage.path,
        kind=coverage.kind,
        macs=facts.macs,
        weights=facts.weights,
        candidates=candidates,
        input_kind=input_kind,
        bits=bits,
        lowest=record.frozen.get(coverage.path),
        reason=coverage.reason,
    )


def output_row(facts: OutputFacts, quantizer: OutputQuantizer, *, active: bool) -> OutputRow:
    """The line of a value between layers."""
    return OutputRow(facts.path, facts.source, facts.owner, quantizer.kind, active)

"""The table of a converted network: each layer with its candidates, or why it stays in float."""

from __future__ import annotations

from dataclasses import dataclass

from anyprec.bits import Bits, LayerCandidates
from anyprec.model.record import ConversionRecord, Coverage
from anyprec.nn.layers import QuantizedLayer
from anyprec.runtime.tables import TableContent

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
class Summary:
    """Every layer of a converted network; prints as a table, frozen candidates in parentheses."""

    name: str
    rows: tuple[SummaryRow, ...]

    def __str__(self) -> str:
        cells = [_cells(row) for row in self.rows]
        quantized = sum(row.candidates is not None for row in self.rows)
        title = f"{self.name}: {quantized} of {len(self.rows)} layers quantized"
        return TableContent(_HEADER, cells, numbers=("weights", "MACs"), title=title).text()


def _cells(row: SummaryRow) -> tuple[str, ...]:
    layer = (row.path, row.kind, f"{row.weights:,}", f"{row.macs:,}")
    if row.candidates is None:
        return (*layer, "-", "-", "", row.reason)
    lowest = row.lowest or row.candidates.lowest
    weight = _candidates_cell(row.candidates.weight, lowest.weight)
    activation = _candidates_cell(row.candidates.activation, lowest.activation)
    active = "float" if row.bits is None else str(row.bits)
    return (*layer, weight, activation, row.input_kind, active)


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

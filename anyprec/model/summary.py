"""The table of a converted network: every layer, with its candidates or why it stays float."""

from __future__ import annotations

from dataclasses import dataclass

from anyprec.bits import Bits, LayerCandidates


@dataclass(frozen=True)
class SummaryRow:
    """One line of `Summary`.

    `candidates` is None for a layer that is not quantized, `floor` where nothing is frozen.
    """

    path: str
    kind: str
    macs: int
    weights: int
    candidates: LayerCandidates | None
    input_kind: str
    bits: Bits | None
    floor: Bits | None
    reason: str


@dataclass(frozen=True)
class Summary:
    """Every layer of a converted network; prints as a table, frozen candidates in parentheses."""

    name: str
    rows: tuple[SummaryRow, ...]

    def __str__(self) -> str:
        header = (
            "layer",
            "class",
            "weights",
            "MACs",
            "weight bits",
            "input bits",
            "input",
            "active",
        )
        cells = [header, *(_summary_cells(row) for row in self.rows)]
        widths = [max(len(line[column]) for line in cells) for column in range(len(header))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in cells
        ]
        quantized = sum(row.candidates is not None for row in self.rows)
        title = f"{self.name}: {quantized} of {len(self.rows)} layers quantized"
        return "\n".join([title, *lines])


def _summary_cells(row: SummaryRow) -> tuple[str, ...]:
    if row.candidates is None:
        return row.path, row.kind, f"{row.weights:,}", f"{row.macs:,}", "-", "-", "", row.reason
    floor = row.floor or row.candidates.lowest
    weight = _widths_cell(row.candidates.weight, floor.weight)
    activation = _widths_cell(row.candidates.activation, floor.activation)
    active = "float" if row.bits is None else str(row.bits)
    return (
        row.path,
        row.kind,
        f"{row.weights:,}",
        f"{row.macs:,}",
        weight,
        activation,
        row.input_kind,
        active,
    )


def _widths_cell(widths: tuple[int, ...], floor: int) -> str:
    return ",".join(f"({width})" if width < floor else str(width) for width in widths)

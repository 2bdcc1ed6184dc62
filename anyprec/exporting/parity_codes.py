"""Codes in a runtime against those of the network in torch, point by point.

Once in sequence, where a difference goes on through all layers behind it, and once with each layer
alone: it gets the codes that it has in torch, so what differs is this layer's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from anyprec.errors import ExportError
from anyprec.exporting.graphs import Grid
from anyprec.exporting.lowering import Lowered
from anyprec.exporting.onnx_codes import (
    given_name,
    read_onnx,
    taking_codes,
    telling_codes,
    values_of,
)
from anyprec.exporting.parity_report import CodeParity
from anyprec.exporting.points import codes_name, layer_of, point_of, quantizers_of
from anyprec.exporting.reference import PointValues
from anyprec.exporting.runtimes import OnnxRuntime


class CodeComparison:
    """Compares the codes of an ONNX file, batch by batch.

    Args:
        file: The file.
        lowered: The network that it was made of.
        points: Its quantizers on any batch, by name.
        grids: Their grids.
        threads: How many the runtime may use.

    Attributes:
        missing: Quantizers that the file does not have, since others of the same grid do their
            work.

    Raises:
        ExportError: The file has none of the quantizers, or the runtime does not load it.
    """

    def __init__(
        self,
        file: Path,
        lowered: Lowered,
        *,
        points: dict[str, PointValues],
        grids: dict[str, Grid],
        threads: int,
    ) -> None:
        model = read_onnx(file)
        present = values_of(model)
        self._lowered = lowered
        self._grids = grids
        self._names: dict[str, str] = {}
        for point in points:
            name = codes_name(point, lowered.config)
            if name in present:
                self._names[point] = name
        if not self._names:
            first = codes_name(next(iter(points)), lowered.config)
            msg = f"{str(file)!r} has none of the network's quantizers (the first would be named "
            msg += f"{first!r}): check the file that anyprec.export made of this network"
            raise ExportError(msg)
        everywhere = [point_of(node) for node in quantizers_of(lowered.graph)]
        self.missing = tuple(point for point in everywhere if point not in self._names)
        axes = {name: points[point].codes.ndim for point, name in self._names.items()}
        self._sequence = OnnxRuntime(telling_codes(model, axes), threads=threads)
        self._alone = OnnxRuntime(taking_codes(model, axes), threads=threads)
        self._in_sequence = {point: _Tally(grids[point]) for point in self._names}
        self._each_alone = {point: _Tally(grids[point]) for point in self._names}

    def add(self, images: Tensor, points: dict[str, PointValues]) -> Tensor:
        """Run the file on a batch.

        Args:
            images: The batch.
            points: What the quantizers do with it in torch.

        Returns:
            The outputs with each layer alone.
        """
        names = list(self._names.values())
        told = self._sequence.run_named(images, names)
        given = {given_name(name): points[point].codes for point, name in self._names.items()}
        output = self._alone.first_output
        made = self._alone.run_named(images, [*names, output], more=given)
        for point, name in self._names.items():
            self._in_sequence[point].add(told[name], points[point])
            self._each_alone[point].add(made[name], points[point])
        return made[output]

    def layers(self) -> tuple[CodeParity, ...]:
        """What was found so far, in the order of the network."""
        rows: list[CodeParity] = []
        for point, tally in self._in_sequence.items():
            alone = self._each_alone[point]
            layer = self._lowered.config.get(layer_of(point))
            row = CodeParity(
                point=point,
                weight_bits=None if layer is None else layer.weight,
                bits=self._grids[point].bits,
                codes=tally.count,
                equal=tally.share,
                largest=tally.largest,
                alone_equal=alone.share,
                alone_largest=alone.largest,
                tie_distance=alone.farthest,
            )
            rows.append(row)
        return tuple(rows)


@dataclass
class _Tally:
    """Counts of one quantizer."""

    grid: Grid
    count: int = 0
    different: int = 0
    largest: int = 0
    farthest: float = 0.0

    @property
    def share(self) -> float:
        return 1 - self.different / self.count if self.count else 1.0

    def add(self, codes: Tensor, expected: PointValues) -> None:
        if codes.shape != expected.codes.shape:
            msg = f"codes have the shape {tuple(codes.shape)} in the file and "
            msg += f"{tuple(expected.codes.shape)} in the network: check the file that "
            msg += "anyprec.export made of this network"
            raise ExportError(msg)
        differ = codes != expected.codes
        self.count += codes.numel()
        number = int(torch.count_nonzero(differ))
        if number == 0:
            return
        self.different += number
        made, wanted = codes[differ].int(), expected.codes[differ].int()
        self.largest = max(self.largest, int((made - wanted).abs().max()))
        position = expected.values[differ].double() / self.grid.scale + self.grid.zero_point
        # A code is that of all positions within half a step around it.
        distance = float(((position - made).abs() - 0.5).max())
        self.farthest = max(self.farthest, distance)

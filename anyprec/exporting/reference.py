"""What a file is compared with: the lowered network, run in torch, with the codes at every point.

Only passes that leave every value as it is have been at this graph, so it computes what
`set_bits(config)` computes, bit for bit.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from anyprec.exporting.codes import quantize_behind_pools, simplify_quantizers
from anyprec.exporting.graphs import Grid, grid_of, is_call
from anyprec.exporting.lowering import Lowered
from anyprec.exporting.operators import FAKE_QUANTIZE
from anyprec.exporting.points import point_of, quantizers_of


@dataclass(frozen=True, eq=False)
class PointValues:
    """What a quantizer got and made.

    Attributes:
        values: Its input, float32.
        codes: Its codes, uint8, of the same shape.
    """

    values: Tensor
    codes: Tensor


class Reference:
    """The network of a file, in torch.

    Args:
        lowered: The network; not changed.

    Attributes:
        grids: Grid of each point, in order.
    """

    def __init__(self, lowered: Lowered) -> None:
        self._graph = copy.deepcopy(lowered.graph)
        simplify_quantizers(self._graph)
        quantize_behind_pools(self._graph)
        self._graph.recompile()
        self.grids = {point_of(node): grid_of(node) for node in quantizers_of(self._graph)}

    @torch.no_grad()
    def run(self, images: Tensor) -> tuple[Tensor, dict[str, PointValues]]:
        """The network's (first) output for a batch, and what every quantizer did."""
        interpreter = _Recording(self._graph)
        outputs = interpreter.run(images)
        return first_output(outputs), interpreter.points


class _Recording(fx.Interpreter):
    """Runs a graph and keeps what quantizers get and make."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.points: dict[str, PointValues] = {}

    def run_node(self, n: fx.Node) -> Any:
        """See `fx.Interpreter`."""
        result = super().run_node(n)
        if is_call(n, FAKE_QUANTIZE):
            values: Any = self.env[n.args[0]]  # type: ignore[index]
            self.points[point_of(n)] = PointValues(values, codes_of(result, grid_of(n)))
        return result


def codes_of(values: Tensor, grid: Grid) -> Tensor:
    """The codes of values that are on a grid."""
    codes = (values / grid.scale).round_().add_(grid.zero_point)
    return codes.to(torch.uint8)


def first_output(outputs: Any) -> Tensor:
    """The output of a network, the first one if there are several."""
    while isinstance(outputs, (tuple, list)):
        outputs = outputs[0]
    tensor: Tensor = outputs
    return tensor

"""Passes on activations: what is around a quantizer moves into it, and equal quantizers become one.

All are exact: rounding is monotone, zero is a code of every grid, and codes are fixed points of
their own grid.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import fx
from torch.fx.node import Node

from anyprec.exporting.constants import clean
from anyprec.exporting.graphs import (
    MAX_POOLS,
    clamp_of,
    grid_of,
    is_call,
    is_zero_pad,
    quantizer_of,
)
from anyprec.exporting.operators import FAKE_QUANTIZE
from anyprec.exporting.points import point_of


def simplify_quantizers(graph: fx.GraphModule) -> None:
    """Do all passes of this file, in place; the graph computes the same, bit for bit."""
    quantize_before_padding(graph)
    absorb_clamps(graph)
    share_quantizers(graph)
    drop_repeated_quantizers(graph)
    clean(graph)


def quantize_before_padding(graph: fx.GraphModule) -> None:
    """Let zeros be added to codes, and not to what is quantized then: `pad(x)` to be quantized.

    So the padding can become that of the convolution behind it.
    """
    for node in list(graph.graph.nodes):
        if not is_call(node, FAKE_QUANTIZE):
            continue
        pad = node.args[0]
        # Others read what was not quantized.
        if not is_zero_pad(pad) or len(pad.users) != 1 or not grid_of(node).has_zero:
            continue
        with graph.graph.inserting_before(pad):
            quantized = graph.graph.call_function(FAKE_QUANTIZE, (pad.args[0], *node.args[1:]))
        quantized.meta = {"val": pad.args[0].meta.get("val")}
        pad.update_arg(0, quantized)
        node.replace_all_uses_with(pad)
        graph.graph.erase_node(node)


def absorb_clamps(graph: fx.GraphModule) -> None:
    """Let the limits of codes do what a clamp before them does (ReLU, ReLU6, hardtanh)."""
    # From the back, so that one clamp behind another is absorbed, too.
    for node in reversed(list(graph.graph.nodes)):
        bounds = clamp_of(node)
        if bounds is None or not node.users:
            continue
        readers = list(node.users)
        if not all(is_call(reader, FAKE_QUANTIZE) for reader in readers):
            continue
        for reader in readers:
            _narrow(reader, *bounds)
            reader.update_arg(0, node.args[0])


def _narrow(quantizer: Node, minimum: float | None, maximum: float | None) -> None:
    """Make a quantizer's limits the codes of these values, where they are tighter."""
    grid = grid_of(quantizer)
    low, high = grid.low, grid.high
    if minimum is not None:
        low = min(max(low, _code(minimum, grid.scale, grid.zero_point)), high)
    if maximum is not None:
        high = max(min(high, _code(maximum, grid.scale, grid.zero_point)), low)
    quantizer.update_arg(3, low)
    quantizer.update_arg(4, high)


def _code(value: float, scale: float, zero_point: int) -> int:
    """The code of a number, as the operator rounds it; its limits are not applied."""
    ratio = torch.tensor(value, dtype=torch.float32) / torch.tensor(scale, dtype=torch.float32)
    # Far beyond any limit is as good as anywhere there.
    return int(ratio.round().clamp(-(2**20), 2**20)) + zero_point


def share_quantizers(graph: fx.GraphModule) -> None:
    """Quantize a value once where several readers have the same grid."""
    seen: dict[tuple[object, ...], Node] = {}
    for node in list(graph.graph.nodes):
        if not is_call(node, FAKE_QUANTIZE):
            continue
        first = seen.setdefault((node.args[0], grid_of(node)), node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.graph.erase_node(node)


def drop_repeated_quantizers(graph: fx.GraphModule) -> None:
    """Drop quantizers of values that are on their grid already."""
    for node in list(graph.graph.nodes):
        if is_call(node, FAKE_QUANTIZE):
            source = quantizer_of(node.args[0])
            if source is not None and grid_of(node).keeps(grid_of(source)):
                node.replace_all_uses_with(node.args[0])
                graph.graph.erase_node(node)


def quantize_behind_pools(graph: fx.GraphModule) -> None:
    """Quantize the values of max pooling again, on the grid that they are on.

    Runtimes that look for a quantizer on both sides of an operator then run it on codes.
    """
    pools: Counter[str] = Counter()
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or node.target not in MAX_POOLS:
            continue
        source = quantizer_of(node)
        if source is None:
            continue
        readers = list(node.users)
        pools[point_of(source)] += 1
        name = f"{point_of(source)}.pooled_{pools[point_of(source)]}"
        with graph.graph.inserting_after(node):
            quantized = graph.graph.call_function(FAKE_QUANTIZE, (node, *source.args[1:6], name))
        quantized.meta = {"val": node.meta.get("val")}
        for reader in readers:
            reader.replace_input_with(node, quantized)

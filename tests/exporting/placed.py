"""Small networks, lowered, with 8-bit quantizers put behind their operators by hand."""

from __future__ import annotations

import copy
import dataclasses
import operator

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.node import Node

import anyprec
from anyprec.exporting.graphs import ATEN, clamp_of, is_call, multiplication, only_reader
from anyprec.exporting.integers import IntegerGraph, to_integers
from anyprec.exporting.lowering import Lowered, lower
from anyprec.exporting.operators import FAKE_QUANTIZE

_AVERAGES = (
    ATEN.avg_pool2d.default,
    ATEN.adaptive_avg_pool2d.default,
    ATEN.mean.dim,
)


class Mixed(nn.Module):
    """Each kind of integer operator: SAME padding, groups, sums, all poolings, a mean."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, stride=2, bias=False)
        self.stem_norm = nn.BatchNorm2d(channels)
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.shortcut = nn.Conv2d(channels, channels, 1)
        self.wide = nn.Conv2d(channels, 2 * channels, 1)
        self.hidden = nn.Linear(2 * channels, 12)
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.stem_norm(self.stem(F.pad(x, (0, 1, 0, 1)))))
        x = F.max_pool2d(x, 3, 2, 1)
        y = self.depthwise(F.relu(self.first(x)))
        x = self.shortcut(x) + y
        x = F.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False)
        x = F.hardtanh(self.wide(x), -1.0, 2.0).mean(dim=(2, 3))
        return self.head(self.hidden(x))


class Pools(nn.Module):
    """Average pooling in other ways."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.point = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(self.stem(x), 3, 2, 1)
        x = F.avg_pool2d(self.point(x), (3, 2), (2, 1), (1, 0), count_include_pad=False)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def calibrated(network: nn.Module, size: int = 19) -> anyprec.ConvertedModel:
    """A network with norms that have seen data, converted and calibrated."""
    images = torch.randn(8, 3, size, size)
    network.train()(images)
    model = anyprec.convert(network.eval(), bits=(2, 4, 8), example_input=images[:2])
    anyprec.calibrate(model, [images])
    return model


def placed(network: nn.Module, bits: anyprec.BitsRequest, size: int = 19) -> IntegerGraph:
    """The integer graph of a network that is quantized everywhere."""
    lowered = lower(calibrated(network, size), bits)
    return to_integers(quantized_behind(lowered, torch.randn(8, 3, size, size)))


@torch.no_grad()
def quantized_behind(lowered: Lowered, images: Tensor) -> Lowered:
    """A graph with 8-bit quantizers behind convolutions, Linear layers, sums and averages."""
    graph = copy.deepcopy(lowered.graph)
    recorder = _Recorder(graph)
    recorder.run(images)
    for point in _points(graph):
        if any(reader.op == "output" for reader in point.users):
            continue
        grid = _grid(recorder.seen[point])
        with graph.graph.inserting_after(point):
            made = graph.graph.call_function(FAKE_QUANTIZE, (point, *grid, 8, point.name))
        made.meta = dict(point.meta)
        _let_read(point, made)
    graph.graph.lint()
    graph.recompile()
    return dataclasses.replace(lowered, graph=graph)


def _let_read(point: Node, quantizer: Node) -> None:
    """Let all readers read the quantizer; those of eight bits go, it is theirs."""
    for reader in list(point.users):
        if reader is quantizer:
            continue
        if is_call(reader, FAKE_QUANTIZE) and reader.args[5] == 8:
            reader.replace_all_uses_with(quantizer)
        else:
            reader.replace_input_with(point, quantizer)


def _points(graph: fx.GraphModule) -> list[Node]:
    points: dict[Node, None] = {}
    for node in graph.graph.nodes:
        is_sum = is_call(node, ATEN.add.Tensor)
        if multiplication(node) is not None or is_sum or is_call(node, *_AVERAGES):
            points[_behind(node)] = None
    return list(points)


def _behind(node: Node) -> Node:
    """The last of the norm and the clamp behind a node."""
    reader = only_reader(node)
    while reader is not None and (_is_norm(reader) or clamp_of(reader) is not None):
        node, reader = reader, only_reader(reader)
    return node


def _is_norm(node: Node) -> bool:
    return is_call(node, operator.getitem) or "batch_norm" in str(node.target)


def _grid(values: Tensor) -> tuple[float, int, int, int]:
    """Scale, zero point and limits; a tenth of the range is cut off, so that limits matter."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 1e-3)
    scale = float(torch.tensor(0.9 * (high - low) / 255))
    return scale, min(round(-low / scale), 255), 0, 255


class _Recorder(fx.Interpreter):
    """Keeps what every node computes."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.seen: dict[Node, Tensor] = {}

    def run_node(self, n: Node) -> Tensor:
        result: Tensor = super().run_node(n)
        self.seen[n] = result
        return result

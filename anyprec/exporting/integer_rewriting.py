"""From a graph of fake quantization to one of codes.

Every value of the new graph is codes or numbers. An operator runs on codes where its operands are
codes and it has an integer form (`integer_forms.py`); where numbers are needed, codes are
dequantized, once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Node

from anyprec.errors import ExportError
from anyprec.exporting.constants import clean
from anyprec.exporting.graphs import (
    ARRANGING,
    ATEN,
    MAX_POOLS,
    RESHAPING,
    Grid,
    grid_of,
    is_call,
    is_zero_pad,
    multiplication,
)
from anyprec.exporting.integer_forms import IntegerForm, integer_form
from anyprec.exporting.integer_layers import Dequantize, Quantize
from anyprec.exporting.operators import DEQUANTIZE, FAKE_QUANTIZE

INTEGERS, FLOATING = "integers", "floating point"
"""What an operator computes with."""

_SHAPES = (ATEN.sym_size.int, ATEN.sym_numel.default)
_MOVES_NUMBERS = {
    *ARRANGING,
    *MAX_POOLS,
    *_SHAPES,
    ATEN.cat.default,
    ATEN.stack.default,
    ATEN.chunk.default,
    ATEN.split.Tensor,
    ATEN.split_with_sizes.default,
    ATEN.unbind.int,
    ATEN.pad.default,
    ATEN.constant_pad_nd.default,
}
"""Operators that compute nothing: their numbers are equal to those of codes."""


@dataclass(frozen=True)
class OperatorPlace:
    """Where an operator of an integer network runs.

    Attributes:
        path: Of the layer, or of the module that calls the operator.
        operator: Its name in torch.
        runs_in: `"integers"` or `"floating point"`.
        reason: Why it runs in floating point, or that its result does; else empty.
    """

    path: str
    operator: str
    runs_in: str
    reason: str


def quantize_before_views(graph: fx.GraphModule) -> None:
    """Let values be quantized before they are arranged, in place, so that sums are rounded at once.

    Rounding does not depend on where a value stands, so the graph computes the same.
    """
    for node in reversed(list(graph.graph.nodes)):
        if not is_call(node, FAKE_QUANTIZE):
            continue
        view: Any = node.args[0]
        while is_call(view, *RESHAPING) and len(view.users) == 1:
            source = view.args[0]
            _move_before(node, view)
            view = source
    clean(graph)


def _move_before(quantizer: Node, view: Node) -> None:
    source: Any = view.args[0]
    view.replace_all_uses_with(source)
    quantizer.replace_all_uses_with(view)
    view.update_arg(0, quantizer)
    quantizer.append(view)
    quantizer.meta = {"val": source.meta.get("val")}


def in_codes(
    graph: fx.GraphModule, floating: dict[str, str]
) -> tuple[fx.GraphModule, tuple[OperatorPlace, ...]]:
    """A graph that computes with codes what another one does with numbers on grids.

    Args:
        graph: With constants folded, norms in scales, biases as codes.
        floating: Layers that are not quantized, with the reason.

    Raises:
        ExportError: The graph calls something that is no operator of torch.
    """
    rewriter = _Rewriter(graph, floating)
    for node in graph.graph.nodes:
        rewriter.visit(node)
    made = fx.GraphModule(rewriter.root, rewriter.made, "Operators")
    made.graph.eliminate_dead_code()
    made.delete_all_unused_submodules()
    made.graph.lint()
    made.recompile()
    return made, tuple(rewriter.places)


class _Rewriter:
    """Makes the new graph, node by node."""

    def __init__(self, graph: fx.GraphModule, floating: dict[str, str]) -> None:
        self.made = fx.Graph()
        self.root = nn.Module()
        self.places: list[OperatorPlace] = []
        self._graph = graph
        self._floating = floating
        self._numbers: dict[Node, Node] = {}
        self._codes: dict[Node, Node] = {}
        self._grids: dict[Node, Grid] = {}
        self._names: set[str] = set()

    def visit(self, node: Node) -> None:
        """Take over one node of the old graph."""
        if node.op == "placeholder":
            self._numbers[node] = self.made.placeholder(node.name)
        elif node.op == "output":
            self.made.output(fx.map_arg(node.args[0], self._number))
        elif node.op == "call_function":
            self._call(node)
        elif node.op != "get_attr":
            msg = f"{node.target} is a {node.op}, not an operator of torch: it has no integer form"
            raise ExportError(msg)

    def _call(self, node: Node) -> None:
        if node in self._codes or is_call(node, DEQUANTIZE):
            return  # Taken in by the operator before, or a constant: made where it is read.
        if is_call(node, FAKE_QUANTIZE):
            self._quantize(node)
        elif self._moves_codes(node):
            self._move(node)
        else:
            form = integer_form(self._graph, node, self._grids)
            if isinstance(form, IntegerForm):
                self._compute(node, form)
            else:
                self._compute_numbers(node, form)

    def _quantize(self, node: Node) -> None:
        values, grid = node.args[0], grid_of(node)
        if values in self._grids and grid.keeps(self._grids[values]):  # type: ignore[index]
            self._hold(node, self._codes[values], self._grids[values])  # type: ignore[index]
            return
        name = self._add(f"{node.args[6]}_quantize", Quantize(grid))
        self._hold(node, self.made.call_module(name, (self._number(values),)), grid)

    def _moves_codes(self, node: Node) -> bool:
        if not node.args or node.args[0] not in self._grids:
            return False
        if is_zero_pad(node):
            return True
        return node.target in ARRANGING or node.target in MAX_POOLS

    def _move(self, node: Node) -> None:
        source: Any = node.args[0]
        grid = self._grids[source]
        if is_zero_pad(node):
            padding = (self._codes[source], node.args[1], grid.zero_point)
            padded = self.made.call_function(ATEN.constant_pad_nd.default, padding)
            low, high = min(grid.low, grid.zero_point), max(grid.high, grid.zero_point)
            self._hold(node, padded, Grid(grid.scale, grid.zero_point, low, high, grid.bits))
            return
        function: Any = node.target
        rest = fx.map_arg((node.args[1:], dict(node.kwargs)), self._any)
        arguments = (self._codes[source], *rest[0])
        self._hold(node, self.made.call_function(function, arguments, rest[1]), grid)

    def _compute(self, node: Node, form: IntegerForm) -> None:
        path, reason = self._path(node), ""
        is_product = multiplication(node) is not None
        name = self._add(path if is_product else f"{path}_{node.name}", form.module)
        operands = tuple(self._codes[operand] for operand in form.operands)
        made = self.made.call_module(name, operands)
        if form.quantizer is None:
            self._numbers[node] = made
            reason = "its result is dequantized: no quantizer alone reads it"
        else:
            self._hold(form.quantizer, made, grid_of(form.quantizer))
        self.places.append(OperatorPlace(path, _name(node), INTEGERS, reason))

    def _compute_numbers(self, node: Node, reason: str) -> None:
        function: Any = node.target
        read = self._any if node.target in _SHAPES else self._number
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), read)
        self._numbers[node] = self.made.call_function(function, args, kwargs)
        if isinstance(function, torch._ops.OpOverload) and function not in _MOVES_NUMBERS:  # noqa: SLF001
            path = self._path(node)
            reason = self._floating.get(path, reason)
            self.places.append(OperatorPlace(path, _name(node), FLOATING, reason))

    def _hold(self, node: Node, codes: Node, grid: Grid) -> None:
        self._codes[node] = codes
        self._grids[node] = grid

    def _any(self, node: Node) -> Node:
        """The codes of a node, or else its numbers."""
        return self._codes[node] if node in self._codes else self._number(node)

    def _number(self, node: Any) -> Node:
        """The numbers of a node of the old graph."""
        if node not in self._numbers:
            self._numbers[node] = self._made_number(node)
        return self._numbers[node]

    def _made_number(self, node: Node) -> Node:
        if node in self._codes:
            name = self._add(f"{node.name}_dequantize", Dequantize(self._grids[node]))
            return self.made.call_module(name, (self._codes[node],))
        if node.op == "get_attr":
            return self._constant(node)
        function: Any = node.target
        return self.made.call_function(function, fx.map_arg(node.args, self._number))

    def _constant(self, node: Node) -> Node:
        holder, _, attribute = str(node.target).rpartition(".")
        value = getattr(self._graph.get_submodule(holder), attribute)
        if not isinstance(value, Tensor):
            msg = f"{node.target} is a {type(value).__name__}: it has no integer form"
            raise ExportError(msg)
        name = str(node.target).replace(".", "_")
        if name not in self._names:
            self._names.add(name)
            self.root.register_buffer(name, value.detach().clone())
        return self.made.get_attr(name)

    def _add(self, path: str, module: nn.Module) -> str:
        """Add a module under a path, or one like it; returns the path."""
        number, name = 0, path
        while name in self._names or self._is_within(name):
            number += 1
            name = f"{path}_{number}".replace(".", "_")
        self._names.add(name)
        holder = self.root
        *parents, last = name.split(".")
        for parent in parents:
            if parent not in dict(holder.named_children()):
                holder.add_module(parent, nn.Module())
            holder = holder.get_submodule(parent)
        holder.add_module(last, module)
        return name

    def _is_within(self, name: str) -> bool:
        """Whether a name lies within a module that was added, or one that was added in it."""
        return any(
            f"{used}.".startswith(f"{name}.") or f"{name}.".startswith(f"{used}.")
            for used in self._names
        )

    def _path(self, node: Node) -> str:
        """Path of the layer that a node is, or of the module that calls it."""
        product = multiplication(node)
        if product is not None and is_call(product.weight, DEQUANTIZE):
            return product.layer
        stack = node.meta.get("nn_module_stack") or {}
        # The network is an attribute of what was traced (`lowering.py`).
        paths = [path.partition(".")[2] for path, _ in stack.values()]
        return (paths[-1] if paths else "") or node.name


def _name(node: Node) -> str:
    return str(node.target).removeprefix("aten.").split(".")[0]

"""Constants of a lowered graph: weights become codes, and views of weights views of codes.

A layer quantizes whatever it multiplies its input by: its weight, a standardised weight, a part of
a packed projection. Where that does not depend on the network's input, its codes are computed here,
once, so that the graph holds integers and no latent weight.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import Node

from anyprec.exporting.graphs import ATEN, RESHAPING, is_call, tensor_of, with_buffer
from anyprec.exporting.operators import DEQUANTIZE, FAKE_QUANTIZE_WEIGHT, weight_codes

_VIEWS = RESHAPING | {
    ATEN.as_strided.default,
    ATEN.t.default,
    ATEN.numpy_T.default,
    ATEN.slice.Tensor,
    ATEN.select.int,
    ATEN.detach.default,
}
"""Operators that only choose or arrange values."""

_SPLITS = {
    ATEN.chunk.default,
    ATEN.split.Tensor,
    ATEN.split_with_sizes.default,
    ATEN.unbind.int,
}
"""The same for operators with several results."""

_LIMITS: dict[Any, tuple[str, ...]] = {
    ATEN.clamp.Tensor: ("min", "max"),
    ATEN.clamp_min.Tensor: ("min",),
    ATEN.clamp_max.Tensor: ("max",),
    ATEN.maximum.default: ("min",),
    ATEN.minimum.default: ("max",),
}
"""What the operands behind the first one limit, of operators that clamp by tensors."""

_NO_LIMIT = {"min": -math.inf, "max": math.inf}

_SYMMETRIC = {ATEN.maximum.default, ATEN.minimum.default}
"""Those in which either operand may be the limit."""

_ASSERTIONS = {ATEN._assert_tensor_metadata.default, ATEN._assert_scalar.default}  # noqa: SLF001


@torch.no_grad()
def fold_constant_weights(graph: fx.GraphModule) -> None:
    """Replace every quantized weight that is a constant by its codes, in place; values stay equal.

    Latent weights that nothing else reads are dropped.
    """
    constants = _constant_nodes(graph)
    values = _Values(graph)
    for node in list(graph.graph.nodes):
        if is_call(node, FAKE_QUANTIZE_WEIGHT) and node in constants:
            operand, scale, bits, layer = node.args
            steps = values.of(scale)
            codes = weight_codes(values.of(operand), steps, bits).to(torch.int8)
            _replace_by_codes(graph, node, codes, steps, (bits, layer))
    for node in list(graph.graph.nodes):
        if node in constants and _reads_codes(node):
            _move_into_codes(graph, node)
    _fold_the_rest(graph)
    _limit_by_numbers(graph)
    clean(graph)


def _limit_by_numbers(graph: fx.GraphModule) -> None:
    """Let a clamp by constant tensors of one number be one by numbers; an infinite limit is none.

    Only such clamps go into the limits of codes. Of several that read one value, torch's exporter
    would give their tensors the same name in ONNX.
    """
    for node in list(graph.graph.nodes):
        if not is_call(node, *_LIMITS):
            continue
        clamped, limits = _numbers_of(graph, node)
        if clamped is None:
            continue
        replacement = clamped
        if limits:
            with graph.graph.inserting_before(node):
                bounds = limits.get("min"), limits.get("max")
                replacement = graph.graph.call_function(ATEN.clamp.default, (clamped, *bounds))
            replacement.meta = dict(node.meta)
        node.replace_all_uses_with(replacement)


def _numbers_of(graph: fx.GraphModule, node: Node) -> tuple[Node | None, dict[str, float]]:
    """What a node clamps, and by which numbers; None if it clamps by anything else."""
    names = _LIMITS[node.target]
    arguments = dict(zip(("self", *names), node.args, strict=False)) | node.kwargs
    if "other" in arguments:
        arguments[names[0]] = arguments.pop("other")
    clamped: Any = arguments.pop("self")
    if node.target in _SYMMETRIC and clamped.op == "get_attr":
        (name,) = names
        clamped, arguments[name] = arguments[name], clamped
    limits: dict[str, float] = {}
    for name, held in arguments.items():
        if held is None:
            continue
        number = _number_for(graph, held, clamped)
        if number is None:
            return None, {}
        if number != _NO_LIMIT[name]:
            limits[name] = number
    return clamped, limits


def _number_for(graph: fx.GraphModule, held: Any, clamped: Node) -> float | None:
    """The number that a limit is, of the dtype of what it limits; None if it is something else."""
    if held.op != "get_attr":
        return None
    limit, values = tensor_of(graph, held), clamped.meta["val"]
    is_number = limit.numel() == 1 and limit.ndim <= values.ndim
    if not is_number or limit.dtype != values.dtype or not values.is_floating_point():
        return None
    number = float(limit)
    is_limit = math.isfinite(number) or number in _NO_LIMIT.values()
    return number if is_limit else None


def _fold_the_rest(graph: fx.GraphModule) -> None:
    """Compute whatever else does not depend on the input: position embeddings, masks."""
    constants = _constant_nodes(graph)
    values = _Values(graph)
    for node in list(graph.graph.nodes):
        if node not in constants or node.op == "get_attr" or is_call(node, DEQUANTIZE):
            continue
        if constants.issuperset(node.users) or not isinstance(values.of(node), Tensor):
            continue
        with graph.graph.inserting_before(node):
            held = with_buffer(graph, "constant", values.of(node))
        held.meta = dict(node.meta)
        node.replace_all_uses_with(held)


def clean(graph: fx.GraphModule) -> None:
    """Drop what nothing reads: nodes, parameters and buffers. Assertions of the tracer go, too."""
    for node in list(graph.graph.nodes):
        if is_call(node, *_ASSERTIONS):
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    read = {node.target for node in graph.graph.nodes if node.op == "get_attr"}
    for name in [*dict(graph.named_parameters()), *dict(graph.named_buffers())]:
        if name not in read:
            holder, _, attribute = name.rpartition(".")
            delattr(graph.get_submodule(holder), attribute)
    graph.delete_all_unused_submodules()
    graph.graph.lint()
    graph.recompile()


class _Values:
    """Computes constants of a graph, each once."""

    def __init__(self, graph: fx.GraphModule) -> None:
        self._graph = graph
        self._known: dict[Node, Any] = {}

    def of(self, node: Any) -> Any:
        if not isinstance(node, Node):
            return node
        if node not in self._known:
            self._known[node] = self._computed(node)
        return self._known[node]

    def _computed(self, node: Node) -> Any:
        if node.op == "get_attr":
            return tensor_of(self._graph, node)
        function: Any = node.target
        args = fx.map_arg(node.args, self.of)
        kwargs = fx.map_arg(node.kwargs, self.of)
        return function(*args, **kwargs)


def _constant_nodes(graph: fx.GraphModule) -> set[Node]:
    """The nodes that do not depend on the network's input."""
    constants: set[Node] = set()
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            constants.add(node)
        elif node.op == "call_function":
            reads_constants = constants.issuperset(node.all_input_nodes)
            if reads_constants and not _is_random(node):
                constants.add(node)
    return constants


def _is_random(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _replace_by_codes(
    graph: fx.GraphModule, node: Node, codes: Tensor, scale: Tensor, rest: tuple[Any, ...]
) -> Node:
    with graph.graph.inserting_before(node):
        held = with_buffer(graph, "codes", codes), with_buffer(graph, "scale", scale)
        dequantized = graph.graph.call_function(DEQUANTIZE, (*held, *rest))
    dequantized.meta = dict(node.meta)
    node.replace_all_uses_with(dequantized)
    return dequantized


def _reads_codes(node: Node) -> bool:
    """Whether a node is a view of a weight that is codes."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], Node):
        return False
    if node.target is operator.getitem:
        source = node.args[0]
        return source.target in _SPLITS and _is_dequantized(source.args[0])
    return node.target in _VIEWS and _is_dequantized(node.args[0])


def _is_dequantized(value: Any) -> bool:
    return isinstance(value, Node) and is_call(value, DEQUANTIZE)


def _move_into_codes(graph: fx.GraphModule, node: Node) -> None:
    """Replace a view of a dequantized weight by the weight of the same view of its codes."""

    def view(value: Tensor) -> Tensor:
        function: Any = node.target
        if function is operator.getitem:
            split: Any = node.args[0]
            parts = split.target(value, *split.args[1:], **split.kwargs)
            chosen: Tensor = parts[node.args[1]]
            return chosen
        viewed: Tensor = function(value, *node.args[1:], **node.kwargs)
        return viewed

    source: Any = node.args[0]
    if node.target is operator.getitem:
        source = source.args[0]
    codes, scale = tensor_of(graph, source.args[0]), tensor_of(graph, source.args[1])
    whole = scale.expand(codes.shape).contiguous()
    seen = _narrowed(view(whole))
    _replace_by_codes(graph, node, view(codes.contiguous()).contiguous(), seen, source.args[2:])


def _narrowed(scale: Tensor) -> Tensor:
    """A scale without the axes along which it is constant, which get length 1."""
    for axis in range(scale.ndim):
        first = scale.narrow(axis, 0, 1)
        if bool((scale == first).all()):
            scale = first
    return scale.reshape(()).clone() if scale.numel() == 1 else scale.clone()

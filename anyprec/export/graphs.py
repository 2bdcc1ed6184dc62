"""Reading and changing torch.fx graphs of operators: what every pass needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import Node


def is_call(node: Any, *functions: Callable[..., Any]) -> bool:
    """Whether a node, if it is one, calls one of these functions."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in functions


def tensor_of(graph: fx.GraphModule, node: Node) -> Tensor:
    """The parameter or buffer that a node reads."""
    holder, _, name = str(node.target).rpartition(".")
    tensor: Tensor = getattr(graph.get_submodule(holder), name)
    return tensor.detach()


def with_buffer(graph: fx.GraphModule, name: str, tensor: Tensor) -> Node:
    """A node, at the graph's point of insertion, that reads a new buffer with these values."""
    number = 0
    while hasattr(graph, f"{name}_{number}"):
        number += 1
    graph.register_buffer(f"{name}_{number}", tensor.detach().clone())
    return graph.graph.get_attr(f"{name}_{number}")


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, however it was passed."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def only_reader(node: Node) -> Node | None:
    """The one node that reads a node; None if there are several or none."""
    if len(node.users) != 1:
        return None
    return next(iter(node.users))


ATEN = torch.ops.aten

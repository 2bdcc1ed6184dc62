"""The torch.fx graph of a network, or the reason why it has none.

Tracing follows timm's own lists of modules and functions that must not be traced through. Partial
execution runs the graph, and training finds the features of layers in it. The facts of a network
need none: they come from an observed forward pass (`analysis.py`).
"""

from __future__ import annotations

import gc
import inspect
import math
import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import fx, nn

from anyprec.errors import ConversionError
from anyprec.network.preserving import left_as_it_was
from anyprec.network.weights import named_layers
from anyprec.nn.norms import NORM_TYPES
from anyprec.nn.operators import LAYER_TYPES
from anyprec.nn.specialize import ORIGINAL_FORWARD, Specialized


def trace(model: nn.Module, *, opaque: tuple[type, ...] = ()) -> tuple[fx.Graph | None, str | None]:
    """The graph of `model` in its present mode, or None and the reason why it cannot be traced.

    Args:
        model: A float or a converted network.
        opaque: Classes of modules that are not traced through, beside layers, norms and those that
            timm names.

    Raises:
        ConversionError: Its forward keeps what it computes where it cannot be removed again.

    In `node.meta`, `output_of` and `input_of` list the paths of modules, containers too, whose
    output or first argument a node's tensor is.
    """
    proxies: list[weakref.ref[fx.Proxy]] = []
    reason = None
    for opening in (True, False):
        with left_as_it_was(model), torch.no_grad():
            graph, reason = _try_to_trace(model, proxies, opening=opening, opaque=opaque)
        _require_gone(model, proxies)
        if graph is not None:
            return graph, None
    return None, reason


def graph_module(model: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """A module that runs a graph of `trace`, on the very modules and tensors of `model`."""
    targets: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            targets[node.target] = node.meta[_VALUE]
        elif node.op == "call_module":
            targets[node.target] = model.get_submodule(node.target)
    return fx.GraphModule(targets, graph, type(model).__name__)


_VALUE = "value"
"""Key of what a `get_attr` node gets: tracing stores constants in the network for its length."""


def _try_to_trace(
    model: nn.Module,
    proxies: list[weakref.ref[fx.Proxy]],
    *,
    opening: bool,
    opaque: tuple[type, ...],
) -> tuple[fx.Graph | None, str | None]:
    """One attempt; notes all proxies."""
    is_specialized = isinstance(model, Specialized)
    tracer = _Tracer(proxies, opening=opening, opaque=opaque, root_is_specialized=is_specialized)
    try:
        graph = tracer.trace(model, concrete_args=_default_arguments(model))
    # Tracing runs any code with proxies: every error means that there is no graph.
    except Exception as error:  # noqa: BLE001
        first_line = str(error).partition("\n")[0]
        return None, f"{type(error).__name__}: {first_line}"
    for node in graph.nodes:
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            node.meta[_VALUE] = getattr(model.get_submodule(owner), name)
    return graph, None


def _require_gone(model: nn.Module, proxies: list[weakref.ref[fx.Proxy]]) -> None:
    """Refuse a network that keeps proxies, which stand for tensors, where no walk reaches them."""
    for collect in (False, True):
        if collect:
            gc.collect()  # proxies in cycles that nothing refers to
        if not any(proxy() is not None for proxy in proxies):
            return
    msg = f"{type(model).__name__} keeps values of its forward pass where they cannot be removed "
    msg += "again (not in the network, nor in a global variable of its own code): keep them in "
    msg += "attributes of its modules, or not at all"
    raise ConversionError(msg)


class _Tracer(fx.Tracer):
    """Traces through everything but layers, norms and what timm says must not be traced.

    Args:
        proxies: Where to note each proxy that is made.
        opening: Trace through timm's untraceable blocks after all if they hold layers, which they
            would hide.
        opaque: More classes of modules that are not traced through.
        root_is_specialized: The network has a mixin of ours, which may have a forward of its own.
    """

    def __init__(
        self,
        proxies: list[weakref.ref[fx.Proxy]],
        *,
        opening: bool,
        opaque: tuple[type, ...],
        root_is_specialized: bool,
    ) -> None:
        # timm is slow to import.
        from timm.models import get_notrace_functions, get_notrace_modules  # noqa: PLC0415

        super().__init__(
            autowrap_modules=(math,),
            autowrap_functions=tuple(get_notrace_functions()),
            param_shapes_constant=True,
        )
        if root_is_specialized:
            self.traced_func_name = ORIGINAL_FORWARD
        self._proxies = proxies
        self._opening = opening
        self._leaf_types = (*LAYER_TYPES, *NORM_TYPES, *opaque)
        self._untraceable_types: tuple[type, ...] = tuple(get_notrace_modules())

    def proxy(self, node: fx.Node) -> fx.Proxy:
        proxy = super().proxy(node)
        self._proxies.append(weakref.ref(proxy))
        return proxy

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        path = self.path_of_module(m)
        if args and isinstance(args[0], fx.Proxy):
            args[0].node.meta.setdefault("input_of", []).append(path)
        output = super().call_module(m, forward, args, kwargs)
        if isinstance(output, fx.Proxy):
            output.node.meta.setdefault("output_of", []).append(path)
        return output

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, self._leaf_types):
            return True
        if isinstance(m, self._untraceable_types):
            return not (self._opening and any(named_layers(m)))
        return super().is_leaf_module(m, module_qualified_name)


def _default_arguments(model: nn.Module) -> dict[str, Any]:
    """Defaults of all arguments but the first, so that branches on them are taken as in use."""
    defaults = {}
    forward = model.forward
    if isinstance(model, Specialized):
        forward = MethodType(getattr(type(model), ORIGINAL_FORWARD), model)
    for parameter in list(inspect.signature(forward).parameters.values())[1:]:
        if parameter.default is not inspect.Parameter.empty:
            defaults[parameter.name] = parameter.default
    return defaults

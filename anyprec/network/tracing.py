"""The torch.fx graph of a network, or the reason why it has none.

Tracing follows timm's own lists of modules and functions that must not be traced through. What the
graph says of a network is read in `flow.py`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

from torch import fx, nn

from anyprec.network.weights import named_layers
from anyprec.nn.norms import NORM_TYPES
from anyprec.nn.operators import LAYER_TYPES


def trace(model: nn.Module, *, opaque: tuple[type, ...] = ()) -> tuple[fx.Graph | None, str | None]:
    """The graph of `model` in its present mode, or None and the reason why it cannot be traced.

    Args:
        model: A float or a converted network.
        opaque: Classes of modules that are not traced through, beside layers, norms and those that
            timm names.

    In `node.meta`, `output_of` and `input_of` list the paths of modules, containers too, whose
    output or first argument a node's tensor is.
    """
    reason = None
    for opening in (True, False):
        tracer = _Tracer(opening=opening, opaque=opaque)
        try:
            return tracer.trace(model, concrete_args=_default_arguments(model)), None
        # Tracing runs any code with proxies: every error means that there is no graph.
        except Exception as error:  # noqa: BLE001
            first_line = str(error).partition("\n")[0]
            reason = f"{type(error).__name__}: {first_line}"
    return None, reason


class _Tracer(fx.Tracer):
    """Traces through everything but layers, norms and what timm says must not be traced.

    Args:
        opening: Trace through timm's untraceable blocks after all if they hold layers, which they
            would hide.
        opaque: More classes of modules that are not traced through.
    """

    def __init__(self, *, opening: bool, opaque: tuple[type, ...]) -> None:
        # timm is slow to import.
        from timm.models import get_notrace_functions, get_notrace_modules  # noqa: PLC0415

        super().__init__(
            autowrap_modules=(math,),
            autowrap_functions=tuple(get_notrace_functions()),
            param_shapes_constant=True,
        )
        self._opening = opening
        self._leaf_types = (*LAYER_TYPES, *NORM_TYPES, *opaque)
        self._untraceable_types: tuple[type, ...] = tuple(get_notrace_modules())

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
    for parameter in list(inspect.signature(model.forward).parameters.values())[1:]:
        if parameter.default is not inspect.Parameter.empty:
            defaults[parameter.name] = parameter.default
    return defaults

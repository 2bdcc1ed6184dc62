"""Modules in whose forward weights are used without calling the layer that holds them.

`F.linear(x, self.qkv.weight)` in timm's EVA, BEiT and Swin-V2, rows of a weight, the packed
projection of `nn.MultiheadAttention`, the matrices of an LSTM, a bare parameter in a matrix
product: such an *owner* is given a derived class (see `specialize.py`), whose forward runs the
original one and intercepts the operators that multiply those weights. A layer that is called
intercepts its own operator (`layers.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from anyprec.errors import ConversionError
from anyprec.nn.backward import follow_precision
from anyprec.nn.bodies import body_of
from anyprec.nn.counting import run_body
from anyprec.nn.layers import QuantizedLayer
from anyprec.nn.modes import FunctionMode
from anyprec.nn.operators import operands, operator_of
from anyprec.nn.products import PRODUCTS, product_operands
from anyprec.nn.specialize import Specialized, despecialize, specialize


class FunctionalOwner(Specialized):
    """Mixin of a module in whose forward weights are used without calling a layer that holds them.

    Attributes:
        functional_layers: Paths, relative to the module, of the layers whose weights it uses.
    """

    class_prefix: ClassVar[str] = "QuantizedOwner"

    _anyprec_added: ClassVar[tuple[str, ...]] = ("functional_layers",)

    functional_layers: tuple[str, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original forward, with those weights and what they multiply quantized."""
        intercepted: dict[int, QuantizedLayer] = {}
        for path in self.functional_layers:
            layer = self.get_submodule(path)
            if not isinstance(layer, QuantizedLayer):
                continue
            follow_precision(layer)
            if layer.is_intercepted:
                _require_weight_itself(layer, path)
                intercepted[id(layer.weight)] = layer
        if not intercepted:
            return super().forward(*args, **kwargs)
        with _OwnerInterceptor(intercepted):
            return super().forward(*args, **kwargs)


class _OwnerInterceptor(FunctionMode):
    """Hands every operator that multiplies a layer's weight to that layer.

    Args:
        layers: The layers, by the id of their weight.
    """

    def __init__(self, layers: dict[int, QuantizedLayer]) -> None:
        super().__init__()
        self.layers = layers

    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if operator_of(func) is not None:
            input_, weight = operands(args, kwargs)
            layer = self._layer_of(weight)
            if layer is not None:
                return layer.run_operator(func, args, kwargs, input_, weight)
        elif func in PRODUCTS:
            return self._run_product(func, args, kwargs)
        else:
            body = body_of(func, args, kwargs)
            if body is not None:
                # torch switched this mode off for the call: on again, to see the operators inside.
                return run_body(self, body, args, kwargs)
        return func(*args, **kwargs)

    def _run_product(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A matrix product, in which either factor can be the weight."""
        factors = product_operands(func, args, kwargs)
        if len(factors) == 2:
            first, second = factors
            for weight, input_ in ((first, second), (second, first)):
                layer = self._layer_of(weight)
                if layer is not None:
                    return layer.run_operator(func, args, kwargs, input_, weight)
        return func(*args, **kwargs)

    def _layer_of(self, weight: Tensor) -> QuantizedLayer | None:
        """The layer whose weight this is, or is a view of."""
        layer = self.layers.get(id(weight))
        if layer is not None:
            return layer
        base = weight._base  # noqa: SLF001 (torch has no public name for it)
        if base is None:
            return None
        return self.layers.get(id(base))


def _require_weight_itself(layer: QuantizedLayer, path: str) -> None:
    """Refuse a weight that is computed at each access: its uses could not be told from others.

    Raises:
        ConversionError: The layer was parametrized after conversion.
    """
    if "parametrizations" in layer._modules:  # noqa: SLF001 (no public name)
        msg = f"layer {path!r} was parametrized after conversion, but its weight is used without "
        msg += "calling it: take that back by torch.nn.utils.parametrize.remove_parametrizations"
        raise ConversionError(msg)


def intercept_in_owner(owner: nn.Module, functional_layers: tuple[str, ...]) -> None:
    """Turn a module into a `FunctionalOwner` of the layers at these relative paths, in place."""
    specialize(owner, FunctionalOwner)
    vars(owner)["functional_layers"] = functional_layers


def restore_owner(owner: FunctionalOwner) -> None:
    """Undo `intercept_in_owner`."""
    vars(owner).pop("functional_layers", None)
    despecialize(owner)

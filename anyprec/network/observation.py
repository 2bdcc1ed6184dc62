"""One real forward pass on an example input, with every operator watched.

It tells what happens in a network, traceable or not: in which operators each weight meets an input, how often, at
what cost, in which module; which products have no weight; and what of all this depends on the network's input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from anyprec.errors import ConversionError
from anyprec.nn.operators import (
    BODIES,
    HIDING,
    LAYER_TYPES,
    OPERATORS,
    PRODUCTS,
    body_of,
    matrix_path,
    operands,
    product_macs,
    product_operands,
    tensors_in,
)


@dataclass(frozen=True)
class Use:
    """One operator in which a weight met an input.

    Attributes:
        module: Path of the innermost module that was running.
        macs: Multiply-accumulates, for the whole batch.
        rows: The operand is the weight or some of its rows, or a tensor of such a shape.
        axis: Axis of the weight that holds the output channels, or None.
        varies: The input depends on the network's input.
        dynamic: So does the weight operand.
        derived: The operand is neither the weight nor a view of it, but was made from it.
    """

    module: str
    macs: int
    rows: bool
    axis: int | None
    varies: bool
    dynamic: bool
    derived: bool


@dataclass
class Observation:
    """What one forward pass showed.

    Attributes:
        samples: Samples in the example input.
        uses: Path of a weight to its uses. The path is that of a Conv or Linear layer, of another module that makes
            its operand from a weight of its own, or `HOLDER.matrices.NAME` for a bare parameter of a module.
        parameters: Path of a bare parameter's uses to the parameter's own path.
        hidden: Path of a weight to the function that hides its operators.
        uncounted: Costs that belong to no weight: name to calls and MACs of the whole batch.
        order: Paths in order of use.
        fed: Path of a BatchNorm to the path of the layer whose output it takes, or None.
    """

    samples: int
    uses: dict[str, list[Use]]
    parameters: dict[str, str]
    hidden: dict[str, str]
    uncounted: dict[str, tuple[int, int]]
    order: list[str]
    fed: dict[str, str | None]


def observe(model: nn.Module, example_input: Tensor) -> Observation:
    """Run `model`, which is in eval mode, once. Its parameters and buffers are left as they were.

    Raises:
        ConversionError: The network does not run on `example_input`.
    """
    watcher = _Watcher(model, example_input)
    modules = {id(module): module for module in model.modules()}.values()
    hooks = [module.register_forward_pre_hook(watcher.enter_module) for module in modules]
    hooks += [
        module.register_forward_hook(watcher.leave_module, always_call=True) for module in modules
    ]
    devices = [example_input.device] if example_input.is_cuda else []
    try:
        with torch.random.fork_rng(devices), torch.no_grad(), watcher:
            model(example_input)
    except (
        RuntimeError,
        ValueError,
        TypeError,
        AssertionError,
        IndexError,
        AttributeError,
    ) as error:
        shape = tuple(example_input.shape)
        msg = f"{type(model).__name__} does not run on an example input of shape {shape} ({error}): pass one that fits "
        msg += "as example_input="
        raise ConversionError(msg) from error
    finally:
        for hook in hooks:
            hook.remove()
    return watcher.seen


def named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of every Conv and Linear layer."""
    return (
        (path, module) for path, module in model.named_modules() if isinstance(module, LAYER_TYPES)
    )


class _Watcher(TorchFunctionMode):
    """Records every operator of one forward pass, with the module that it runs in."""

    def __init__(self, model: nn.Module, example_input: Tensor) -> None:
        super().__init__()
        self.seen = Observation(example_input.shape[0], {}, {}, {}, {}, [], {})
        self.stack: list[tuple[str, nn.Module]] = []
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._layer_of = {id(layer.weight): path for path, layer in named_layers(model)}
        self._bare = {
            id(parameter): name
            for name, parameter in model.named_parameters()
            if id(parameter) not in self._layer_of and parameter.ndim > 1
        }
        self._producer: Any = WeakIdKeyDictionary()
        self._varying: Any = WeakIdKeyDictionary({example_input: True})

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        body = body_of(func, args)
        if body is not None:
            with self:
                return body(*args, **kwargs)
        varies = any(tensor in self._varying for tensor in tensors_in((*args, *kwargs.values())))
        result = func(*args, **kwargs)
        if func in OPERATORS:
            self._record_operator(func, args, kwargs, result)
        elif func in PRODUCTS:
            self._record_product(func, args, kwargs, result)
        elif func in HIDING or func in BODIES:
            self._record_hidden(args, kwargs, HIDING.get(func) or func.__name__)
        elif func is F.batch_norm:
            self._record_norm(args[0] if args else kwargs["input"])
        if func is F.scaled_dot_product_attention:
            self._add("scaled_dot_product_attention", _attention_macs(args, kwargs))
        elif func in _NORM_FUNCTIONS and not self._standardising():
            self._add(func.__name__, 0)
        if varies:
            changed = (
                args[:1] if result is None else (result,)
            )  # `tensor[index] = value` returns nothing
            self._varying.update(dict.fromkeys(tensors_in(changed), True))
        return result

    def enter_module(self, module: nn.Module, _args: Any) -> None:
        """Forward pre-hook: `module` starts."""
        self.stack.append((self._paths[id(module)], module))

    def leave_module(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        """Forward hook: the innermost module ends."""
        self.stack.pop()

    def _record_operator(
        self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any], result: Tensor
    ) -> None:
        input_, weight = operands(args, kwargs)
        macs = OPERATORS[func].macs(input_, weight, result)
        path, source = self._source(weight)
        derived = path is None
        running, module = self.stack[-1] if self.stack else ("", None)
        own: Any = getattr(module, "weight", None)
        if isinstance(module, LAYER_TYPES) and (path is None or source is own):
            path, source = (
                running,
                own,
            )  # it may derive the operand from its weight (standardisation)
        elif (
            path is None
            and running
            and module is not None
            and _is_matrix(own)
            and not any(named_layers(module))
        ):
            path, source = (
                running,
                own,
            )  # so may another module (a mixture of experts), if all in it is its own doing
        if path is None:
            self._add(
                "weight of no layer, in " + (type(module).__name__ if module else "the network"),
                macs,
            )
            return
        rows = (
            source is not None
            and weight.ndim == source.ndim
            and weight.shape[1:] == source.shape[1:]
        )
        axis = OPERATORS[func].channel_axis if rows else None
        self._use(path, macs, input_, weight, rows=rows, axis=axis, derived=derived)
        self._producer[result] = path

    def _record_product(
        self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any], result: Any
    ) -> None:
        if self._standardising():
            return
        factors = product_operands(func, args, kwargs)
        macs = product_macs(func, args, factors, result)
        for place, factor in enumerate(factors):
            path, source = self._source(factor)
            if source is not None and path is not None and len(factors) == 2:
                axis = _product_axis(source, factor, place) if func is not torch.einsum else None
                self._use(path, macs, factors[1 - place], factor, rows=True, axis=axis)
                return
        self._add(getattr(func, "__name__", str(func)).strip("_"), macs)

    def _use(
        self,
        path: str,
        macs: int,
        input_: Tensor,
        weight: Tensor,
        *,
        rows: bool,
        axis: int | None,
        derived: bool = False,
    ) -> None:
        running = self.stack[-1][0] if self.stack else ""
        varies, dynamic = input_ in self._varying, weight in self._varying
        use = Use(running, macs, rows, axis, varies=varies, dynamic=dynamic, derived=derived)
        self.seen.uses.setdefault(path, []).append(use)
        self.seen.order.append(path)

    def _source(self, operand: Tensor) -> tuple[str | None, Tensor | None]:
        """Path and parameter of the weight that `operand` is, or is a view of."""
        for tensor in (operand, operand._base):  # noqa: SLF001 (torch has no public name for it)
            if tensor is None:
                continue
            if id(tensor) in self._layer_of:
                return self._layer_of[id(tensor)], tensor
            if id(tensor) in self._bare:
                return self._bare_path(tensor), tensor
        return None, None

    def _bare_path(self, parameter: Tensor) -> str:
        name = self._bare[id(parameter)]
        path = matrix_path(name)
        self.seen.parameters[path] = name
        return path

    def _record_hidden(self, args: Any, kwargs: dict[str, Any], where: str) -> None:
        for tensor in tensors_in((*args, *kwargs.values())):
            path, _ = self._source(tensor)
            if path is not None:
                self.seen.hidden[path] = where
        self._add(where, 0)

    def _record_norm(self, input_: Tensor) -> None:
        if self.stack and isinstance(self.stack[-1][1], _BatchNorm):
            self.seen.fed[self.stack[-1][0]] = self._producer.get(input_)

    def _standardising(self) -> bool:
        """Whether what runs belongs to a layer's own arithmetic on its weight."""
        return bool(self.stack) and isinstance(self.stack[-1][1], LAYER_TYPES)

    def _add(self, name: str, macs: int) -> None:
        calls, total = self.seen.uncounted.get(name, (0, 0))
        self.seen.uncounted[name] = calls + 1, total + macs


_NORM_FUNCTIONS = {F.batch_norm, F.layer_norm, F.group_norm, F.instance_norm, F.rms_norm}


def _is_matrix(weight: Any) -> bool:
    return isinstance(weight, nn.Parameter) and weight.ndim > 1


def _product_axis(parameter: Tensor, factor: Tensor, place: int) -> int | None:
    """Axis of a matrix that holds the output channels, if it or its transpose is the factor at `place` of two."""
    if parameter.ndim != 2 or factor.numel() != parameter.numel() or factor.ndim != 2:
        return None
    transposed = factor.stride() != parameter.stride()
    return place if not transposed else 1 - place


def _attention_macs(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    query, key, value = (
        args[:3] if len(args) > 2 else (kwargs[name] for name in ("query", "key", "value"))
    )
    tokens = query.numel() // query.shape[-1]
    return int(query.numel() * key.shape[-2] + tokens * key.shape[-2] * value.shape[-1])

"""One real forward pass on an example input, with every operator watched.

It shows what happens in a network, traceable or not: in which operators each weight multiplies an
input, how often, at what cost, in which module; which products have no weight; and what of all this
depends on the network's input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
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


@dataclass
class WeightUse:
    """All operators in which one weight multiplied an input.

    Attributes:
        calls: How many there were.
        macs: Multiply-accumulates over all of them, for the whole batch.
        modules: Path of the innermost module that was running, for each call.
        axes: Axes of the weight that held the output channels; None stands for no such axis.
        only_rows: Every operand was the weight or some of its rows, or a tensor of such a shape.
        varies: An input depended on the network's input.
        dynamic: So did a weight operand.
        derived: An operand was neither the weight nor a view of it, but was made from it.
    """

    calls: int = 0
    macs: int = 0
    modules: list[str] = field(default_factory=list)
    axes: set[int | None] = field(default_factory=set)
    only_rows: bool = True
    varies: bool = False
    dynamic: bool = False
    derived: bool = False


@dataclass
class Observation:
    """What one forward pass showed.

    Attributes:
        samples: Samples in the example input.
        parameters: Path of each bare parameter as a layer (`HOLDER.matrices.NAME`) to its path as a
            parameter (`HOLDER.NAME`).
        uses: Path of a weight to its use. The path is that of a Conv or Linear layer, of another
            module that makes its operand from a weight of its own, or of a bare parameter.
        hidden: Path of a weight to the function that hides its operators.
        uncounted: Costs that belong to no weight: name to calls and MACs of the whole batch.
        order: Paths of weights in order of use.
        fed: Path of a BatchNorm to the path of the layer whose output it takes, or None.
    """

    samples: int
    parameters: dict[str, str]
    uses: dict[str, WeightUse] = field(default_factory=dict)
    hidden: dict[str, str] = field(default_factory=dict)
    uncounted: dict[str, tuple[int, int]] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    fed: dict[str, str | None] = field(default_factory=dict)


def observe(model: nn.Module, example_input: Tensor) -> Observation:
    """Run `model`, which is in eval mode, once. Its parameters and buffers are left as they were.

    Raises:
        ConversionError: The network does not run on `example_input`.
    """
    watcher = _Watcher(model, example_input)
    hooks = []
    for module in model.modules():
        hooks.append(module.register_forward_pre_hook(watcher.enter_module))
        hooks.append(module.register_forward_hook(watcher.leave_module, always_call=True))
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
        msg = f"{type(model).__name__} does not run on an example input of shape "
        msg += f"{tuple(example_input.shape)} ({error}): pass one that fits as example_input="
        raise ConversionError(msg) from error
    finally:
        for hook in hooks:
            hook.remove()
    return watcher.observation


def named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of every Conv and Linear layer."""
    for path, module in model.named_modules():
        if isinstance(module, LAYER_TYPES):
            yield path, module


class _Weights:
    """Finds the weight that a tensor is, or is a view of."""

    def __init__(self, model: nn.Module) -> None:
        # By id, with the tensor itself: a parametrized weight is made on each access, and a tensor
        # that nothing holds would leave its id to another one.
        self._weights: dict[int, tuple[str, Tensor]] = {}
        self.parameters: dict[str, str] = {}
        for path, layer in named_layers(model):
            weight: Tensor = layer.weight  # type: ignore[assignment]
            self._weights[id(weight)] = path, weight
        for name, parameter in model.named_parameters():
            if id(parameter) not in self._weights and parameter.ndim > 1:
                path = matrix_path(name)
                self._weights[id(parameter)] = path, parameter
                self.parameters[path] = name

    def find(self, operand: Tensor) -> tuple[str, Tensor] | None:
        """Path and tensor of the weight that `operand` is, or is a view of."""
        for tensor in (operand, operand._base):  # noqa: SLF001 (torch has no public name for it)
            if tensor is not None and id(tensor) in self._weights:
                return self._weights[id(tensor)]
        return None


class _Watcher(TorchFunctionMode):
    """Records every operator of one forward pass, with the module that it runs in."""

    def __init__(self, model: nn.Module, example_input: Tensor) -> None:
        super().__init__()
        self._weights = _Weights(model)
        self.observation = Observation(example_input.shape[0], self._weights.parameters)
        self._module_paths = {id(module): path for path, module in model.named_modules()}
        # The modules that are running, the innermost last.
        self._running: list[tuple[str, nn.Module]] = [("", model)]
        # Tensors are keys by identity, and are not kept alive.
        self._producers: Any = WeakIdKeyDictionary()
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
        # Before the call, since it may change its arguments.
        varies = any(tensor in self._varying for tensor in tensors_in((*args, *kwargs.values())))
        result = func(*args, **kwargs)
        self._record(func, args, kwargs, result)
        if varies:
            # `tensor[index] = value` returns nothing and changes its first argument.
            changed = args[:1] if result is None else (result,)
            for tensor in tensors_in(changed):
                self._varying[tensor] = True
        return result

    def enter_module(self, module: nn.Module, _args: Any) -> None:
        """Forward pre-hook: `module` starts."""
        self._running.append((self._module_paths[id(module)], module))

    def leave_module(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        """Forward hook: the innermost module ends."""
        self._running.pop()

    def _record(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
    ) -> None:
        # Products and norms inside a layer belong to its arithmetic on its own weight.
        in_layer = isinstance(self._running[-1][1], LAYER_TYPES)
        if func in OPERATORS:
            self._record_operator(func, args, kwargs, result)
        elif func in PRODUCTS and not in_layer:
            self._record_product(func, args, kwargs, result)
        elif func in HIDING or func in BODIES:
            self._record_hidden(HIDING.get(func, func.__name__), (*args, *kwargs.values()))
        elif func is F.batch_norm:
            self._record_norm(args, kwargs)
        if func is F.scaled_dot_product_attention:
            self._add_uncounted(func.__name__, _attention_macs(*args, **kwargs))
        elif func in _NORM_FUNCTIONS and not in_layer:
            self._add_uncounted(func.__name__, 0)

    def _record_operator(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Tensor,
    ) -> None:
        input_, operand = operands(args, kwargs)
        operator = OPERATORS[func]
        macs = operator.macs(input_, operand, result)
        source = self._weight_behind(operand)
        if source is None:
            module = self._running[-1][1]
            kind = getattr(module, "original_class", type(module)).__name__
            self._add_uncounted(f"weight of no layer, in {kind}", macs)
            return
        path, weight = source
        use = self._add_use(path, macs, input_, operand)
        if operand.shape[1:] == weight.shape[1:]:
            use.axes.add(operator.channel_axis)
        else:
            use.axes.add(None)
            use.only_rows = False
        use.derived |= self._weights.find(operand) is None
        self._producers[result] = path

    def _weight_behind(self, operand: Tensor) -> tuple[str, Tensor] | None:
        """Path and weight of what the operand is, is a view of, or was made from."""
        source = self._weights.find(operand)
        running, module = self._running[-1]
        weight_of_module: Any = getattr(module, "weight", None)
        if isinstance(module, LAYER_TYPES):
            # A layer may make the operand from its weight (weight standardisation).
            if source is None or source[1] is weight_of_module:
                return running, weight_of_module
        elif source is None and running and _has_only_matrix(module):
            return running, weight_of_module
        return source

    def _record_product(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
    ) -> None:
        factors = product_operands(func, args, kwargs)
        macs = product_macs(func, args, factors, result)
        if len(factors) == 2:
            for index, factor in enumerate(factors):
                source = self._weights.find(factor)
                if source is None:
                    continue
                path, weight = source
                use = self._add_use(path, macs, factors[1 - index], factor)
                axis = None
                if func is not torch.einsum:
                    axis = _product_axis(weight, factor, index)
                use.axes.add(axis)
                return
        self._add_uncounted(getattr(func, "__name__", str(func)).strip("_"), macs)

    def _add_use(self, path: str, macs: int, input_: Tensor, operand: Tensor) -> WeightUse:
        """Add a call to the use of a weight; what else depends on the operator is the caller's."""
        use = self.observation.uses.setdefault(path, WeightUse())
        use.calls += 1
        use.macs += macs
        use.modules.append(self._running[-1][0])
        use.varies |= input_ in self._varying
        use.dynamic |= operand in self._varying
        self.observation.order.append(path)
        return use

    def _record_hidden(self, function: str, arguments: tuple[Any, ...]) -> None:
        for tensor in tensors_in(arguments):
            source = self._weights.find(tensor)
            if source is not None:
                self.observation.hidden[source[0]] = function
        self._add_uncounted(function, 0)

    def _record_norm(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        path, module = self._running[-1]
        if isinstance(module, _BatchNorm):
            input_ = args[0] if args else kwargs["input"]
            self.observation.fed[path] = self._producers.get(input_)

    def _add_uncounted(self, name: str, macs: int) -> None:
        calls, total = self.observation.uncounted.get(name, (0, 0))
        self.observation.uncounted[name] = calls + 1, total + macs


_NORM_FUNCTIONS = {F.batch_norm, F.layer_norm, F.group_norm, F.instance_norm, F.rms_norm}


def _has_only_matrix(module: nn.Module) -> bool:
    """Whether a module has a weight matrix, and no layer inside.

    Then an operand in it is made from that weight (a mixture of experts).
    """
    weight = getattr(module, "weight", None)
    is_matrix = isinstance(weight, nn.Parameter) and weight.ndim > 1
    return is_matrix and not any(named_layers(module))


def _product_axis(parameter: Tensor, factor: Tensor, index: int) -> int | None:
    """Axis of a matrix that holds the output channels, if it is one of two factors.

    Args:
        parameter: The matrix.
        factor: A view of it; None is returned unless that is the matrix itself or its transpose.
        index: 0 for the left factor, 1 for the right one.
    """
    if parameter.ndim != 2 or factor.numel() != parameter.numel() or factor.ndim != 2:
        return None
    transposed = factor.stride() != parameter.stride()
    return 1 - index if transposed else index


def _attention_macs(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    tokens = query.numel() // query.shape[-1]
    return int(query.numel() * key.shape[-2] + tokens * key.shape[-2] * value.shape[-1])

"""One real forward pass on an example input, with every operator watched.

It shows what happens in a network, traceable or not: in which operators each weight multiplies an
input, how often, at what cost, in which module; which products have no weight; and what of all this
depends on the network's input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import ParametrizationList

from anyprec.errors import ConversionError
from anyprec.network.flow import Flow, FlowTracker
from anyprec.network.output_search import Outputs
from anyprec.network.outputs import OutputTracker
from anyprec.network.preserving import left_as_it_was
from anyprec.network.readers import Readers, Reading, is_transformed, unwrapped
from anyprec.network.weights import Weights, named_layers
from anyprec.nn.bodies import BODIES, HIDING, body_of
from anyprec.nn.channels import Axis
from anyprec.nn.modes import FunctionMode
from anyprec.nn.operators import (
    LAYER_TYPES,
    Operator,
    matrix_path,
    operands,
    operator_of,
    tensors_in,
)
from anyprec.nn.products import PRODUCTS, product_axis, product_macs, product_operands


@dataclass
class WeightUse:
    """All operators in which one weight multiplied an input.

    Attributes:
        calls: How many there were.
        macs: Multiply-accumulates over all of them, for the whole batch.
        modules: Path of the innermost module that was running, for each call.
        axes: Where the weight held the output channels; None stands for no such axis.
        only_rows: Every operand was the weight or some of its rows, or a tensor of such a shape.
        varies: An input depended on the network's input.
        dynamic: So did a weight operand.
        derived: An operand was neither the weight nor a view of it, but was made from it.
    """

    calls: int = 0
    macs: int = 0
    modules: list[str] = field(default_factory=list)
    axes: set[Axis | None] = field(default_factory=set)
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
        readings: Path of any other weight that was read to what read it.
        uncounted: Costs that belong to no weight: name to calls and MACs of the whole batch.
        flow: How layers are connected.
        outputs: Values that can be quantized between layers; empty if nobody asked for them.
    """

    samples: int
    parameters: dict[str, str]
    uses: dict[str, WeightUse] = field(default_factory=dict)
    hidden: dict[str, str] = field(default_factory=dict)
    readings: dict[str, Reading] = field(default_factory=dict)
    uncounted: dict[str, tuple[int, int]] = field(default_factory=dict)
    flow: Flow = field(default_factory=Flow)
    outputs: Outputs = field(default_factory=Outputs)


def observe(model: nn.Module, example_input: Tensor, *, outputs: bool = False) -> Observation:
    """Run `model`, which is in eval mode, once. Nothing of what it remembers is left.

    Args:
        model: Any network.
        example_input: A batch that it takes.
        outputs: Look for values that can be quantized between layers, too.

    Raises:
        ConversionError: The network does not run on `example_input`, or one of those values could
            not be replaced.
    """
    # A copy, since a network may work in place.
    images = example_input.clone()
    watcher = _Watcher(model, images, outputs=outputs)
    try:
        with (
            left_as_it_was(model), torch.no_grad(), _watching_modules(model, watcher),
            watcher.flow.values, watcher.readers, watcher,
        ):  # fmt: skip
            output = model(images)
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
    watcher.note_readings()
    watcher.observation.flow = watcher.flow.finish(output)
    if watcher.outputs is not None:
        watcher.observation.outputs = watcher.outputs.finish(output)
    return watcher.observation


@contextmanager
def _watching_modules(model: nn.Module, watcher: _Watcher) -> Iterator[None]:
    """Hooks that tell a watcher which module runs."""
    hooks = []
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue  # takes no hooks: what runs in it counts for the module around it
        hooks.append(module.register_forward_pre_hook(watcher.enter_module, with_kwargs=True))
        hooks.append(module.register_forward_hook(watcher.leave_module, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Watcher(FunctionMode):
    """Records every operator of one forward pass, with the module that it runs in."""

    def __init__(self, model: nn.Module, example_input: Tensor, *, outputs: bool) -> None:
        super().__init__()
        self._weights = Weights(model)
        self.observation = Observation(example_input.shape[0], self._weights.parameters)
        self._module_paths = {id(module): path for path, module in model.named_modules()}
        # The modules that are running, the innermost last.
        self._running: list[tuple[str, nn.Module]] = [("", model)]
        self.readers = Readers(self._weights.rows)
        self.flow = FlowTracker(model, example_input)
        self.outputs = OutputTracker(model, self.flow.values) if outputs else None

    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call `func`, or what hides in it, and record what it does."""
        arguments = (*args, *kwargs.values())
        is_hidden = any(map(is_transformed, tensors_in(arguments)))
        body = body_of(func, args, kwargs)
        if body is not None and not is_hidden:
            return self._run_body(body, args, kwargs)
        if self.outputs is not None:
            self.outputs.function_starts(func, args, kwargs)
        is_recorded = not is_hidden and self._has_record(func, args, kwargs)
        with self.readers.within(func, arguments, counted=is_recorded):
            result = func(*args, **kwargs)
        if is_recorded:
            self._record_multiplication(func, args, kwargs, result)
        elif is_hidden:
            self._record_hidden(_TRANSFORMS, arguments, result)
        else:
            self._record(func, args, kwargs, result)
        self.flow.function_ran(func, args, result)
        if self.outputs is not None:
            return self.outputs.function_ends(args, result)
        return result

    def _run_body(
        self, body: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run a function operator by operator, and watch these."""
        if self.outputs is not None:
            self.outputs.body_starts()
        with self:
            result = body(*args, **kwargs)
        if self.outputs is not None:
            self.outputs.body_ends()
        return result

    def enter_module(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Forward pre-hook: `module` starts."""
        path = self._module_paths[id(module)]
        self._running.append((path, module))
        self.flow.module_starts(path, module, next(iter((*args, *kwargs.values())), None))
        if self.outputs is not None:
            self.outputs.module_starts(path, module)

    def leave_module(self, module: nn.Module, _args: Any, output: Any) -> None:
        """Forward hook: the innermost module ends."""
        path, _ = self._running.pop()
        self.flow.module_ends(path, module, output)
        if self.outputs is not None:
            self.outputs.module_ends()

    def note_readings(self) -> None:
        """After the forward pass: take over what read parameters besides what was recorded."""
        observation, readers = self.observation, self.readers
        for path, reading in readers.readings.items():
            if path not in observation.uses or path in observation.hidden:
                observation.readings[path] = reading
            elif reading.macs:
                # Of a weight that is quantized elsewhere: these products run in floating point.
                self._add_uncounted(f"{path} in {', '.join(reading.functions)}", reading.macs)
        for name, (calls, macs) in readers.uncounted.items():
            self._add_uncounted(name, macs, calls=calls)

    def _has_record(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> bool:
        """Whether it is a multiplication that is recorded, with its MACs."""
        if func not in PRODUCTS:
            return operator_of(func) is not None or func is F.scaled_dot_product_attention
        modules = [module for _, module in self._running]
        if any(isinstance(module, ParametrizationList) for module in modules):
            return False
        if not isinstance(modules[-1], LAYER_TYPES):
            return True
        # Products inside a layer belong to its arithmetic on its own weight, unless another
        # parameter multiplies what depends on the input.
        factors = product_operands(func, args, kwargs)
        sources = [self._weights.find(factor) for factor in factors]
        is_bare = any(source and source[0] in self._weights.parameters for source in sources)
        return is_bare and any(map(self.flow.values.varies, factors))

    def _record_multiplication(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
    ) -> None:
        if func in PRODUCTS:
            self._record_product(func, args, kwargs, result)
        elif func is F.scaled_dot_product_attention:
            self._add_uncounted(func.__name__, _attention_macs(*args, **kwargs))
        else:
            self._record_operator(func, args, kwargs, result)

    def _record(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Any
    ) -> None:
        if func in BODIES or func in HIDING:
            function = HIDING.get(func, func.__name__)
            self._record_hidden(function, (*args, *kwargs.values()), result)
        if func in _NORM_FUNCTIONS and not isinstance(self._running[-1][1], LAYER_TYPES):
            self._add_uncounted(func.__name__, 0)

    def _record_operator(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Tensor,
    ) -> None:
        input_, operand = operands(args, kwargs)
        operator = operator_of(func) or Operator()
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
            use.axes.add(operator.output_axis(args, kwargs))
        else:
            use.axes.add(None)
            use.only_rows = False
        use.derived |= self._weights.find(operand) is None
        self._note_layer(path, input_, operand, result)

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
            # If nothing has read that weight, the operand was made from another one.
            was_read = matrix_path(f"{running}.weight") in self.readers.readings
            return (running, weight_of_module) if was_read else None
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
                axis = product_axis(
                    func, args, kwargs, parameter=weight, factor=factor, index=index
                )
                use.axes.add(axis)
                self._note_layer(path, factors[1 - index], factor, result)
                return
        self._add_uncounted(getattr(func, "__name__", str(func)).strip("_"), macs)

    def _note_layer(self, path: str, input_: Tensor, weight: Tensor, result: Any) -> None:
        """Note a call of a layer for those who follow values."""
        self.flow.layer_ran(path, input_, weight, result)
        if self.outputs is not None:
            self.outputs.layer_ran(path, input_)

    def _add_use(self, path: str, macs: int, input_: Tensor, operand: Tensor) -> WeightUse:
        """Add a call to the use of a weight; what else depends on the operator is the caller's."""
        use = self.observation.uses.setdefault(path, WeightUse())
        use.calls += 1
        use.macs += macs
        use.modules.append(self._running[-1][0])
        use.varies |= self.flow.values.varies(input_)
        use.dynamic |= self.flow.values.varies(operand)
        return use

    def _record_hidden(self, function: str, arguments: tuple[Any, ...], result: Any) -> None:
        tensors = list(tensors_in(arguments))
        paths = []
        for tensor in tensors:
            source = self._weights.find(unwrapped(tensor))
            if source is not None:
                self.observation.hidden[source[0]] = function
                paths.append(source[0])
        self.flow.layers_ran(paths, tensors, result)
        self._add_uncounted(function, 0)

    def _add_uncounted(self, name: str, macs: int, *, calls: int = 1) -> None:
        calls_before, total = self.observation.uncounted.get(name, (0, 0))
        self.observation.uncounted[name] = calls_before + calls, total + macs


_TRANSFORMS = "a transform of torch.func (vmap, grad)"

_NORM_FUNCTIONS = {F.batch_norm, F.layer_norm, F.group_norm, F.instance_norm, F.rms_norm}


def _has_only_matrix(module: nn.Module) -> bool:
    """Whether a module has a weight matrix, and no layer inside.

    Then an operand in it is made from that weight (a mixture of experts).
    """
    weight = getattr(module, "weight", None)
    is_matrix = isinstance(weight, nn.Parameter) and weight.ndim > 1
    return is_matrix and not any(named_layers(module))


def _attention_macs(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    tokens = query.numel() // query.shape[-1]
    return int(query.numel() * key.shape[-2] + tokens * key.shape[-2] * value.shape[-1])

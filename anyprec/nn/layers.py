"""Quantized layers: what runs at any of several bit-widths.

A quantized Conv or Linear layer is the float layer itself with a derived class (see
`specialize.py`). Its forward runs the forward of the original class unchanged and intercepts the
one operator that multiplies the input by the weight (`F.conv2d`, `F.linear`, ...): there the two
operands are replaced by their fake-quantized values. So no bias, dilation, padding mode, SAME
padding or weight standardisation is reimplemented, and a standardised weight is quantized after it
was standardised. Where the forward is known to do nothing else, it gets the quantized operands at
once (`layer_stand_ins.py`), which is faster.

Not here: bare parameters (`matrices.py`), weights that are used without calling their layer
(`owners.py`), where a quantized weight comes from (`weights.py`), which layers a network has
(`network/analysis.py`), and the operators (`operators.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from anyprec.bits import Bits, LayerCandidates
from anyprec.nn.backward import BackwardGuard, follow_precision
from anyprec.nn.bodies import body_of
from anyprec.nn.channels import Axis, channel_count
from anyprec.nn.chosen import Chosen
from anyprec.nn.counting import run_body, uncounted
from anyprec.nn.grids import GridRule
from anyprec.nn.joint_operands import quantize_input, quantize_operands
from anyprec.nn.layer_stand_ins import input_of_stand_in, stand_in_for
from anyprec.nn.modes import FunctionMode
from anyprec.nn.observers import Observers
from anyprec.nn.operators import LAYER_TYPES, OPERATORS, operands
from anyprec.nn.outputs import OUTPUTS, OutputQuantizer
from anyprec.nn.packed import PackedOperand, stand_in
from anyprec.nn.quantizers import InputQuantizer, WeightQuantizer
from anyprec.nn.recomputation import recomputing
from anyprec.nn.shared import input_quantizer_of
from anyprec.nn.specialize import Specialized, despecialize, specialize
from anyprec.nn.weights import LatentWeight, PackedCodes, WeightSource

PACKED = "packed_operand"
"""Child of a packed layer that holds its integer codes."""

_ADDED_CHILDREN = ("weight_quantizer", "input_quantizer", "chosen", PACKED)

_ADDED_ATTRIBUTES = (
    "weight_source",
    "backward_guard",
    "operand_observers",
    "output_observers",
    "_weight_index",
    "_input_index",
    "_bits",
    "_active",
)


class QuantizedLayer(nn.Module):
    """What has a precision: a weight that multiplies an input.

    Each of the two is quantized at one of its candidate bit-widths, or neither.

    Attributes:
        weight: The latent float weight, under its old name.
        weight_quantizer: Step sizes of the weight, a row per candidate.
        input_quantizer: Step sizes and zero points of the input, an entry per candidate.
        weight_source: Where the quantized weight comes from.
        chosen: For compiled networks, indices of the active candidates (`weight`, `input`).
        operand_observers: Called with every float input and weight operand, in floating point, too.
        output_observers: Called with every output of the operator at a quantized precision.
    """

    weight: Tensor
    weight_quantizer: WeightQuantizer
    input_quantizer: InputQuantizer
    weight_source: WeightSource
    chosen: Chosen
    backward_guard: BackwardGuard | None = None
    operand_observers: Observers
    output_observers: Observers
    _bits: Bits | None
    _weight_index: int
    _input_index: int
    # Compiled networks read this and not `_bits`: other bits do not compile them anew.
    _active: bool

    @property
    def candidates(self) -> LayerCandidates:
        """The bit-widths that this layer may take."""
        return LayerCandidates(self.weight_quantizer.candidates, self.input_quantizer.candidates)

    @property
    def bits(self) -> Bits | None:
        """The active precision; None is floating point."""
        return self._bits

    @property
    def weight_index(self) -> int:
        """Index of the weight's active candidate.

        Compiled networks never read it, since each value would be a program of its own.
        """
        return self._weight_index

    @property
    def input_index(self) -> int:
        """Index of the input's active candidate; compiled networks never read it either."""
        return self._input_index

    @property
    def is_intercepted(self) -> bool:
        """Whether its operator must be intercepted."""
        return self._active or bool(self.operand_observers)

    def switch(self, bits: Bits | None) -> None:
        """Make `bits`, which must be among the candidates, the active precision."""
        weight_index, input_index = self._weight_index, self._input_index
        if bits is not None:
            weight_index = self.weight_quantizer.candidates.index(bits.weight)
            input_index = self.input_quantizer.candidates.index(bits.activation)
            self.chosen.choose(weight=weight_index, input=input_index)
        write_precision(vars(self), bits, weight_index, input_index)

    def run_operator(
        self,
        operator: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        input_: Tensor,
        weight: Tensor,
    ) -> Any:
        """Call `operator` with `input_` and `weight`, which are among its arguments, quantized."""
        # Quantizing would turn bytes into numbers where the float operator refuses them.
        if not self._active or not input_.is_floating_point():
            if self.operand_observers:
                self.operand_observers.notify(input_, _whole(weight, self.weight))
            return operator(*args, **kwargs)
        quantized_input, quantized_weight = self.quantized_operands(input_, weight)

        # By identity, since operators take their operands by position, by name or in a list.
        def replaced(value: Any) -> Any:
            if value is input_:
                return quantized_input
            if value is weight:
                return quantized_weight
            if type(value) in (tuple, list):
                return type(value)(map(replaced, value))
            return value

        args = tuple(map(replaced, args))
        kwargs = {name: replaced(value) for name, value in kwargs.items()}
        with _saving_no_weight(self, quantized_weight, weight, input_):
            result = operator(*args, **kwargs)
        if self.output_observers:
            self.output_observers.notify(result)
        return result

    def quantized_operands(self, input_: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Fake-quantized input and weight at the active precision, shown to observers before."""
        if self.operand_observers:
            self.operand_observers.notify(input_, _whole(weight, self.weight))
        with uncounted():
            if torch.compiler.is_compiling():
                quantized_input = self.input_quantizer.forward_selected(input_, self.chosen.input)
                return quantized_input, self.quantized_operand(weight)
            source = self.weight_source
            # Past nn.Module.__getattr__, which is slow.
            input_quantizer: Any = self._modules["input_quantizer"]
            if weight is self._parameters.get("weight") and source.only_quantizes(self, weight):
                weight_quantizer: Any = self._modules["weight_quantizer"]
                operands_ = quantize_operands(
                    *(input_quantizer, input_, self._input_index),
                    *(weight_quantizer, weight, self._weight_index),
                    source.prepared,
                )
                if operands_ is not None:
                    return operands_
            quantized_input = quantize_input(input_quantizer, input_, self._input_index)
            return quantized_input, self.quantized_operand(weight)

    def quantized_operand(self, weight: Tensor) -> Tensor:
        """Fake-quantized `weight`: the latent weight, a view of it, or a tensor made of it."""
        whole = _whole(weight, self.weight)
        quantized = self.quantized_weight(whole)
        if whole is weight:
            return quantized
        # Step sizes belong to the whole weight: that was quantized, now the same view of it.
        offset = weight.storage_offset() - whole.storage_offset() + quantized.storage_offset()
        return quantized.as_strided(weight.shape, weight.stride(), offset)

    def quantized_weight(self, weight: Tensor) -> Tensor:
        """Fake-quantized `weight`: in eval mode without gradients, it is computed only once."""
        return self.weight_source.quantized(self, weight)

    def weight_codes(self, index: int, operand: Tensor | None = None) -> Tensor:
        """Integer codes at the weight candidate at `index`, in the shape of the operand.

        Args:
            index: Of the candidate.
            operand: The float weight operand, by default the weight. A packed layer ignores it.
        """
        if operand is None:
            operand = self.weight
        return self.weight_source.codes(self.weight_quantizer, index, operand)

    def weight_tensors(self) -> list[Tensor]:
        """The tensors that the weight operand is made of: it changes when one of them does."""
        tensors = [*self._parameters.values(), *self._buffers.values()]
        # torch's parametrizations keep the weight's factors in children.
        for name, child in self._modules.items():
            if child is not None and name not in (*_ADDED_CHILDREN, OUTPUTS):
                tensors += [*child.parameters(), *child.buffers()]
        return [tensor for tensor in tensors if tensor is not None]

    def replace_weight(self, weight: nn.Parameter) -> None:
        """Put another parameter in the place of the weight."""
        self.weight = weight

    def train(self, mode: bool = True) -> Any:  # noqa: FBT001, FBT002 (the signature of nn.Module)
        """Set training mode, and drop the quantized weights that were kept."""
        self.weight_source.forget()
        return super().train(mode)


def write_precision(
    attributes: dict[str, Any], bits: Bits | None, weight_index: int, input_index: int
) -> None:
    """Make this the precision of a layer, by its attributes; its `chosen` is written by the caller.

    Past nn.Module.__setattr__, which takes ten times as long: networks have many layers.
    """
    attributes["_weight_index"], attributes["_input_index"] = weight_index, input_index
    attributes["_bits"], attributes["_active"] = bits, bits is not None


class QuantizedModule(QuantizedLayer, Specialized):
    """Mixin of a Conv or Linear layer, or of a module that makes its operand from its weight."""

    class_prefix: ClassVar[str] = "Quantized"

    _anyprec_added: ClassVar[tuple[str, ...]] = (*_ADDED_CHILDREN, *_ADDED_ATTRIBUTES)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original layer's forward, with the operands of its operator quantized."""
        follow_precision(self)
        if not self.is_intercepted:
            return super().forward(*args, **kwargs)
        if self._active and not torch.compiler.is_compiling():
            forward: Any = super().forward
            input_ = input_of_stand_in(self, forward, args, kwargs)
            if input_ is not None:
                return _run_stand_in(self, forward.__func__, input_)
        with _LayerInterceptor(self):
            return super().forward(*args, **kwargs)


def _run_stand_in(layer: QuantizedModule, forward: Callable[..., Any], input_: Tensor) -> Any:
    """Call the original `forward` of a layer with the quantized input and weight."""
    # Past nn.Module.__getattr__, which is slow.
    weight: Any = layer._parameters["weight"]  # noqa: SLF001
    quantized_input, quantized_weight = layer.quantized_operands(input_, weight)
    stand_in = stand_in_for(layer, quantized_weight)
    with _saving_no_weight(layer, quantized_weight, weight, input_):
        result = forward(stand_in, quantized_input)
    if layer.output_observers:
        layer.output_observers.notify(result)
    return result


class _LayerInterceptor(FunctionMode):
    """Hands the operator in a layer's forward to the layer."""

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        self.layer = layer

    def run(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in OPERATORS:
            input_, weight = operands(args, kwargs)
            if not _is_foreign(weight, self.layer):
                return self.layer.run_operator(func, args, kwargs, input_, weight)
        elif (body := body_of(func, args, kwargs)) is not None:
            return run_body(self, body, args, kwargs)
        return func(*args, **kwargs)


def quantize_layer(
    layer: nn.Module,
    candidates: LayerCandidates,
    *,
    nonnegative: bool,
    axis: Axis | None,
    dynamic: bool = False,
    rule: GridRule | None = None,
    trunk: OutputQuantizer | None = None,
) -> None:
    """Turn a layer into a `QuantizedModule`, in place, in floating point until switched.

    Args:
        layer: An instance of `LAYER_TYPES`, or another module with one operator whose operand its
            `weight` makes.
        candidates: The bit-widths that it may take.
        nonnegative: Its input cannot be negative.
        axis: Output channels of the weight operand, with a step size each; None for one step size.
        dynamic: The weight operand may change with the input.
        rule: What is allowed of the input's grid; None is any.
        trunk: What quantizes the values that it reads before it does; None if nothing does.
    """
    # What another module makes of its weight can be anything, so it counts as dynamic.
    source = LatentWeight(dynamic=dynamic or not isinstance(layer, LAYER_TYPES))
    add_precision(
        layer, candidates, source, nonnegative=nonnegative, axis=axis, rule=rule, trunk=trunk
    )
    specialize(layer, QuantizedModule)


def add_precision(
    layer: nn.Module,
    candidates: LayerCandidates,
    source: WeightSource,
    *,
    nonnegative: bool,
    axis: Axis | None,
    rule: GridRule | None = None,
    trunk: OutputQuantizer | None = None,
) -> None:
    """Give a module with a `weight` what else a `QuantizedLayer` has, in floating point."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    if axis is None:
        weight_quantizer = WeightQuantizer(candidates.weight, channels=None)
    else:
        channels = channel_count(weight.shape, axis)
        weight_quantizer = WeightQuantizer(candidates.weight, channels=channels, axis=axis)
    weight_quantizer.to(weight.device).initialize(weight)
    input_quantizer = input_quantizer_of(
        candidates.activation, nonnegative=nonnegative, rule=rule, trunk=trunk
    )
    layer.weight_quantizer = weight_quantizer.train(layer.training)
    layer.input_quantizer = input_quantizer.to(weight.device).train(layer.training)
    chosen = Chosen("weight", "input", device=weight.device)
    layer.chosen = chosen.train(layer.training)
    vars(layer).update(
        weight_source=source,
        _weight_index=0,
        _input_index=0,
        operand_observers=Observers(),
        output_observers=Observers(),
        _bits=None,
        _active=False,
    )


def pack_layer(
    layer: QuantizedLayer, operand: PackedOperand, *, dtype: torch.dtype, derives: bool
) -> None:
    """Let a layer hold these integer codes from now on, and no latent weight.

    Args:
        layer: The layer, in place.
        operand: The codes, on the layer's device.
        dtype: Of the latent weight, and of the quantized ones.
        derives: The layer makes its operand from the weight in every forward pass.
    """
    shape, device = tuple(operand.points.shape), operand.points.device
    layer.replace_weight(stand_in(shape, dtype, device, derives=derives))
    # Another step size would need other points.
    layer.weight_quantizer.requires_grad_(requires_grad=False)
    hold_codes(layer, operand)


def hold_codes(layer: QuantizedLayer, operand: PackedOperand) -> None:
    """Give a packed layer these codes in place of those that it has."""
    layer.add_module(PACKED, operand.train(layer.training))
    vars(layer)["weight_source"] = PackedCodes(operand)


def restore_layer(layer: QuantizedModule) -> None:
    """Undo `quantize_layer`."""
    del layer.weight_quantizer, layer.input_quantizer, layer.chosen
    for name in _ADDED_ATTRIBUTES:
        vars(layer).pop(name, None)
    despecialize(layer)


def _whole(operand: Tensor, latent: Tensor) -> Tensor:
    """The latent weight, if `operand` is a view of it; else `operand`."""
    if operand is not latent and operand._base is latent:  # noqa: SLF001 (torch has no public name)
        return latent
    return operand


def _is_foreign(operand: Tensor, layer: nn.Module) -> bool:
    """Whether an operand in a layer is another parameter (of an adapter), a layer of its own."""
    parameters = dict(layer._parameters)  # noqa: SLF001 (`named_parameters` is slow)
    # A parametrized layer has none of this name.
    weight = parameters.pop("weight", None)
    if operand is weight:
        return False
    base = operand._base if operand._base is not None else operand  # noqa: SLF001 (as in `_whole`)
    if not isinstance(base, nn.Parameter) or base is weight:
        return False
    return weight is not None or any(base is parameter for parameter in parameters.values())


def _saving_no_weight(
    layer: QuantizedLayer, quantized: Tensor, weight: Tensor, input_: Tensor
) -> AbstractContextManager[Any]:
    """Let the operator save no quantized weight for its backward pass, which makes it again.

    Saved, it would be a tensor of the size of the weight for each layer. Beside a large input,
    which the operator saves as well, a small weight is saved all the same, since that is faster.
    """
    source = layer.weight_source
    if torch.compiler.is_compiling() or not isinstance(source, LatentWeight):
        return nullcontext()
    if not (torch.is_grad_enabled() and quantized.requires_grad):
        return nullcontext()
    if not source.recomputes(quantized, input_):
        return nullcontext()
    operand = _whole(weight, layer.weight)
    quantizer = layer.weight_quantizer
    index = layer.weight_index  # of the forward pass: the bits may be others in the backward pass
    return recomputing(
        quantized,
        lambda: source.compute(quantizer, operand.detach(), index),
        (operand, quantizer.step),
    )

"""Quantized layers: what runs at any of several bit-widths, and the interception that makes it do so.

A quantized Conv or Linear layer is the float layer itself with a derived class (see `specialize.py`). Its forward runs
the forward of the original class unchanged and intercepts the one operator in which the weight meets the input
(`F.conv2d`, `F.linear`, ...): there the two operands are replaced by their fake-quantized values. So bias, dilation,
padding mode, SAME padding and weight standardisation are never typed again, and a standardised weight is quantized
after it was standardised. The same interception in an *owner* covers weights that are used without calling a layer:
`F.linear(x, self.qkv.weight)` in timm's EVA, BEiT and Swin-V2, rows of a weight, the packed projection of
`nn.MultiheadAttention`, the matrices of an LSTM, a bare parameter in a matrix product.

Which layers exist, and what they are fed, is found in `graph.py`; the operators are in `operators.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from anyprec.bits import Bits, LayerCandidates
from anyprec.errors import ConversionError, PackedError
from anyprec.nn.functional import match_moments
from anyprec.nn.operators import (
    LAYER_TYPES,
    MATRICES,
    OPERATORS,
    PRODUCTS,
    body_of,
    operands,
    product_operands,
)
from anyprec.nn.packed import NO_LATENTS, PackedOperand, stand_in
from anyprec.nn.quantizers import InputQuantizer, WeightQuantizer
from anyprec.nn.recomputation import recomputing
from anyprec.nn.specialize import Specialized, despecialize, specialize

PACKED = "packed_operand"
"""Child of a packed layer that holds its integer codes."""


class QuantizedLayer(nn.Module):
    """What has a precision: a weight that meets an input, each quantized at one of its candidate bit-widths.

    Attributes:
        weight: The latent float weight, under its old name.
        weight_quantizer: Step sizes of the weight, a row per candidate.
        input_quantizer: Step sizes and zero points of the input, an entry per candidate.
        observer: If set, it is called with every float input and weight operand (calibration, training).
        output_observer: If set, it is called with every output of the operator (training).
    """

    weight: Tensor
    weight_quantizer: WeightQuantizer
    input_quantizer: InputQuantizer
    observer: Callable[[Tensor, Tensor], None] | None
    output_observer: Callable[[Tensor], None] | None
    _bits: Bits | None
    _active: bool  # compiled networks look at nothing else, so that they need not be compiled anew for other bits
    _dynamic: bool
    _corrected_axis: int | None
    _weight_cache: dict[int, tuple[tuple[int, ...], Tensor]]
    _weight_index: int
    _input_index: int

    @property
    def candidates(self) -> LayerCandidates:
        """The bit-widths that this layer may take."""
        return LayerCandidates(self.weight_quantizer.candidates, self.input_quantizer.candidates)

    @property
    def bits(self) -> Bits | None:
        """The active precision; None is floating point."""
        return self._bits

    @property
    def packed(self) -> PackedOperand | None:
        """The integer codes that stand in the place of the latent weight; None where that exists."""
        return self._modules.get(PACKED)  # type: ignore[return-value]

    @property
    def is_dynamic(self) -> bool:
        """Whether the weight operand may change with the input."""
        return self._dynamic

    @property
    def corrected_axis(self) -> int | None:
        """Axis of the channels whose mean and spread are those of the latent weight; None without correction."""
        return self._corrected_axis

    @property
    def is_intercepted(self) -> bool:
        """Whether its operator must be intercepted."""
        return self._active or self.observer is not None

    def switch(self, bits: Bits | None) -> None:
        """Make `bits`, which must be among the candidates, the active precision."""
        if bits is not None:
            weight, input_ = self.weight_quantizer, self.input_quantizer
            weight_index, input_index = (
                weight.candidates.index(bits.weight),
                input_.candidates.index(bits.activation),
            )
            weight.select(weight_index)
            input_.select(input_index)
            vars(self).update(_weight_index=weight_index, _input_index=input_index)
        vars(self).update(
            _bits=bits, _active=bits is not None
        )  # nn.Module takes ten times as long to set an attribute

    def run_operator(
        self,
        operator: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        input_: Tensor,
        weight: Tensor,
    ) -> Any:
        """Call `operator` with `input_` and `weight`, which are among its arguments, quantized."""
        if self.observer is not None:
            self.observer(input_, self.weight if self._is_view(weight) else weight)
        if not self._active:
            return operator(*args, **kwargs)
        if torch.compiler.is_compiling():
            quantized_input = self.input_quantizer.forward_selected(input_)
        else:
            quantized_input = self.input_quantizer(input_, self._input_index)
        quantized = quantized_input, self.quantized_operand(weight)

        def replaced(value: Any) -> Any:
            if isinstance(value, Tensor):
                return (
                    quantized[0] if value is input_ else quantized[1] if value is weight else value
                )
            return type(value)(map(replaced, value)) if type(value) in (tuple, list) else value

        with self._recomputing(quantized[1], weight):
            result = operator(
                *map(replaced, args), **{name: replaced(value) for name, value in kwargs.items()}
            )
        if self.output_observer is not None:
            self.output_observer(result)
        return result

    def quantized_operand(self, weight: Tensor) -> Tensor:
        """Fake-quantized `weight`, which is the latent weight, a view of it, or a tensor made of it."""
        if not self._is_view(weight):
            return self.quantized_weight(weight)
        whole = self.quantized_weight(self.weight)
        offset = weight.storage_offset() - self.weight.storage_offset() + whole.storage_offset()
        return whole.as_strided(weight.shape, weight.stride(), offset)

    def _recomputing(self, quantized: Tensor, weight: Tensor) -> AbstractContextManager[Any]:
        """Let the operator save no quantized weight: a weight-sized tensor for each layer, which is cheap to make again."""
        if (
            not (torch.is_grad_enabled() and quantized.requires_grad)
            or torch.compiler.is_compiling()
        ):
            return nullcontext()
        index = self._weight_index
        source = self.weight if self._is_view(weight) else weight
        return recomputing(
            quantized,
            lambda: self._quantize(source.detach(), index),
            (source, self.weight_quantizer.step),
        )

    def quantized_weight(self, weight: Tensor) -> Tensor:
        """Fake-quantized `weight`; in eval mode without gradients it is computed once for each bit-width."""
        if self.packed is not None:
            return self._unpacked(self.packed)
        if torch.compiler.is_compiling():
            return self._corrected(self.weight_quantizer.forward_selected(weight), weight)
        index = self._weight_index
        needs_gradient = torch.is_grad_enabled() and (
            weight.requires_grad or self.weight_quantizer.step.requires_grad
        )
        if self.training or needs_gradient or self._dynamic:
            return self._quantize(weight, index)
        stamp = self._weight_stamp()
        if stamp is None:
            return self._quantize(weight, index)
        cached = self._weight_cache.get(index)
        if cached is None or cached[0] != stamp:
            # Outside inference mode, so that the cached tensor stays usable when gradients are wanted later.
            with torch.inference_mode(mode=False), torch.no_grad():
                cached = (
                    stamp,
                    self._quantize(weight.clone() if weight.is_inference() else weight, index),
                )
            self._weight_cache[index] = cached
        return cached[1]

    def weight_codes(self, index: int, operand: Tensor | None = None) -> Tensor:
        """Integer codes at the weight candidate at `index`, in the shape of the operand.

        Args:
            index: Place of the candidate.
            operand: The float weight operand; not used by a packed layer.
        """
        if self.packed is None:
            return self.weight_quantizer.codes(self.weight if operand is None else operand, index)
        qmin, qmax = self.weight_quantizer.limits(index)
        return self.packed.codes(index, qmin=qmin, qmax=qmax).to(torch.int32)

    def pack(self, operand: PackedOperand, *, dtype: torch.dtype, derives: bool) -> None:
        """Hold these integer codes from now on, and no latent weight.

        Args:
            operand: The codes, on the layer's device.
            dtype: Of the latent weight, and of the quantized ones.
            derives: The layer makes its operand from the weight in every forward pass.
        """
        holder, name = self._weight_place()
        # By setattr, since an LSTM keeps a list of its weights.
        setattr(
            holder,
            name,
            stand_in(tuple(operand.points.shape), dtype, operand.points.device, derives=derives),
        )
        self.add_module(PACKED, operand.train(self.training))
        self.weight_quantizer.requires_grad_(
            requires_grad=False
        )  # another step size would need other points
        self._weight_cache.clear()

    def forget_weights(self) -> None:
        """Drop the quantized weights that are kept."""
        self._weight_cache.clear()

    def correct_moments(self, axis: int) -> None:
        """From now on give each channel of the quantized weight the mean and spread of the latent one."""
        self._corrected_axis = axis

    def _unpacked(self, packed: PackedOperand) -> Tensor:
        """The quantized weight of the active candidate; no other is kept, so that memory does not grow with use."""
        if self.training:
            msg = f"a packed layer cannot run in training mode; {NO_LATENTS}"
            raise PackedError(msg)
        index, stamp = self._weight_index, self._weight_stamp()
        cached = self._weight_cache.get(index)
        if cached is None or stamp is None or cached[0] != stamp:
            self._weight_cache.clear()
            qmin, qmax = self.weight_quantizer.limits(index)
            step, dtype = self.weight_quantizer.step[index], self.weight.dtype
            with torch.inference_mode(mode=False), torch.no_grad():
                cached = stamp or (), packed.weight(index, step, qmin=qmin, qmax=qmax, dtype=dtype)
            self._weight_cache[index] = cached
        return cached[1]

    def _quantize(self, weight: Tensor, index: int) -> Tensor:
        return self._corrected(self.weight_quantizer(weight, index), weight)

    def _corrected(self, quantized: Tensor, weight: Tensor) -> Tensor:
        axis = self._corrected_axis
        return quantized if axis is None else match_moments(quantized, weight, axis=axis)

    def train(self, mode: bool = True) -> Any:  # noqa: FBT001, FBT002 (the signature of nn.Module)
        """Set training mode; entering it drops the quantized weights that were kept."""
        self._weight_cache.clear()
        return super().train(mode)

    def _is_view(self, weight: Tensor) -> bool:
        latent = self.weight
        return weight is not latent and weight._base is latent  # noqa: SLF001 (torch has no public name for it)

    def _weight_sources(self) -> list[Tensor | None]:
        """What the weight operand is made of."""
        if self.packed is not None:
            return list(self.packed.buffers())
        sources: list[Tensor | None] = [*self._parameters.values(), *self._buffers.values()]
        if len(self._modules) > 2:  # torch's parametrizations keep the weight's factors in children
            sources += [*self.parameters(), *self.buffers()]
        return sources

    def _weight_place(self) -> tuple[nn.Module, str]:
        """The module that has the weight, and its name there."""
        return self, "weight"

    def _weight_stamp(self) -> tuple[int, ...] | None:
        """What changes whenever the quantized weight would; None where that cannot be known."""
        stamp: list[int] = []
        for source in (*self._weight_sources(), self.weight_quantizer.step):
            if source is None:
                continue
            if source.is_inference():
                return None
            stamp += (source.data_ptr(), source._version)  # noqa: SLF001 (torch has no public name for it)
        return tuple(stamp)


class QuantizedModule(QuantizedLayer, Specialized):
    """Mixin of a Conv or Linear layer, or of a module that makes its operand from a weight of its own."""

    class_prefix: ClassVar[str] = "Quantized"
    _transient: ClassVar[dict[str, Any]] = {"_weight_cache": {}}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original layer's forward, with the operands of its operator quantized."""
        if not self._active and self.observer is None:
            return super().forward(*args, **kwargs)
        with _LayerInterceptor(self):
            return super().forward(*args, **kwargs)


class QuantizedParameter(QuantizedLayer):
    """What quantizes a bare parameter of a module, e.g. `in_proj_weight` of `nn.MultiheadAttention`.

    It is a child of that module's `matrices` and holds no copy of the parameter, which keeps its name and place.

    Args:
        holder: The module whose parameter it is.
        name: The parameter's name in it.
    """

    def __init__(self, holder: nn.Module, name: str) -> None:
        super().__init__()
        vars(self)["_holder"] = (
            holder  # past nn.Module, which would make the holder a child of its child
        )
        self._name = name

    @property
    def holder(self) -> nn.Module:
        """The module whose parameter it is."""
        return vars(self)["_holder"]  # type: ignore[no-any-return]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The parameter."""
        return self.holder.get_parameter(self._name)

    def extra_repr(self) -> str:
        """The parameter's name, for `print(model)`."""
        return self._name

    def _weight_sources(self) -> list[Tensor | None]:
        return [self.weight] if self.packed is None else super()._weight_sources()

    def _weight_place(self) -> tuple[nn.Module, str]:
        return self.holder, self._name

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_weight_cache": {}}


class FunctionalOwner(Specialized):
    """Mixin of a module in whose forward weights are used without calling a layer that holds them.

    Attributes:
        functional_layers: Paths, relative to the module, of the layers whose weights it uses.
    """

    class_prefix: ClassVar[str] = "QuantizedOwner"

    functional_layers: tuple[str, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original forward, with the operators that meet those weights quantized as their layers would."""
        layers = [self.get_submodule(path) for path in self.functional_layers]
        active = {
            id(layer.weight): layer
            for layer in layers
            if isinstance(layer, QuantizedLayer) and layer.is_intercepted
        }
        if not active:
            return super().forward(*args, **kwargs)
        with _OwnerInterceptor(active):
            return super().forward(*args, **kwargs)


class _LayerInterceptor(TorchFunctionMode):
    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        self.layer = layer

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in OPERATORS:
            return self.layer.run_operator(func, args, kwargs or {}, *operands(args, kwargs or {}))
        return func(*args, **(kwargs or {}))


class _OwnerInterceptor(TorchFunctionMode):
    def __init__(self, layers: dict[int, QuantizedLayer]) -> None:
        super().__init__()
        self.layers = layers

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in OPERATORS:
            input_, weight = operands(args, kwargs)
            layer = self._layer_of(weight)
            if layer is not None:
                return layer.run_operator(func, args, kwargs, input_, weight)
        elif func in PRODUCTS:
            factors = product_operands(func, args, kwargs)
            for weight, input_ in (
                zip(factors, reversed(factors), strict=True) if len(factors) == 2 else ()
            ):
                layer = self._layer_of(weight)
                if layer is not None:
                    return layer.run_operator(func, args, kwargs, input_, weight)
        else:
            body = body_of(func, args)
            if body is not None:
                with self:
                    return body(*args, **kwargs)
        return func(*args, **kwargs)

    def _layer_of(self, weight: Tensor) -> QuantizedLayer | None:
        layer = self.layers.get(id(weight))
        base = weight._base if layer is None else None  # noqa: SLF001 (torch has no public name for it)
        return layer if base is None else self.layers.get(id(base))


class Matrices(nn.ModuleDict):
    """Holds a `QuantizedParameter` for every quantized parameter of its parent, by the parameter's name."""


def quantize_layer(
    layer: nn.Module,
    candidates: LayerCandidates,
    *,
    nonnegative: bool,
    axis: int | None,
    dynamic: bool = False,
) -> None:
    """Turn a layer into a `QuantizedModule`, in place, in floating point until switched.

    Args:
        layer: An instance of `LAYER_TYPES`, or another module with one operator whose operand its `weight` makes.
        candidates: The bit-widths that it may take.
        nonnegative: Its input cannot be negative.
        axis: Axis of the weight operand with a step size for each index; None for one step size.
        dynamic: The weight operand may change with the input.
    """
    weight: Tensor = layer.weight  # type: ignore[assignment]
    quantizers = _quantizers(weight, candidates, nonnegative=nonnegative, axis=axis)
    specialize(layer, QuantizedModule)
    vars(layer).update(
        _DORMANT, _weight_cache={}, _dynamic=dynamic or not isinstance(layer, LAYER_TYPES)
    )
    layer.weight_quantizer, layer.input_quantizer = quantizers
    for quantizer in quantizers:
        quantizer.train(layer.training)


def quantize_parameter(
    holder: nn.Module, name: str, candidates: LayerCandidates, *, axis: int | None
) -> None:
    """Make a bare parameter of `holder` a quantized layer, in place, in floating point until switched.

    It is found as the child `matrices.NAME` of `holder`; see `QuantizedParameter`.

    Args:
        holder: The module that has the parameter.
        name: The parameter's name in it.
        candidates: The bit-widths that it may take.
        axis: Axis of the parameter with a step size for each index; None for one step size.

    Raises:
        ConversionError: `holder` has an attribute `matrices` that is not ours.
    """
    layer = QuantizedParameter(holder, name)
    vars(layer).update(_DORMANT, _weight_cache={}, _dynamic=False)
    layer.weight_quantizer, layer.input_quantizer = _quantizers(
        layer.weight, candidates, nonnegative=False, axis=axis
    )
    present = getattr(holder, MATRICES, None)
    if present is not None and not isinstance(present, Matrices):
        msg = f"{type(holder).__name__} has an attribute {MATRICES!r} of its own, which is where the step sizes of its "
        msg += f"parameter {name!r} would stand: exclude that parameter or rename the attribute"
        raise ConversionError(msg)
    matrices = present or Matrices()
    matrices.add_module(name, layer)
    holder.add_module(MATRICES, matrices.train(holder.training))


def _quantizers(
    weight: Tensor, candidates: LayerCandidates, *, nonnegative: bool, axis: int | None
) -> tuple[WeightQuantizer, InputQuantizer]:
    channels = None if axis is None else weight.shape[axis]
    weight_quantizer = WeightQuantizer(candidates.weight, channels=channels, axis=axis or 0).to(
        weight.device
    )
    weight_quantizer.initialize(weight)
    input_quantizer = InputQuantizer(candidates.activation, nonnegative=nonnegative)
    return weight_quantizer, input_quantizer.to(weight.device)


def restore_layer(layer: QuantizedModule) -> None:
    """Undo `quantize_layer`."""
    del layer.weight_quantizer, layer.input_quantizer
    for name in (*_DORMANT, "_dynamic", "_weight_cache", "_weight_index", "_input_index"):
        vars(layer).pop(name, None)
    despecialize(layer)


def restore_parameters(holder: nn.Module) -> None:
    """Undo every `quantize_parameter` of `holder`."""
    if isinstance(getattr(holder, MATRICES, None), Matrices):
        delattr(holder, MATRICES)


def intercept_in_owner(owner: nn.Module, functional_layers: tuple[str, ...]) -> None:
    """Turn a module into a `FunctionalOwner` of the layers at these relative paths, in place."""
    specialize(owner, FunctionalOwner)
    vars(owner)["functional_layers"] = functional_layers


def restore_owner(owner: FunctionalOwner) -> None:
    """Undo `intercept_in_owner`."""
    vars(owner).pop("functional_layers", None)
    despecialize(owner)


_DORMANT: dict[str, Any] = {
    "observer": None, "output_observer": None, "_bits": None, "_active": False, "_corrected_axis": None,
}  # fmt: skip

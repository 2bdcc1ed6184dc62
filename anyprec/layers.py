"""Quantized layers, and the table of operators that a layer may use its weight in.

A quantized layer is the float layer itself with a derived class (see `specialize.py`). Its forward runs the forward
of the original class unchanged and intercepts the one operator in which the weight meets the input (`F.conv2d`,
`F.linear`, ...): there the two operands are replaced by their fake-quantized values. So bias, dilation, padding mode,
SAME padding and weight standardisation are never typed again, and a standardised weight is quantized after it was
standardised. The same interception in an *owner* covers weights that are used without calling their layer
(`F.linear(x, self.qkv.weight)` in timm's EVA, BEiT and Swin-V2).

Which layers exist, and what they are fed, is found in `graph.py`; this file only executes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from anyprec.bits import Bits, LayerCandidates
from anyprec.quantizer import InputQuantizer, WeightQuantizer
from anyprec.specialize import Specialized, despecialize, specialize


@dataclass(frozen=True)
class Operator:
    """What anyprec needs to know of an operator that multiplies an input by a weight.

    Attributes:
        channel_axis: Axis of the weight that holds (a group's) output channels.
        transposed: Whether each input element, not each output element, meets one slice of the weight.
    """

    channel_axis: int = 0
    transposed: bool = False

    def macs(self, input_: Tensor, weight: Tensor, output: Tensor) -> int:
        """Multiply-accumulates of one call, for the whole batch."""
        if self.transposed:
            return input_.numel() * (weight.numel() // weight.shape[0])
        return output.numel() * (weight.numel() // weight.shape[0])


OPERATORS: dict[Callable[..., Any], Operator] = {
    F.linear: Operator(),
    F.conv1d: Operator(),
    F.conv2d: Operator(),
    F.conv3d: Operator(),
    F.conv_transpose1d: Operator(channel_axis=1, transposed=True),
    F.conv_transpose2d: Operator(channel_axis=1, transposed=True),
    F.conv_transpose3d: Operator(channel_axis=1, transposed=True),
}
"""Every operator whose operands can be quantized."""

LAYER_TYPES = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
"""Classes that, with all their subclasses, count as Conv/Linear layers."""


def channel_axis(layer: nn.Module) -> int:
    """Axis of the layer's weight that holds the output channels."""
    transposed = isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    return 1 if transposed else 0


def operands(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Input and weight of a call of one of `OPERATORS`, however they were passed."""
    input_ = args[0] if args else kwargs["input"]
    weight = args[1] if len(args) > 1 else kwargs["weight"]
    return input_, weight


class QuantizedLayer(Specialized):
    """Mixin of a Conv or Linear layer that runs at any of its candidate bit-widths, or in floating point.

    Attributes:
        weight: The latent float weight, under its old name.
        weight_quantizer: Step sizes of the weight, a row per candidate.
        input_quantizer: Step sizes and zero points of the input, an entry per candidate.
        observer: If set, it is called with every float input and weight operand (calibration).
    """

    class_prefix: ClassVar[str] = "Quantized"
    _transient: ClassVar[dict[str, Any]] = {"_weight_cache": {}}

    weight: Tensor
    weight_quantizer: WeightQuantizer
    input_quantizer: InputQuantizer
    observer: Callable[[Tensor, Tensor], None] | None
    _bits: Bits | None
    _weight_cache: dict[int, tuple[tuple[int, ...], Tensor]]

    @property
    def candidates(self) -> LayerCandidates:
        """The bit-widths that this layer may take."""
        return LayerCandidates(self.weight_quantizer.candidates, self.input_quantizer.candidates)

    @property
    def bits(self) -> Bits | None:
        """The active precision; None is floating point."""
        return self._bits

    def switch(self, bits: Bits | None) -> None:
        """Make `bits`, which must be among the candidates, the active precision."""
        if bits is not None:
            self._weight_index = self.weight_quantizer.candidates.index(bits.weight)
            self._input_index = self.input_quantizer.candidates.index(bits.activation)
        self._bits = bits

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original layer's forward, with the operands of its operator quantized."""
        if self._bits is None and self.observer is None:
            return super().forward(*args, **kwargs)
        with _LayerInterceptor(self):
            return super().forward(*args, **kwargs)

    def run_operator(self, operator: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call `operator` with its input and weight quantized at the active precision."""
        input_, weight = operands(args, kwargs)
        if self.observer is not None:
            self.observer(input_, weight)
        if self._bits is None:
            return operator(*args, **kwargs)
        quantized = (self.input_quantizer(input_, self._input_index), self.quantized_weight(weight))
        rest = {name: value for name, value in kwargs.items() if name not in {"input", "weight"}}
        return operator(*quantized, *args[2:], **rest)

    def quantized_weight(self, weight: Tensor) -> Tensor:
        """Fake-quantized `weight`; in eval mode without gradients it is computed once for each bit-width."""
        index = self._weight_index
        needs_gradient = torch.is_grad_enabled() and (weight.requires_grad or self.weight_quantizer.step.requires_grad)
        if self.training or needs_gradient or torch.compiler.is_compiling():
            return self.weight_quantizer(weight, index)  # type: ignore[no-any-return]
        stamp = self._weight_stamp()
        if stamp is None:
            return self.weight_quantizer(weight, index)  # type: ignore[no-any-return]
        cached = self._weight_cache.get(index)
        if cached is None or cached[0] != stamp:
            # Outside inference mode, so that the cached tensor stays usable when gradients are wanted later.
            with torch.inference_mode(mode=False), torch.no_grad():
                cached = stamp, self.weight_quantizer(weight.clone() if weight.is_inference() else weight, index)
            self._weight_cache[index] = cached
        return cached[1]

    def train(self, mode: bool = True) -> Any:  # noqa: FBT001, FBT002 (the signature of nn.Module)
        """Set training mode; entering it drops the quantized weights that were kept."""
        self._weight_cache.clear()
        return super().train(mode)

    def _weight_stamp(self) -> tuple[int, ...] | None:
        """What changes whenever the quantized weight would; None where that cannot be known."""
        sources = [*self._parameters.values(), *self._buffers.values(), self.weight_quantizer.step]
        stamp: list[int] = []
        for source in sources:
            if source is None:
                continue
            if source.is_inference():
                return None
            stamp += (source.data_ptr(), source._version)  # noqa: SLF001 (torch has no public name for it)
        return tuple(stamp)


class FunctionalOwner(Specialized):
    """Mixin of a module whose forward uses the weights of its layers without calling these layers.

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
            if isinstance(layer, QuantizedLayer) and (layer.bits is not None or layer.observer is not None)
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
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in OPERATORS:
            return self.layer.run_operator(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


class _OwnerInterceptor(TorchFunctionMode):
    def __init__(self, layers: dict[int, QuantizedLayer]) -> None:
        super().__init__()
        self.layers = layers

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in OPERATORS:
            layer = self.layers.get(id(operands(args, kwargs or {})[1]))
            if layer is not None:
                return layer.run_operator(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def quantize_layer(layer: nn.Module, candidates: LayerCandidates, *, nonnegative: bool, per_channel: bool) -> None:
    """Turn a Conv or Linear layer into a `QuantizedLayer`, in place, in floating point until switched.

    Args:
        layer: An instance of `LAYER_TYPES`.
        candidates: The bit-widths that it may take.
        nonnegative: Its input cannot be negative.
        per_channel: One weight step size per output channel instead of one per tensor.
    """
    weight: Tensor = layer.weight  # type: ignore[assignment]
    axis = channel_axis(layer)
    channels = weight.shape[axis] if per_channel else None
    weight_quantizer = WeightQuantizer(candidates.weight, channels=channels, axis=axis)
    weight_quantizer.initialize(weight)
    input_quantizer = InputQuantizer(candidates.activation, nonnegative=nonnegative)
    specialize(layer, QuantizedLayer)
    layer.weight_quantizer = weight_quantizer.to(weight.device)
    layer.input_quantizer = input_quantizer.to(weight.device)
    layer.weight_quantizer.train(layer.training)
    layer.input_quantizer.train(layer.training)
    vars(layer).update(observer=None, _bits=None, _weight_cache={})


def restore_layer(layer: QuantizedLayer) -> None:
    """Undo `quantize_layer`."""
    del layer.weight_quantizer, layer.input_quantizer
    for name in ("observer", "_bits", "_weight_cache", "_weight_index", "_input_index"):
        vars(layer).pop(name, None)
    despecialize(layer)


def intercept_in_owner(owner: nn.Module, functional_layers: tuple[str, ...]) -> None:
    """Turn a module into a `FunctionalOwner` of the layers at these relative paths, in place."""
    specialize(owner, FunctionalOwner)
    vars(owner)["functional_layers"] = functional_layers


def restore_owner(owner: FunctionalOwner) -> None:
    """Undo `intercept_in_owner`."""
    vars(owner).pop("functional_layers", None)
    despecialize(owner)

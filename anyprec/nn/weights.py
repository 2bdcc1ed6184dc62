"""Where the quantized weight of a layer comes from: a latent float weight, or stored integer codes.

Every quantized layer (`layers.py`) has one `WeightSource` as its attribute `weight_source`. It is a
plain object and no `nn.Module`, so that it adds nothing to state dicts; the tensors stay where they
are, in the layer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from anyprec.errors import PackedError
from anyprec.nn.channels import Axis
from anyprec.nn.kept import Kept, Record, Values, is_comparable, record_of
from anyprec.nn.moments import match_moments, moments
from anyprec.nn.packed import NO_LATENTS, PackedOperand

if TYPE_CHECKING:
    from anyprec.nn.joint_operands import Prepared
    from anyprec.nn.layers import QuantizedLayer
    from anyprec.nn.quantizers import WeightQuantizer


Recompute = Literal["auto", "always", "never"]
"""Which quantized weights are computed again in the backward pass: see `recompute_weights`."""

_SMALL_BESIDE_INPUT = 4
"""A weight is small beside an input that has at least as many times its elements."""

_SMALL_WEIGHT = 16_384
"""A weight of as many elements is small beside anything: 64 KiB in float32."""


class WeightSource(ABC):
    """Gives the quantized weight of one layer, and keeps what it computed while that is valid.

    Copies and pickles leave out what is kept, and are not trusted: a copy may be a moving average.

    Attributes:
        dynamic: The weight operand may change with the input, so nothing can be kept.
        corrected_axis: Where the output channels are whose mean and spread are those of the latent
            weight (`match_moments`); None without this correction.
        prepared: What was found of the layer's tensors: see `joint_operands.py`.
        trusted: What is kept is valid as long as torch records no change of the weight; its values
            are not compared.
    """

    def __init__(self, *, dynamic: bool, corrected_axis: Axis | None) -> None:
        self.dynamic = dynamic
        self.corrected_axis = corrected_axis
        self.trusted = False
        self.prepared: dict[int, Prepared] = {}
        self._cache: dict[int, Kept] = {}

    def only_quantizes(self, layer: QuantizedLayer, operand: Tensor) -> bool:  # noqa: ARG002
        """Whether `quantized` is what the quantizer makes of the operand now, and nothing else."""
        return False

    @abstractmethod
    def quantized(self, layer: QuantizedLayer, operand: Tensor) -> Tensor:
        """The quantized weight at the active candidate.

        Args:
            layer: The layer that this is the source of.
            operand: The float weight operand as the layer made it, of the shape of its weight.
        """

    @abstractmethod
    def codes(self, quantizer: WeightQuantizer, index: int, operand: Tensor) -> Tensor:
        """Integer codes at the weight candidate at `index`, int32, in the shape of `operand`."""

    @abstractmethod
    def moments(self, operand: Tensor) -> tuple[Tensor, Tensor] | None:
        """Mean and spread of each channel of the float operand; None without their correction."""

    def forget(self) -> None:
        """Drop the quantized weights that are kept, and what was found of their tensors."""
        self._cache.clear()
        self.prepared.clear()

    def _recorded(self, index: int, record: Record | None) -> Kept | None:
        """What is kept for a candidate, if torch's record of its tensors is this one."""
        # Looked up once: another thread may drop it.
        kept = self._cache.get(index)
        if record is None or kept is None or kept.record != record:
            return None
        return kept

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "trusted": False, "prepared": {}, "_cache": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Those pickled before there was one have none.
        vars(self).update({"prepared": {}, **state})


class LatentWeight(WeightSource):
    """Quantizes a float weight; in eval mode without gradients, only when it has changed.

    Args:
        dynamic: As for `WeightSource`.

    Attributes:
        recompute: Whether the backward pass computes the quantized weight again, instead of that
            the forward pass keeps it.
    """

    # A class attribute besides, for layers pickled before there was one.
    recompute: Recompute = "auto"

    def __init__(self, *, dynamic: bool) -> None:
        super().__init__(dynamic=dynamic, corrected_axis=None)
        self.recompute = "auto"

    def only_quantizes(self, layer: QuantizedLayer, operand: Tensor) -> bool:
        """See `WeightSource`."""
        if self.corrected_axis is not None:
            return False
        # What may be kept is not quantized in every pass.
        may_be_kept = not layer.training and (self.trusted or operand.device.type == "cpu")
        return not may_be_kept or torch.is_grad_enabled()

    def recomputes(self, quantized: Tensor, input_: Tensor) -> bool:
        """Whether a quantized weight that multiplies this input is computed again for backward."""
        if self.recompute != "auto":
            return self.recompute == "always"
        elements = quantized.numel()
        return elements > _SMALL_WEIGHT and _SMALL_BESIDE_INPUT * elements > input_.numel()

    def quantized(self, layer: QuantizedLayer, operand: Tensor) -> Tensor:
        """See `WeightSource`; differentiable in the operand and the step size."""
        quantizer = layer.weight_quantizer
        if torch.compiler.is_compiling():
            # Neither the index nor a stamp may be read: each value would be a program of its own.
            chosen = layer.chosen.weight
            return self._corrected(quantizer.forward_selected(operand, chosen), operand)
        index, step = layer.weight_index, quantizer.step
        record = None
        if not layer.training and self._can_keep(operand, step):
            record = _record(layer, operand, step)
        if record is None:
            return self.compute(quantizer, operand, index)
        kept = self._recorded(index, record)
        if kept is not None and self._is_current(kept, operand):
            return kept.quantized
        values = None if self.trusted else Values.of(operand, step[index])
        # Outside inference mode, so that the kept tensor is usable when gradients are wanted.
        with torch.inference_mode(mode=False), torch.no_grad():
            if operand.is_inference():
                operand = operand.clone()
            quantized = self.compute(quantizer, operand, index)
        self._cache[index] = Kept(quantized, record, values)
        return quantized

    def _can_keep(self, operand: Tensor, step: Tensor) -> bool:
        """Whether nothing learns, and a later change would be seen or is not to be expected."""
        learns = torch.is_grad_enabled() and (operand.requires_grad or step.requires_grad)
        if learns or self.dynamic:
            return False
        return self.trusted or is_comparable(operand)

    def _is_current(self, kept: Kept, operand: Tensor) -> bool:
        """Whether the operand and the step sizes have the values that they had."""
        if self.trusted:
            return True
        return kept.values is not None and kept.values.are_of(operand)

    def compute(self, quantizer: WeightQuantizer, operand: Tensor, index: int) -> Tensor:
        """Quantize `operand` at the candidate at `index`; nothing is kept."""
        return self._corrected(quantizer(operand, index), operand)

    def codes(self, quantizer: WeightQuantizer, index: int, operand: Tensor) -> Tensor:
        """See `WeightSource`."""
        return quantizer.codes(operand, index)

    def moments(self, operand: Tensor) -> tuple[Tensor, Tensor] | None:
        """See `WeightSource`."""
        if self.corrected_axis is None:
            return None
        return moments(operand, axis=self.corrected_axis)

    def _corrected(self, quantized: Tensor, operand: Tensor) -> Tensor:
        if self.corrected_axis is None:
            return quantized
        return match_moments(quantized, operand, axis=self.corrected_axis)


def _record(layer: QuantizedLayer, operand: Tensor, step: Tensor) -> Record | None:
    """Torch's record of all that a quantized weight is made of: weights change without notice."""
    if layer._parameters.get("weight") is operand:  # noqa: SLF001 (past nn.Module.__getattr__)
        return record_of((operand, step))
    # Perhaps made of others (weight standardisation, parametrizations).
    return record_of((*layer.weight_tensors(), step))


class PackedCodes(WeightSource):
    """Dequantizes the integer codes of a packed layer, which has no float weight.

    Args:
        operand: The codes. They are a child of the layer, too, for the sake of its state dict.
    """

    def __init__(self, operand: PackedOperand) -> None:
        super().__init__(dynamic=False, corrected_axis=operand.moments_axis)
        self.operand = operand

    def quantized(self, layer: QuantizedLayer, operand: Tensor) -> Tensor:  # noqa: ARG002
        """See `WeightSource`; `operand` has no values and is not used.

        Raises:
            PackedError: The layer is in training mode.
        """
        if layer.training:
            msg = f"a packed layer cannot run in training mode; {NO_LATENTS}"
            raise PackedError(msg)
        quantizer = layer.weight_quantizer
        index, step = layer.weight_index, quantizer.step
        # Nothing trains codes, so torch's record is trusted.
        record = record_of((*self.operand.buffers(), step))
        kept = self._recorded(index, record)
        if kept is not None:
            return kept.quantized
        # No other candidate's weight is kept, so that memory does not grow with use.
        self._cache.clear()
        qmin, qmax = quantizer.limits(index)
        with torch.inference_mode(mode=False), torch.no_grad():
            quantized = self.operand.weight(
                index, step[index], qmin=qmin, qmax=qmax, dtype=layer.weight.dtype
            )
        if record is not None:
            self._cache[index] = Kept(quantized, record, None)
        return quantized

    def codes(
        self,
        quantizer: WeightQuantizer,
        index: int,
        operand: Tensor,  # noqa: ARG002
    ) -> Tensor:
        """See `WeightSource`."""
        qmin, qmax = quantizer.limits(index)
        return self.operand.codes(index, qmin=qmin, qmax=qmax).to(torch.int32)

    def moments(self, operand: Tensor) -> tuple[Tensor, Tensor] | None:  # noqa: ARG002
        """See `WeightSource`."""
        if self.operand.mean is None or self.operand.spread is None:
            return None
        return self.operand.mean, self.operand.spread

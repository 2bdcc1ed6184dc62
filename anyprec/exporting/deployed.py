"""A copy of a converted network that emits the operators of `operators.py` at one configuration.

Layers keep their classes, so that the interception of `nn/` hands every operand to its quantizer as
in training. Only what quantizes is another: it calls an operator that a tracer records whole.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from anyprec.bits import BitConfig
from anyprec.errors import ExportError
from anyprec.exporting.operators import (
    DEQUANTIZE,
    FAKE_QUANTIZE,
    FAKE_QUANTIZE_WEIGHT,
)
from anyprec.model.conversion import restore_class
from anyprec.model.converted import ConvertedModel
from anyprec.nn.channels import along
from anyprec.nn.functional import effective_step
from anyprec.nn.layers import QuantizedLayer
from anyprec.nn.norms import SwitchableNorm, restore_norm
from anyprec.nn.observers import Observers
from anyprec.nn.quantizers import InputQuantizer, WeightQuantizer
from anyprec.nn.weights import PackedCodes, WeightSource

_SCALE, _CODES = "deployed_scale", "deployed_codes"
"""Buffers of a deployed layer."""


@torch.no_grad()
def deployed_copy(model: ConvertedModel, config: BitConfig) -> nn.Module:
    """The network at one configuration, on the CPU and in eval mode, for tracers.

    Args:
        model: A calibrated network; not changed.
        config: A full configuration of it.

    Raises:
        ExportError: Its weights are corrected by a shift that no integer weight has.
    """
    network = copy.deepcopy(model).cpu().eval()
    network.set_bits(config)
    for path, layer in network.quantized_layers.items():
        _deploy_layer(layer, path)
    modules = dict(network.named_modules())
    for path, module in modules.items():
        if isinstance(module, SwitchableNorm):
            _fix_norm(module)
        for name, child in module.named_children():
            if isinstance(child, InputQuantizer):
                # Outputs have quantizers, too; a layer's own is that of the active candidate.
                index = module.input_index if isinstance(module, QuantizedLayer) else 0
                setattr(module, name, _DeployedInput(child, index, _owner_of(path, name)))
    restore_class(network)
    return network


def _owner_of(path: str, name: str) -> str:
    return path if name == "input_quantizer" else f"{path}.{name}"


class _DeployedInput(nn.Module):
    """Takes the place of an `InputQuantizer`, at one of its candidates."""

    def __init__(self, quantizer: InputQuantizer, index: int, layer: str) -> None:
        super().__init__()
        self.bits = quantizer.candidates[index]
        # Of a layer that shares the grid of what it reads, this is that grid.
        self.scale = float(quantizer.step_in_use(index))
        self.zero_point = -quantizer.limits(index)[0]
        self.observers = Observers()
        self.layer = layer

    def forward(self, values: Tensor, _index: int | Tensor) -> Tensor:
        top = 2**self.bits - 1
        emitted: Tensor = FAKE_QUANTIZE(
            values, self.scale, self.zero_point, 0, top, self.bits, self.layer
        )
        return emitted

    forward_selected = forward


class _DeployedWeight(WeightSource):
    """Emits the weight of one layer: from its codes if they are all there is, else from operands.

    An operand that does not depend on the network's input becomes codes when the graph is folded
    (`constants.py`), however the layer makes it.
    """

    def __init__(self, bits: int, layer: str) -> None:
        super().__init__(dynamic=True, corrected_axis=None)
        self.bits = bits
        self.layer = layer

    def quantized(self, layer: QuantizedLayer, operand: Tensor) -> Tensor:
        """See `WeightSource`."""
        scale = layer.get_buffer(_SCALE)
        emitted: Tensor
        if _CODES in layer._buffers:  # noqa: SLF001 (`get_buffer` has no default)
            emitted = DEQUANTIZE(layer.get_buffer(_CODES), scale, self.bits, self.layer)
        else:
            emitted = FAKE_QUANTIZE_WEIGHT(operand, scale, self.bits, self.layer)
        return emitted

    def codes(self, quantizer: WeightQuantizer, index: int, operand: Tensor) -> Tensor:
        """See `WeightSource`."""
        return quantizer.codes(operand, index)

    def moments(self, operand: Tensor) -> None:
        """See `WeightSource`."""
        del operand


def _deploy_layer(layer: QuantizedLayer, path: str) -> None:
    source, quantizer, index = layer.weight_source, layer.weight_quantizer, layer.weight_index
    if source.corrected_axis is not None:
        msg = f"layer {path!r} corrects its quantized weight by a real-valued shift "
        msg += "(norm='shared'), which no integer weight has: convert with norm='shared-affine' or "
        msg += "'per-pair' to deploy"
        raise ExportError(msg)
    weight = layer.weight
    scale = along(effective_step(quantizer.step[index]), quantizer.axis, weight)
    if quantizer.axis is None:
        scale = scale.reshape(())
    if isinstance(source, PackedCodes):
        codes = layer.weight_codes(index).to(torch.int8)
        layer.register_buffer(_CODES, codes)
        # A stand-in without values cannot be traced. What the layer makes of zeros is not used.
        layer.replace_weight(nn.Parameter(torch.zeros(weight.shape), requires_grad=False))
    layer.register_buffer(_SCALE, scale.clone())
    vars(layer)["weight_source"] = _DeployedWeight(quantizer.candidates[index], path)


def _fix_norm(norm: SwitchableNorm) -> None:
    """Make a norm a plain one that has the values of the active precision."""
    mean, variance = norm.active_statistics()
    norm.take_over_affine()
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
    restore_norm(norm)

"""A network for a single configuration: one candidate for each layer, one copy of each norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from anyprec.bits import BitConfig, Bits
from anyprec.model.converted import ConvertedModel
from anyprec.model.norm_copies import norm_row
from anyprec.nn.layers import QuantizedLayer, hold_codes
from anyprec.nn.norms import SwitchableNorm
from anyprec.nn.packed import PackedOperand
from anyprec.nn.quantizers import WeightQuantizer
from anyprec.nn.shared import SharedInputQuantizer, input_quantizer_of
from anyprec.nn.weights import PackedCodes


@torch.no_grad()
def narrow(model: ConvertedModel, config: BitConfig) -> None:
    """Reduce a network to this configuration, in place.

    Args:
        model: A calibrated model.
        config: A full configuration of it.
    """
    record, layers = model.anyprec_record, model.quantized_layers
    model.set_bits(config)
    # All rows before any layer is narrowed: a norm's row follows from the candidates of its layer.
    rows = {
        path: norm_row(layers.get(feeding or ""), record.settings.norm)
        for path, feeding in record.norms.items()
    }
    for path, row in rows.items():
        _narrow_norm(model.get_submodule(path), row)
    for path, layer in layers.items():
        _narrow_layer(layer, config[path])
    model.anyprec_record = record.narrowed(config)


def _narrow_norm(norm: nn.Module, row: int | None) -> None:
    if isinstance(norm, SwitchableNorm) and norm.bank is not None and row is not None:
        norm.bank.keep_row(row, norm.uniform)
        norm.switch(0, norm.override)


def _narrow_layer(layer: QuantizedLayer, bits: Bits) -> None:
    weight, input_ = layer.weight_quantizer, layer.input_quantizer
    index = weight.candidates.index(bits.weight)
    input_index = input_.candidates.index(bits.activation)
    source = layer.weight_source
    if isinstance(source, PackedCodes):
        hold_codes(layer, _narrowed_operand(source.operand, layer.weight_codes(index)))
    if weight.axis is None:
        new_weight = WeightQuantizer((bits.weight,), channels=None)
    else:
        channels = weight.step.shape[1]
        new_weight = WeightQuantizer((bits.weight,), channels=channels, axis=weight.axis)
    new_weight = new_weight.to(weight.step)
    new_weight.step.copy_(weight.step[index : index + 1])
    new_weight.step.requires_grad_(weight.step.requires_grad)
    trunk = None
    if isinstance(input_, SharedInputQuantizer) and input_.is_shared(input_index):
        trunk = input_.trunk
    new_input = input_quantizer_of(
        (bits.activation,), nonnegative=input_.nonnegative, rule=input_.rule, trunk=trunk
    ).to(input_.step)
    row = slice(input_index, input_index + 1)
    new_input.set_grid(input_.step[row], input_.zero_point[row])
    layer.weight_quantizer = new_weight.train(layer.training)
    layer.input_quantizer = new_input.train(layer.training)
    layer.weight_source.forget()
    layer.switch(bits)


def _narrowed_operand(packed: PackedOperand, codes: Tensor) -> PackedOperand:
    """The operand with a single candidate, whose codes are their own points."""
    moments = None
    if packed.mean is not None and packed.spread is not None and packed.moments_axis is not None:
        moments = packed.mean, packed.spread, packed.moments_axis
    return PackedOperand(
        codes.to(torch.int8),
        torch.ones((1, packed.ratio_bits.shape[1]), device=codes.device),
        axis=packed.axis,
        listed=packed.listed[:0],
        listed_codes=packed.listed_codes[:1, :0],
        moments=moments,
    ).train(packed.training)

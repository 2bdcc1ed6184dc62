"""State dicts: which keys conversion adds, and a new start after float weights were loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from anyprec.model.intact import output_quantizers, switchable_norms
from anyprec.model.switching import switch_to_float
from anyprec.nn.layers import PACKED, QuantizedLayer
from anyprec.nn.norms import SwitchableNorm
from anyprec.nn.outputs import OutputQuantizers

if TYPE_CHECKING:
    from anyprec.model.converted import ConvertedModel

_QUANTIZER_CHILDREN = ("weight_quantizer", "input_quantizer", PACKED)


def added_keys(model: ConvertedModel) -> set[str]:
    """The keys of the state dict that the float network does not have."""
    prefixes: list[str] = []
    # A shared layer has its keys once for every path.
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantizedLayer):
            prefixes += [f"{path}.{child}." for child in _QUANTIZER_CHILDREN]
        elif isinstance(module, SwitchableNorm) and module.bank is not None:
            prefixes.append(f"{path}.bank.")
        elif isinstance(module, OutputQuantizers):
            prefixes.append(f"{path}.")
    return {key for key in model.state_dict() if key.startswith(tuple(prefixes))}


@torch.no_grad()
def restart_from_float(model: ConvertedModel) -> None:
    """Start step sizes and norm copies anew from the present float weights."""
    layers = model.quantized_layers
    switch_to_float(model)
    for layer in layers.values():
        layer.weight_quantizer.initialize(layer.weight)
        layer.input_quantizer.forget()
    for output in output_quantizers(model).values():
        output.forget()
    for _, norm in switchable_norms(model):
        if norm.bank is not None:
            norm.bank.copy_from(norm)
    model.anyprec_record.statistics.clear()
    model.anyprec_precision.family.needs_check = True  # views keep their precision

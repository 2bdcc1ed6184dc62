"""What a network must be before something is done with it: float, with latent weights, calibrated.

`require_converted` is in `converted.py`.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch
from torch import nn

from anyprec.bits import shorten
from anyprec.errors import ConversionError, NotCalibratedError, NoValuesError, PackedError
from anyprec.model.intact import parts_of
from anyprec.nn.operators import LAYER_TYPES
from anyprec.nn.packed import NO_LATENTS
from anyprec.nn.specialize import Specialized

if TYPE_CHECKING:
    from anyprec.model.converted import ConvertedModel


def require_latents(model: ConvertedModel, *, purpose: str) -> None:
    """Refuse a packed network.

    Raises:
        PackedError: It is one.
    """
    if model.is_packed:
        msg = f"{purpose} needs latent weights; {NO_LATENTS}"
        raise PackedError(msg)


def uncalibrated(model: ConvertedModel) -> list[str]:
    """Paths of the layers, and then of the values between layers, without activation step sizes."""
    parts = parts_of(model)
    missing = [path for path, layer in parts.layers.items() if not layer.input_quantizer.calibrated]
    missing += [path for path, output in parts.outputs.items() if not output.calibrated]
    return missing


def require_calibrated(model: ConvertedModel) -> None:
    """Refuse a network without activation step sizes.

    Raises:
        NotCalibratedError: Some layers, or values between layers, have none.
    """
    missing = uncalibrated(model)
    if missing:
        parts = parts_of(model)
        number = len(parts.layers) + len(parts.outputs)
        kind = "layers and outputs" if parts.outputs else "layers"
        msg = f"{len(missing)} of {number} {kind} have no activation step sizes yet "
        msg += f"({shorten(missing, 3)}): call anyprec.calibrate(model, loader) before a precision "
        msg += "is set"
        raise NotCalibratedError(msg)


def require_values(model: nn.Module, *, purpose: str) -> None:
    """Refuse a network with tensors on the meta device.

    Raises:
        NoValuesError: It has some.
    """
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    missing = [name for name, tensor in tensors if tensor.is_meta]
    if missing:
        msg = f"{purpose} needs a network with values; {len(missing)} of its tensors are on the "
        msg += f"meta device ({shorten(missing, 3)}): create it on a real device, e.g. by "
        msg += "model.to_empty(device=...) and load_state_dict before anyprec.convert"
        raise NoValuesError(msg)


def refuse_unfit(model: object) -> None:
    """Refuse what `convert` cannot take: no module, converted already, or a single layer.

    Raises:
        ConversionError: It is such.
    """
    if not isinstance(model, nn.Module):
        msg = f"convert takes a torch.nn.Module, got {type(model).__name__}"
        raise ConversionError(msg)
    kind = type(model).__name__
    if isinstance(model, torch.jit.ScriptModule):
        msg = "convert cannot change a TorchScript module: convert the Python network before "
        msg += "scripting it"
        raise ConversionError(msg)
    for path, module in model.named_modules():
        if isinstance(module, Specialized):
            converted = f"its {path!r}" if path else "it"
            msg = f"{kind} cannot be converted: {converted} is converted already; create the float "
            msg += "network anew"
            raise ConversionError(msg)
    if isinstance(model, LAYER_TYPES):
        msg = f"convert takes a network that holds layers, got a single {kind}: wrap it in "
        msg += "nn.Sequential"
        raise ConversionError(msg)

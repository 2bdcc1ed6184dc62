"""What a network must be before something is done with it: with latent weights, or calibrated.

`require_converted` is in `converted.py`.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from torch import nn

from anyprec.bits import shorten
from anyprec.errors import NotCalibratedError, NoValuesError, PackedError
from anyprec.model.intact import parts_of
from anyprec.nn.packed import NO_LATENTS

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

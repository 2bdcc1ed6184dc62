"""The base of modules whose parameters take no weight decay: step sizes and norm copies.

Training scripts find such parameters by the number of axes, by name or by the class of the module
that has them, and know norms. Step sizes and norm copies have an axis of precisions before that of
channels, so that axes alone do not show what they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


class Undecayed(nn.LocalResponseNorm):
    """A module that such a rule takes for a norm (torchvision's, detectron2's).

    It is none: of torch's norms this one has no parameters or buffers, and no code that converts,
    fuses or re-initialises norms looks for it.
    """

    forward: Callable[..., Any]

    def __init__(self) -> None:
        nn.Module.__init__(self)


def undecayed_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters that step sizes and norm copies have in `model`."""
    names: set[str] = set()
    for path, module in model.named_modules():
        if isinstance(module, Undecayed):
            for name, _ in module.named_parameters():
                names.add(f"{path}.{name}" if path else name)
    return names

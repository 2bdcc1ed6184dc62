"""The operators that take an input and a weight by name: convolutions and `F.linear`.

`network/observation.py` reads the table to find layers, `layers.py` and `owners.py` to quantize
these. Not here: matrix products, in which either operand may be the weight (`products.py`), and
functions that run several operators behind one name (`bodies.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.nn import functional as F

from anyprec.nn.channels import Axis, output_axis

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

MATRICES = "matrices"
"""Child of a module that holds what quantizes the module's own parameters.

For example `attn.matrices.in_proj_weight`.
"""


@dataclass(frozen=True)
class Operator:
    """What anyprec needs to know of an operator that multiplies an input by a weight.

    Attributes:
        channel_axis: Axis of the weight that holds (a group's) output channels.
        transposed: Whether each input element, and not each output element, takes a slice of the
            weight.
    """

    channel_axis: int = 0
    transposed: bool = False

    def output_axis(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Axis:
        """Where the weight of a call has its output channels."""
        if not self.transposed:
            return self.channel_axis
        groups = args[6] if len(args) > 6 else kwargs.get("groups", 1)
        return output_axis(self.channel_axis, groups)

    def macs(self, input_: Tensor, weight: Tensor, output: Tensor) -> int:
        """Multiply-accumulates of one call, for the whole batch."""
        if self.transposed:
            return input_.numel() * (weight.numel() // weight.shape[0])
        return output.numel() * (weight.numel() // weight.shape[self.channel_axis])


def aten_forms(name: str) -> Iterator[Callable[..., Any]]:
    """How `torch.ops.aten` offers a function: as a whole, and each of its overloads."""
    packet = getattr(torch.ops.aten, name, None)
    if packet is None:  # of a later torch
        return
    yield packet
    for overload in packet.overloads():
        yield getattr(packet, overload)


def _operators() -> dict[Callable[..., Any], Operator]:
    table: dict[Callable[..., Any], Operator] = {
        F.linear: Operator(),
        F.conv1d: Operator(),
        F.conv2d: Operator(),
        F.conv3d: Operator(),
        F.conv_transpose1d: Operator(channel_axis=1, transposed=True),
        F.conv_transpose2d: Operator(channel_axis=1, transposed=True),
        F.conv_transpose3d: Operator(channel_axis=1, transposed=True),
        torch.conv_tbc: Operator(channel_axis=2),
    }
    for function, operator in list(table.items()):
        for form in aten_forms(function.__name__):
            table[form] = operator
    return table


OPERATORS = _operators()
"""Every operator of torch whose operands are an input and a weight by name."""

_CUSTOM_OPERATORS = {"torchvision.deform_conv2d": Operator()}
"""Such operators of libraries that may be absent, by their name in `torch.ops`."""


def operator_of(func: Callable[..., Any]) -> Operator | None:
    """The operator that a function is, or None."""
    operator = OPERATORS.get(func)
    if operator is None and isinstance(func, (OpOverload, OpOverloadPacket)):
        # "torchvision.deform_conv2d", and then perhaps the name of an overload.
        name = ".".join(str(func).split(".")[:2])
        return _CUSTOM_OPERATORS.get(name)
    return operator


def matrix_path(parameter: str) -> str:
    """Path of the layer that a bare parameter is, from the parameter's own path."""
    holder, _, name = parameter.rpartition(".")
    return f"{holder}.{MATRICES}.{name}" if holder else f"{MATRICES}.{name}"


def channel_axis(layer: nn.Module) -> int:
    """Axis of the layer's weight that holds (a group's) output channels."""
    transposed = isinstance(layer, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))
    return 1 if transposed else 0


def transposed_groups(layer: nn.Module) -> int:
    """Groups of a transposed convolution; 1 for any other layer."""
    if channel_axis(layer) == 0:
        return 1
    groups: int = layer.groups  # type: ignore[assignment]
    return groups


def operands(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Input and weight of a call of an operator, however they were passed."""
    # `torch.ops` names the input of some operators `self`.
    input_: Any = args[0] if args else kwargs.get("input", kwargs.get("self"))
    weight = args[1] if len(args) > 1 else kwargs["weight"]
    return input_, weight


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among `values`, however deep in tuples, lists, dictionaries and sets."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, dict):
            yield from tensors_in(value.values())
        elif isinstance(value, (tuple, list, set)):
            yield from tensors_in(value)

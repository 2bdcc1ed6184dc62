"""The operators that multiply an input by a weight: their operands, their cost, what hides them.

Three tables. `network/observation.py` reads them to find layers, `layers.py` and `owners.py` to
quantize these:

- `OPERATORS`: convolutions and `F.linear`, which name their input and their weight.
- `PRODUCTS`: matrix products, in which either operand may be a parameter.
- `BODIES`: functions that run several such operators behind one name (attention, LSTM), each with a
  body that runs them one by one, so that they can be seen and intercepted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
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
"""Every operator whose operands are an input and a weight by name."""

PRODUCTS: dict[Callable[..., Any], int] = {
    torch.matmul: 0, Tensor.matmul: 0, Tensor.__matmul__: 0, Tensor.__rmatmul__: 0,
    torch.mm: 0, Tensor.mm: 0, torch.bmm: 0, Tensor.bmm: 0, torch.mv: 0, Tensor.mv: 0,
    torch.addmm: 1, Tensor.addmm: 1, torch.baddbmm: 1, Tensor.baddbmm: 1,
    torch.einsum: 1,
}  # fmt: skip
"""Matrix products, with the number of leading arguments that are no operands."""

_OPERAND_NAMES = (
    "self",
    "input",
    "mat",
    "mat1",
    "batch1",
    "other",
    "mat2",
    "batch2",
    "vec",
    "operands",
)


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
    """Input and weight of a call of one of `OPERATORS`, however they were passed."""
    input_ = args[0] if args else kwargs["input"]
    weight = args[1] if len(args) > 1 else kwargs["weight"]
    return input_, weight


def product_operands(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[Tensor]:
    """The tensors that a call of one of `PRODUCTS` multiplies."""
    skipped = PRODUCTS[func]
    values = list(args[skipped:])
    for name in _OPERAND_NAMES:
        # `self` and `input` of addmm are what the product is added to.
        is_summand = skipped > 0 and name in ("self", "input")
        if name in kwargs and not is_summand:
            values.append(kwargs[name])
    return list(tensors_in(values))


def product_macs(
    func: Callable[..., Any], args: tuple[Any, ...], factors: list[Tensor], result: Tensor
) -> int:
    """Multiply-accumulates of one call of `PRODUCTS`, for the whole batch."""
    if func is torch.einsum:
        return _einsum_macs(args, factors)
    return result.numel() * factors[0].shape[-1]


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among `values`, and inside its tuples and lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from tensors_in(value)


def _einsum_macs(args: tuple[Any, ...], factors: list[Tensor]) -> int:
    """One multiply-accumulate for each combination of all indices."""
    equation = args[0]
    if not isinstance(equation, str):
        return 0
    terms = equation.replace(" ", "").split("->")[0].split(",")
    sizes: dict[str, int] = {}
    for term, factor in zip(terms, factors, strict=False):
        head, dots, tail = term.partition("...")
        indices = list(head)
        if dots:
            # Axes behind an ellipsis are indices too, which broadcasting aligns at their end.
            hidden = factor.ndim - len(head) - len(tail)
            indices += [f".{number}" for number in range(hidden, 0, -1)]
        indices += tail
        for index, length in zip(indices, factor.shape, strict=True):
            sizes[index] = max(length, sizes.get(index, 1))
    return math.prod(sizes.values())


# --- Bodies of functions that hide their operators


def _lstm(
    input_: Tensor,
    states: tuple[Tensor, Tensor],
    weights: list[Tensor],
    has_biases: bool,  # noqa: FBT001 (the signature of torch.lstm)
    num_layers: int,
    dropout: float,
    train: bool,  # noqa: FBT001
    bidirectional: bool,  # noqa: FBT001
    batch_first: bool,  # noqa: FBT001
) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.lstm` by `F.linear` (Hochreiter and Schmidhuber 1997, with forget gates)."""
    sequence = input_.transpose(0, 1) if batch_first else input_
    directions = 2 if bidirectional else 1
    per_direction = 4 if has_biases else 2
    finals: list[tuple[Tensor, Tensor]] = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            matrices = weights[index * per_direction : (index + 1) * per_direction]
            start = states[0][index], states[1][index]
            output, final = _lstm_direction(sequence, start, *matrices, backward=direction == 1)
            outputs.append(output)
            finals.append(final)
        sequence = torch.cat(outputs, dim=-1)
        if dropout and train and layer < num_layers - 1:
            sequence = F.dropout(sequence, dropout, training=True)
    if batch_first:
        sequence = sequence.transpose(0, 1)
    hidden, cells = zip(*finals, strict=True)
    return sequence, torch.stack(hidden), torch.stack(cells)


def _lstm_direction(
    sequence: Tensor,
    start: tuple[Tensor, Tensor],
    input_weight: Tensor,
    hidden_weight: Tensor,
    input_bias: Tensor | None = None,
    hidden_bias: Tensor | None = None,
    *,
    backward: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One direction of one layer: outputs in the order of `sequence`, and the last states."""
    hidden, cell = start
    outputs = []
    if backward:
        sequence = sequence.flip(0)
    for step in F.linear(sequence, input_weight, input_bias):
        gates = step + F.linear(hidden, hidden_weight, hidden_bias)
        take, forget, candidate, release = gates.chunk(4, dim=-1)  # torch's order
        cell = torch.sigmoid(forget) * cell + torch.sigmoid(take) * torch.tanh(candidate)
        hidden = torch.sigmoid(release) * torch.tanh(cell)
        outputs.append(hidden)
    output = torch.stack(outputs)
    if backward:
        output = output.flip(0)
    return output, (hidden, cell)


def _without_override_check(function: Any) -> Any:
    """The same Python function, without the check for `__torch_function__` that it begins with.

    torch offers such a function to a mode as a whole and then runs it with the mode switched off;
    the mode sees its operators only if the function does not offer itself again.
    """
    scope = {**function.__globals__, "has_torch_function": lambda _tensors: False}
    copy = FunctionType(
        function.__code__, scope, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


BODIES: dict[Callable[..., Any], Callable[..., Any]] = {torch.lstm: _lstm}
"""Functions that hide their operators, and a body for each that shows them."""

# Without this check it would offer itself forever.
if "has_torch_function" in F.multi_head_attention_forward.__code__.co_names:
    BODIES[F.multi_head_attention_forward] = _without_override_check(F.multi_head_attention_forward)

FUSING_TYPES = (nn.TransformerEncoderLayer, nn.TransformerEncoder)
"""Modules that run as one native operator in eval mode, unless a mode watches operators."""

HIDING = {
    F.multi_head_attention_forward: "nn.MultiheadAttention",
    torch.gru: "gru",
    torch.rnn_tanh: "rnn",
    torch.rnn_relu: "rnn",
    F.bilinear: "bilinear",
}
"""Functions that use weights behind one name and have no body here."""


def body_of(func: Callable[..., Any], args: tuple[Any, ...]) -> Callable[..., Any] | None:
    """The body that shows the operators of this call; None if there is none that fits it."""
    body = BODIES.get(func)
    if body is _lstm and not _lstm_is_plain(args):
        return None
    return body


def _lstm_is_plain(args: tuple[Any, ...]) -> bool:
    """Whether it is a call that `_lstm` can run."""
    # Packed sequences pass their lengths second, so that no bool comes fourth.
    if len(args) != 9 or not isinstance(args[3], bool):
        return False
    weights, has_biases, num_layers, bidirectional = args[2], args[3], args[4], args[7]
    directions = 2 if bidirectional else 1
    # With projections there is one more matrix for each direction.
    per_direction = 4 if has_biases else 2
    return bool(len(weights) == num_layers * directions * per_direction)

"""Functions that run several operators behind one name, each with a body that shows them.

A body runs the operators one by one, so that they can be seen and intercepted: attention, LSTM and
other recurrent layers, their cells, bilinear forms, chains of products, convolutions of any kind.
Each computes what torch's function does. Not here: the operators themselves (`operators.py`,
`products.py`). A call that no body fits runs as it is, and its weights stay in floating point.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anyprec.nn.operators import aten_forms

_States = tuple[Tensor, ...]
"""What a recurrent layer remembers; the first is its output."""

_Step = Callable[[Tensor, Tensor, _States], _States]
"""New states, from what the input and the hidden state contribute to the gates."""


# --- One step of recurrent layers


def _lstm_step(from_input: Tensor, from_hidden: Tensor, states: _States) -> _States:
    """Hochreiter and Schmidhuber 1997, with forget gates."""
    gates = from_input + from_hidden
    take, forget, candidate, release = gates.chunk(4, dim=-1)  # torch's order
    cell = torch.sigmoid(forget) * states[1] + torch.sigmoid(take) * torch.tanh(candidate)
    return torch.sigmoid(release) * torch.tanh(cell), cell


def _gru_step(from_input: Tensor, from_hidden: Tensor, states: _States) -> _States:
    """Cho et al. 2014, with the reset gate after the product, as torch has it."""
    input_reset, input_update, input_candidate = from_input.chunk(3, dim=-1)
    hidden_reset, hidden_update, hidden_candidate = from_hidden.chunk(3, dim=-1)
    reset = torch.sigmoid(input_reset + hidden_reset)
    update = torch.sigmoid(input_update + hidden_update)
    candidate = torch.tanh(input_candidate + reset * hidden_candidate)
    return (candidate + update * (states[0] - candidate),)


def _tanh_step(from_input: Tensor, from_hidden: Tensor, _states: _States) -> _States:
    """Elman 1990."""
    return (torch.tanh(from_input + from_hidden),)


def _relu_step(from_input: Tensor, from_hidden: Tensor, _states: _States) -> _States:
    return (torch.relu(from_input + from_hidden),)


# --- Recurrent layers


def _lstm(
    input_: Tensor, states: Sequence[Tensor], weights: list[Tensor], *settings: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.lstm` by `F.linear`."""
    output, (hidden, cells) = _run_layers(_lstm_step, input_, tuple(states), weights, *settings)
    return output, hidden, cells


def _recurrent(step: _Step) -> Callable[..., tuple[Tensor, Tensor]]:
    """`torch.gru`, `torch.rnn_tanh` or `torch.rnn_relu` by `F.linear`."""

    def run(
        input_: Tensor, state: Tensor, weights: list[Tensor], *settings: Any
    ) -> tuple[Tensor, Tensor]:
        output, (hidden,) = _run_layers(step, input_, (state,), weights, *settings)
        return output, hidden

    return run


def _run_layers(
    step: _Step,
    input_: Tensor,
    states: _States,
    weights: list[Tensor],
    has_biases: bool,  # noqa: FBT001 (from here on the arguments of torch.lstm)
    num_layers: int,
    dropout: float,
    train: bool,  # noqa: FBT001
    bidirectional: bool,  # noqa: FBT001
    batch_first: bool,  # noqa: FBT001
) -> tuple[Tensor, _States]:
    """Output, and the last states of all layers and directions, stacked."""
    sequence = input_.transpose(0, 1) if batch_first else input_
    directions = 2 if bidirectional else 1
    per_direction = 4 if has_biases else 2
    finals: list[_States] = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            matrices = weights[index * per_direction : (index + 1) * per_direction]
            start = tuple(state[index] for state in states)
            output, final = _run_direction(
                step, sequence, start, *matrices, backward=direction == 1
            )
            outputs.append(output)
            finals.append(final)
        sequence = torch.cat(outputs, dim=-1)
        if dropout and train and layer < num_layers - 1:
            sequence = F.dropout(sequence, dropout, training=True)
    if batch_first:
        sequence = sequence.transpose(0, 1)
    return sequence, tuple(map(torch.stack, zip(*finals, strict=True)))


def _run_direction(
    step: _Step,
    sequence: Tensor,
    states: _States,
    input_weight: Tensor,
    hidden_weight: Tensor,
    input_bias: Tensor | None = None,
    hidden_bias: Tensor | None = None,
    *,
    backward: bool,
) -> tuple[Tensor, _States]:
    """One direction of one layer: outputs in the order of `sequence`, and the last states."""
    outputs = []
    if backward:
        sequence = sequence.flip(0)
    for from_input in F.linear(sequence, input_weight, input_bias):
        from_hidden = F.linear(states[0], hidden_weight, hidden_bias)
        states = step(from_input, from_hidden, states)
        outputs.append(states[0])
    output = torch.stack(outputs)
    if backward:
        output = output.flip(0)
    return output, states


# --- Cells of recurrent layers


def _lstm_cell(
    input: Tensor,  # noqa: A002 (torch's names: they may be passed by name)
    hx: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> _States:
    """`torch.lstm_cell` by `F.linear`."""
    from_hidden = F.linear(hx[0], w_hh, b_hh)
    return _lstm_step(F.linear(input, w_ih, b_ih), from_hidden, tuple(hx))


def _cell(step: _Step) -> Callable[..., Tensor]:
    """`torch.gru_cell`, `torch.rnn_tanh_cell` or `torch.rnn_relu_cell` by `F.linear`."""

    def run(
        input: Tensor,  # noqa: A002 (torch's names: they may be passed by name)
        hx: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Tensor:
        from_hidden = F.linear(hx, w_hh, b_hh)
        return step(F.linear(input, w_ih, b_ih), from_hidden, (hx,))[0]

    return run


# --- Products and convolutions


def _bilinear(input1: Tensor, input2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.bilinear`: the weight meets the second input, their product the first one."""
    products = F.linear(input2, weight.flatten(0, 1)).unflatten(-1, weight.shape[:2])
    output = torch.matmul(products, input1.unsqueeze(-1)).squeeze(-1)
    return output if bias is None else output + bias


def _multi_dot(tensors: Sequence[Tensor]) -> Tensor:
    """`torch.linalg.multi_dot` from the end at which the input stands.

    torch chooses the cheapest order. That may multiply weights with each other first, and depends
    on the number of samples.
    """
    if _is_parameter(tensors[0]) and not _is_parameter(tensors[-1]):
        product = tensors[-1]
        for factor in reversed(tensors[:-1]):
            product = torch.matmul(factor, product)
        return product
    product = tensors[0]
    for factor in tensors[1:]:
        product = torch.matmul(product, factor)
    return product


def _chain_matmul(*matrices: Tensor) -> Tensor:
    """`torch.chain_matmul`, an old name of it."""
    return _multi_dot(matrices)


def _is_parameter(tensor: Tensor) -> bool:
    base = tensor._base  # noqa: SLF001 (torch has no public name for it)
    return isinstance(tensor, nn.Parameter) or isinstance(base, nn.Parameter)


_CONVOLUTIONS: tuple[Callable[..., Tensor], ...] = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED: tuple[Callable[..., Tensor], ...] = (
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
)


def _convolution(
    input: Tensor,  # noqa: A002 (torch's names: they may be passed by name)
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,  # noqa: FBT001
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    """`torch.convolution`, which is a convolution of any kind."""
    number = input.ndim - 3
    if transposed:
        run = _TRANSPOSED[number]
        return run(input, weight, bias, stride, padding, output_padding, groups, dilation)
    return _CONVOLUTIONS[number](input, weight, bias, stride, padding, dilation, groups)


# --- The table


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


def _bodies() -> dict[Callable[..., Any], Callable[..., Any]]:
    bodies: dict[Callable[..., Any], Callable[..., Any]] = {
        torch.lstm: _lstm,
        torch.gru: _recurrent(_gru_step),
        torch.rnn_tanh: _recurrent(_tanh_step),
        torch.rnn_relu: _recurrent(_relu_step),
        torch.lstm_cell: _lstm_cell,
        torch.gru_cell: _cell(_gru_step),
        torch.rnn_tanh_cell: _cell(_tanh_step),
        torch.rnn_relu_cell: _cell(_relu_step),
        F.bilinear: _bilinear,
        torch.linalg.multi_dot: _multi_dot,
        torch.chain_matmul: _chain_matmul,
        torch.convolution: _convolution,
    }
    for form in aten_forms("convolution"):
        bodies[form] = _convolution
    # Without this check it would offer itself forever.
    if "has_torch_function" in F.multi_head_attention_forward.__code__.co_names:
        bodies[F.multi_head_attention_forward] = _without_override_check(
            F.multi_head_attention_forward
        )
    return bodies


BODIES = _bodies()
"""Functions that hide their operators, and a body for each that shows them."""

FUSING_TYPES = (nn.TransformerEncoderLayer, nn.TransformerEncoder)
"""Modules that run as one native operator in eval mode, unless a mode watches operators."""

HIDING = {
    F.multi_head_attention_forward: "nn.MultiheadAttention",
    torch.rnn_tanh: "rnn",
    torch.rnn_relu: "rnn",
}
"""What functions of `BODIES` are called where no body fits, if not by their own name."""

_LAYERED = {torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu}
"""Recurrent layers, whose weights come in a list."""


def body_of(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> Callable[..., Any] | None:
    """The body that shows the operators of this call; None if there is none that fits it."""
    body = BODIES.get(func)
    if body is None or (kwargs or {}).get("out") is not None:
        return None
    if func in _LAYERED and not _is_plain(args):
        return None
    return body


def _is_plain(args: tuple[Any, ...]) -> bool:
    """Whether it is a call of a recurrent layer that its body can run."""
    # Packed sequences pass their lengths second, so that no bool comes fourth.
    if len(args) != 9 or not isinstance(args[3], bool):
        return False
    weights, has_biases, num_layers, bidirectional = args[2], args[3], args[4], args[7]
    directions = 2 if bidirectional else 1
    # With projections there is one more matrix for each direction.
    per_direction = 4 if has_biases else 2
    return bool(len(weights) == num_layers * directions * per_direction)

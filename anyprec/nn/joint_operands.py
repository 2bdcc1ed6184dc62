"""Input and weight of a layer that learn: quantized by one node of autograd's graph.

What each of them becomes is in `quantizers.py`, and what the node computes in
`straight_through.py`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from anyprec.kernels import Grid
from anyprec.nn.channels import Axis
from anyprec.nn.quantizers import InputQuantizer, WeightQuantizer
from anyprec.nn.straight_through import (
    channel_backward,
    once_differentiated,
    quantize_channels,
    quantize_tensor,
    tensor_backward,
)


def quantize_operands(
    input_quantizer: InputQuantizer,
    input_: Tensor,
    input_index: int,
    weight_quantizer: WeightQuantizer,
    weight: Tensor,
    weight_index: int,
) -> tuple[Tensor, Tensor] | None:
    """What both quantizers make of a layer's operands, as one node of the graph.

    Numbers and gradients are those of the two, one after the other.

    Returns:
        None if one of them learns nothing, or is not called as it is: somebody hooked or replaced
        its forward.
    """
    if not torch.is_grad_enabled():
        return None
    if not (_runs_as_it_is(input_quantizer) and _runs_as_it_is(weight_quantizer)):
        return None
    input_step, weight_step = input_quantizer.step, weight_quantizer.step
    if not (input_.requires_grad or input_step.requires_grad):
        return None
    if not (weight.requires_grad or weight_step.requires_grad):
        return None
    axis = weight_quantizer.axis
    # No part of the quantizers that users see.
    if axis is None or not input_quantizer._uses_step(input_index):  # noqa: SLF001
        return None
    grids = (
        input_quantizer._grid_of(input_, input_index),  # noqa: SLF001
        weight_quantizer._grid_of(weight, weight_index),  # noqa: SLF001
    )
    return Operands.apply(input_, input_step, weight, weight_step, axis, *grids)  # type: ignore[no-any-return]


def _runs_as_it_is(quantizer: nn.Module) -> bool:
    """Whether a call of a quantizer is its own forward, and its class says what that does."""
    attributes = vars(quantizer)
    for name in _HOOKS:
        if attributes[name]:
            return False
    kind: Any = type(quantizer)
    return "forward" not in attributes and _forward_is_known(kind)


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


@functools.cache
def _forward_is_known(kind: Any) -> bool:
    """Whether the class that defines the forward says what it does: another one may do anything."""
    for base in kind.__mro__:
        if "forward" in vars(base):
            return "_grid_of" in vars(base) or "_uses_step" in vars(base)
    return False


class Operands(torch.autograd.Function):
    """Input and weight of a layer: `PerTensor` and `PerChannel` as one node of the graph.

    The operator needs both, and gives both their gradients at once. On the host a node takes as
    long as a kernel.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input_: Tensor,
        input_step: Tensor,
        weight: Tensor,
        weight_step: Tensor,
        axis: Axis,
        input_grid: Grid,
        weight_grid: Grid,
    ) -> tuple[Tensor, Tensor]:
        """The quantized input and weight."""
        ctx.axis, ctx.input_grid, ctx.weight_grid = axis, input_grid, weight_grid
        ctx.set_materialize_grads(False)
        quantized, is_by_kernel = quantize_tensor(input_, input_step, input_grid)
        kept = None if is_by_kernel else quantized
        ctx.save_for_backward(input_, input_step, kept, weight, weight_step)
        return quantized, quantize_channels(weight, weight_step, axis, weight_grid)

    @staticmethod
    @once_differentiated
    def backward(
        ctx: Any, of_input: Tensor | None, of_weight: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """Gradients of both, and of all their step sizes."""
        input_, input_step, kept, weight, weight_step = ctx.saved_tensors
        needs = ctx.needs_input_grad
        gradients: list[Tensor | None] = [None] * 7
        if of_input is not None:
            gradients[:2] = tensor_backward(
                of_input, input_, input_step, kept, ctx.input_grid, needs_step=needs[1]
            )
        if of_weight is not None:
            gradients[2:4] = channel_backward(
                of_weight, weight, weight_step, ctx.axis, ctx.weight_grid, needs_step=needs[3]
            )
        return tuple(gradients)

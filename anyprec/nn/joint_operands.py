"""Input and weight of a layer, quantized together: by one node of autograd's graph, and one launch.

What each of them becomes is in `quantizers.py`, and how it is computed in `straight_through.py`.

A kernel must know that tensors are plain memory on one device, and how channels lie there. To ask
takes as long on the host as the kernel itself. So what was found of a weight and of step sizes is
kept (`Prepared`) as long as these are the same tensors at the same place.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from anyprec.kernels import FusedKernel, Grid, Operand, kernel_for, serves
from anyprec.nn.channels import Axis
from anyprec.nn.quantizers import InputQuantizer, WeightQuantizer
from anyprec.nn.straight_through import (
    channel_backward,
    is_undifferentiated,
    once_differentiated,
    quantize_channels,
    quantize_tensor,
    sizes_in_memory,
    tensor_backward,
)


@dataclass(frozen=True, eq=False, slots=True)
class Prepared:
    """What quantizes both operands of a layer at one candidate of its weight.

    Attributes:
        kernel: It reads all that follows, and inputs like that which this was prepared for.
        weight: The weight, and how it is quantized.
        input_step: Step sizes of the input.
        places: Where these three tensors are, and how they lie there.
        device: Number of the device of all.
        dtype: Of the input.
    """

    kernel: FusedKernel
    weight: Operand
    input_step: Tensor
    places: tuple[Any, ...]
    device: int
    dtype: torch.dtype

    def is_for(self, input_: Tensor, input_step: Tensor, weight: Tensor, step: Tensor) -> bool:
        """Whether these are the tensors that it was prepared for, with an input like that."""
        known = self.weight
        if known.values is not weight or known.step is not step:
            return False
        if self.input_step is not input_step or input_.dtype is not self.dtype:
            return False
        if input_.get_device() != self.device or not serves(self.kernel, input_):
            return False
        return self.has_place(input_step, weight, step)

    def has_place(self, input_step: Tensor, weight: Tensor, step: Tensor) -> bool:
        """Whether the tensors still lie where they lay."""
        return self.places == _places_of(input_step, weight, step)

    def quantize(self, input_: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """The quantized input and weight, without gradient."""
        return self.kernel.quantize_pair(Operand(input_, self.input_step, grid), self.weight)


def _places_of(input_step: Tensor, weight: Tensor, step: Tensor) -> tuple[Any, ...]:
    # What `tensor.data = ...` may change, as module.to() does.
    addresses = input_step.data_ptr(), weight.data_ptr(), step.data_ptr()
    dtypes = input_step.dtype, weight.dtype, step.dtype
    return *addresses, *dtypes, input_step.numel(), weight.shape, weight.stride(), step.shape


def quantize_operands(
    input_quantizer: InputQuantizer,
    input_: Tensor,
    input_index: int,
    weight_quantizer: WeightQuantizer,
    weight: Tensor,
    weight_index: int,
    kept: dict[int, Prepared],
) -> tuple[Tensor, Tensor] | None:
    """What both quantizers make of a layer's operands.

    Numbers and gradients are those of the two, one after the other.

    Args:
        input_quantizer: Of the layer.
        input_: Its float input.
        input_index: Of the input's candidate.
        weight_quantizer: Of the layer.
        weight: Its float weight.
        weight_index: Of the weight's candidate.
        kept: What was prepared for the layer, by index of the weight's candidate.

    Returns:
        None if one of them learns nothing beside the other, or is not called as it is: somebody
        hooked or replaced its forward.
    """
    # Past nn.Module.__getattr__, which is slow. Replicas have no parameters.
    input_step: Any = input_quantizer._parameters.get("step")  # noqa: SLF001 (see above)
    step: Any = weight_quantizer._parameters.get("step")  # noqa: SLF001 (see above)
    learns = torch.is_grad_enabled()
    if (
        # No part of the quantizers that users see.
        not input_quantizer._uses_step(input_index)  # noqa: SLF001 (see above)
        or not (_runs_as_it_is(input_quantizer) and _runs_as_it_is(weight_quantizer))
        or (input_step is None or step is None or weight_quantizer.axis is None)
        or not (_both_learn(input_, input_step, weight, step) if learns else is_undifferentiated())
    ):
        return None
    axis: Axis = weight_quantizer.axis
    grid = input_quantizer._grid_of(input_, input_index)  # noqa: SLF001 (see above)
    prepared = kept.get(weight_index)
    if prepared is not None and prepared.is_for(input_, input_step, weight, step):
        weight_grid = prepared.weight.grid
    else:
        weight_grid = weight_quantizer._grid_of(weight, weight_index)  # noqa: SLF001 (see above)
        prepared = _prepare(input_, input_step, weight, step, axis, weight_grid)
        if prepared is not None:
            kept[weight_index] = prepared
    # What torch's operations say of a row that is not there, a kernel would not notice.
    if not 0 <= grid.row < input_step.numel():
        prepared = None
    if learns:
        return Operands.apply(  # type: ignore[no-any-return]
            input_, input_step, weight, step, axis, grid, weight_grid, prepared
        )
    # An autograd function takes as long on the host as all else here.
    return None if prepared is None else prepared.quantize(input_, grid)


def quantize_input(quantizer: InputQuantizer, values: Tensor, index: int) -> Tensor:
    """What a call of an input quantizer returns: in less time where nothing learns."""
    if is_undifferentiated() and _runs_as_it_is(quantizer) and quantizer._uses_step(index):  # noqa: SLF001 (as above)
        grid = quantizer._grid_of(values, index)  # noqa: SLF001 (as above)
        return quantize_tensor(values, quantizer.step, grid)[0]
    result: Tensor = quantizer(values, index)
    return result


def _prepare(
    input_: Tensor, input_step: Tensor, weight: Tensor, step: Tensor, axis: Axis, grid: Grid
) -> Prepared | None:
    """What quantizes both, the weight with this grid; None if no kernel does."""
    kernel = kernel_for(input_, input_step)
    if kernel is None or kernel_for(weight, step) is not kernel:
        return None
    sizes = sizes_in_memory(weight, step, grid.row, axis)
    device = weight.get_device()
    if sizes is None or input_.get_device() != device:
        return None
    operand = Operand(weight, step, grid, sizes)
    places = _places_of(input_step, weight, step)
    return Prepared(kernel, operand, input_step, places, device, input_.dtype)


def _both_learn(input_: Tensor, input_step: Tensor, weight: Tensor, step: Tensor) -> bool:
    """Whether gradients are wanted of the input's side and of the weight's."""
    if not (input_.requires_grad or input_step.requires_grad):
        return False
    return weight.requires_grad or step.requires_grad


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
        prepared: Prepared | None,
    ) -> tuple[Tensor, Tensor]:
        """The quantized input and weight."""
        ctx.axis, ctx.input_grid, ctx.weight_grid = axis, input_grid, weight_grid
        ctx.prepared = prepared
        ctx.set_materialize_grads(False)
        if prepared is not None:
            ctx.save_for_backward(input_, input_step, None, weight, weight_step)
            return prepared.quantize(input_, input_grid)
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
        # Here torch says if one of them was changed in place.
        input_, input_step, kept, weight, weight_step = ctx.saved_tensors
        prepared: Prepared | None = ctx.prepared
        if of_input is not None and of_weight is not None and prepared is not None:
            kernel = prepared.kernel
            in_place = prepared.has_place(input_step, weight, weight_step)
            if in_place and serves(kernel, of_input, of_weight):
                operand = Operand(input_, input_step, ctx.input_grid)
                of_both = kernel.quantize_pair_backward(
                    of_input, of_weight, operand, prepared.weight
                )
                return (*of_both, None, None, None, None)
        needs = ctx.needs_input_grad
        gradients: list[Tensor | None] = [None] * 8
        if of_input is not None:
            gradients[:2] = tensor_backward(
                of_input, input_, input_step, kept, ctx.input_grid, needs_step=needs[1]
            )
        if of_weight is not None:
            gradients[2:4] = channel_backward(
                of_weight, weight, weight_step, ctx.axis, ctx.weight_grid, needs_step=needs[3]
            )
        return tuple(gradients)

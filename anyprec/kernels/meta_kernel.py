"""The kernel of the meta device, which has no values: an operation for each launch of a GPU.

A network on the meta device takes the way of one on a GPU. Whoever watches operations there
(`torch.utils._python_dispatch.TorchDispatchMode`) counts launches, and a value that is read raises.
The operations are written as `triton_kernel.py` launches kernels: one is changed with the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from anyprec.kernels.fused import FusedKernel, Grid, Operand, Sizes

_LIBRARY = torch.library.Library("anyprec_kernels", "DEF")
_GRID = "int row, int qmin, int qmax"
_SIZES = "int groups, int repeats, int channels, int inner"


def _launch(schema: str) -> Callable[..., None]:
    """An operation that stands for a launch. It does nothing, and has arguments to be looked at."""
    name = _LIBRARY.define(schema)
    _LIBRARY.impl(name, lambda *_: None, "Meta")
    operation: Callable[..., None] = getattr(torch.ops.anyprec_kernels, name)
    return operation


_tensor = _launch(f"tensor(Tensor values, Tensor(a!) result, Tensor step, {_GRID}) -> ()")
_tensor_gradients = _launch(
    "tensor_gradients(Tensor gradient, Tensor values, Tensor(a!) of_values, Tensor(b!) sums, "
    f"Tensor step, {_GRID}) -> ()"
)
_step_gradient = _launch(
    "step_gradient(Tensor sums, Tensor step, Tensor(a!) of_step, int row, float factor) -> ()"
)
_channels = _launch(
    f"channels(Tensor values, Tensor(a!) result, Tensor step, {_GRID}, {_SIZES}) -> ()"
)
_channel_gradients = _launch(
    "channel_gradients(Tensor gradient, Tensor values, Tensor(a!) of_values, Tensor step, "
    f"Tensor(b!) of_step, {_GRID}, float factor, {_SIZES}) -> ()"
)

_pair = _launch(
    "pair(Tensor values, Tensor(a!) result, Tensor weight, Tensor(b!) weight_result) -> ()"
)
_pair_gradients = _launch(
    "pair_gradients(Tensor gradient, Tensor values, Tensor(a!) of_values, Tensor(b!) sums, "
    "Tensor weight_gradient, Tensor weight, Tensor(c!) of_weight, Tensor(d!) of_weight_step) -> ()"
)


class MetaKernel(FusedKernel):
    """Runs operations that compute nothing."""

    name: ClassVar[str] = "meta"
    dtypes: ClassVar[frozenset[torch.dtype]] = frozenset(
        {torch.float32, torch.bfloat16, torch.float16}
    )

    def _tensor(self, values: Tensor, result: Tensor, step: Tensor, grid: Grid) -> None:
        _tensor(values, result, step, *grid[:3])

    def _tensor_backward(
        self,
        gradient: Tensor,
        values: Tensor,
        of_values: Tensor,
        step: Tensor,
        of_step: Tensor,
        grid: Grid,
    ) -> None:
        sums = step.new_empty(1)
        _tensor_gradients(gradient, values, of_values, sums, step, *grid[:3])
        _step_gradient(sums, step, of_step, grid.row, grid.factor)

    def _channels(
        self, values: Tensor, result: Tensor, step: Tensor, grid: Grid, sizes: Sizes
    ) -> None:
        _channels(values, result, step, *grid[:3], *sizes)

    def _channels_backward(
        self,
        gradient: Tensor,
        values: Tensor,
        of_values: Tensor,
        step: Tensor,
        of_step: Tensor,
        grid: Grid,
        sizes: Sizes,
    ) -> None:
        _channel_gradients(gradient, values, of_values, step, of_step, *grid, *sizes)

    def _pair(
        self,
        values: Tensor,
        result: Tensor,
        weight_result: Tensor,
        input_: Operand,
        weight: Operand,
    ) -> None:
        del input_
        _pair(values, result, weight.values, weight_result)

    def _pair_backward(
        self,
        gradients: tuple[Tensor, Tensor],
        values: Tensor,
        results: tuple[Tensor, Tensor, Tensor, Tensor],
        input_: Operand,
        weight: Operand,
    ) -> None:
        of_values, of_step, of_weights, of_weight_step = results
        sums = of_step.new_empty(1)
        _pair_gradients(
            *(gradients[0], values, of_values, sums),
            *(gradients[1], weight.values, of_weights, of_weight_step),
        )
        _step_gradient(sums, input_.step, of_step, input_.grid.row, input_.grid.factor)

"""The kernel of CPUs: C code, called by `ctypes`, which lets other threads of Python run."""

from __future__ import annotations

import ctypes
from typing import Any, ClassVar

import torch
from torch import Tensor

from anyprec.kernels.fused import FusedKernel, Grid, Sizes

VALUES_PER_THREAD = 2**17
"""To start a thread costs as much time as to quantize about a quarter of these values."""

_POINTER, _SIZE, _CODE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_GRID = [_SIZE, _CODE, _CODE]
# As `fake_quantize.c` declares them. A pointer is passed as a whole number.
_SIGNATURES: dict[str, list[Any]] = {
    "anyprec_tensor": [_POINTER] * 3 + _GRID + [_SIZE, ctypes.c_int],
    "anyprec_tensor_backward": (
        [_POINTER] * 5 + [_SIZE, *_GRID, ctypes.c_double, _SIZE, ctypes.c_int]
    ),
    "anyprec_channels": [_POINTER] * 3 + _GRID + [_SIZE] * 4 + [ctypes.c_int],
    "anyprec_channels_backward": (
        [_POINTER] * 5 + [_SIZE, *_GRID, ctypes.c_double] + [_SIZE] * 4 + [ctypes.c_int]
    ),
}


class CKernel(FusedKernel):
    """Calls a library that was built from `fake_quantize.c`.

    Args:
        library: The loaded library.
    """

    name: ClassVar[str] = "c"
    dtypes: ClassVar[frozenset[torch.dtype]] = frozenset({torch.float32})

    def __init__(self, library: ctypes.CDLL) -> None:
        functions = []
        for function_name, types in _SIGNATURES.items():
            function = getattr(library, function_name)
            function.argtypes, function.restype = types, None
            functions.append(function)
        self._run, self._run_backward, self._run_channels, self._run_channels_backward = functions

    def _tensor(self, values: Tensor, result: Tensor, step: Tensor, grid: Grid) -> None:
        count = values.numel()
        self._run(
            values.data_ptr(),
            result.data_ptr(),
            step.data_ptr(),
            *grid[:3],
            count,
            _threads(count),
        )

    def _tensor_backward(
        self,
        gradient: Tensor,
        values: Tensor,
        of_values: Tensor,
        step: Tensor,
        of_step: Tensor,
        grid: Grid,
    ) -> None:
        count = values.numel()
        self._run_backward(
            gradient.data_ptr(),
            values.data_ptr(),
            of_values.data_ptr(),
            step.data_ptr(),
            of_step.data_ptr(),
            step.numel(),
            *grid,
            count,
            _threads(count),
        )

    def _channels(
        self, values: Tensor, result: Tensor, step: Tensor, grid: Grid, sizes: Sizes
    ) -> None:
        self._run_channels(
            values.data_ptr(),
            result.data_ptr(),
            step.data_ptr(),
            grid.row * sizes.steps,
            *grid[1:3],
            *sizes,
            _threads(values.numel()),
        )

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
        self._run_channels_backward(
            gradient.data_ptr(),
            values.data_ptr(),
            of_values.data_ptr(),
            step.data_ptr(),
            of_step.data_ptr(),
            step.numel(),
            grid.row * sizes.steps,
            *grid[1:],
            *sizes,
            _threads(values.numel()),
        )


def _threads(count: int) -> int:
    """How many threads share the work on `count` values, the caller included."""
    if count < 2 * VALUES_PER_THREAD:
        return 1
    return min(torch.get_num_threads(), count // VALUES_PER_THREAD)

"""The kernel of CUDA and ROCm devices: launches of the programs in `triton_programs.py`.

Triton looks at every argument of a launch to find the compiled program, which takes longer on the
host than the rest of a quantizer. All that it compiles differently is in a key here, by which
compiled programs are kept.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
import triton
from torch import Tensor

from anyprec.kernels import triton_programs as programs
from anyprec.kernels.fused import FusedKernel, Grid, Sizes

BLOCK = 1024
"""Values of a program, or of one turn of its loop: two loads of 16 bytes for each thread."""

MOST_PROGRAMS = 1024
"""Of a backward pass whose sums another launch adds up."""

# Older versions of Triton take other arguments when a compiled program is launched again; on ROCm
# what is compiled depends on more than the keys here say.
_KEEPS_COMPILED = (
    tuple(int(number) for number in triton.__version__.split(".")[:2]) >= (3, 3)
    and torch.version.hip is None
)

Arguments = tuple[Any, ...]


class Launcher:
    """Launches one program, compiled for each kind of arguments.

    Args:
        program: What Triton compiles.
    """

    def __init__(self, program: Any) -> None:
        self._program = program
        self._compiled: dict[Arguments, Any] = {}

    def __call__(
        self, programs: int, key: Arguments, arguments: Arguments, constants: dict[str, int]
    ) -> None:
        """Launch it on the current stream of the current device.

        Args:
            programs: How many run.
            key: Besides the constants, all that the compiled program depends on: device, dtypes,
                alignment of pointers, and what Triton specializes of the whole numbers.
            arguments: In the program's order, without constants. Floats have to be floats.
            constants: By name, in the program's order; `BLOCK` is the first.
        """
        key = (*key, *constants.values())
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[programs, 1, 1](*arguments, *constants.values())
            return
        warps = 1 if constants["BLOCK"] <= 256 else 4
        compiled = self._program[(programs,)](*arguments, **constants, num_warps=warps)
        # Triton's interpreter compiles nothing.
        if compiled is not None and _KEEPS_COMPILED:
            self._compiled[key] = compiled


class TritonKernel(FusedKernel):
    """Two launches for the gradients of a tensor with one step size, one for all else."""

    name: ClassVar[str] = "triton"
    dtypes: ClassVar[frozenset[torch.dtype]] = frozenset(
        {torch.float32, torch.bfloat16, torch.float16}
    )

    def __init__(self) -> None:
        self._tensor_launcher = Launcher(programs.quantize_tensor)
        self._tensor_gradients_launcher = Launcher(programs.tensor_gradients)
        self._step_gradient_launcher = Launcher(programs.step_gradient)
        self._channels_launcher = Launcher(programs.quantize_channels)
        self._channel_gradients_launcher = Launcher(programs.channel_gradients)

    def _tensor(self, values: Tensor, result: Tensor, step: Tensor, grid: Grid) -> None:
        count = values.numel()
        arguments = (values, result, step, grid.row, *_limits(grid), count)
        with _device_of(values):
            self._tensor_launcher(
                _blocks(count), _key(values, values, count), arguments, {"BLOCK": BLOCK}
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
        count, all_steps = values.numel(), step.numel()
        number = min(_blocks(count), MOST_PROGRAMS)
        sums = step.new_empty(number)
        key = _key(values, gradient, count)
        row = grid.row
        with _device_of(values):
            self._tensor_gradients_launcher(
                number,
                key,
                (gradient, values, of_values, sums, step, row, *_limits(grid), count),
                {"BLOCK": BLOCK},
            )
            self._step_gradient_launcher(
                1,
                key[:1],
                (sums, step, of_step, row, all_steps, number, float(grid.factor)),
                {"BLOCK": _power_of_two(number), "STEPS": _power_of_two(all_steps)},
            )

    def _channels(
        self, values: Tensor, result: Tensor, step: Tensor, grid: Grid, sizes: Sizes
    ) -> None:
        count = values.numel()
        first = grid.row * sizes.steps
        arguments = (values, result, step, first, *_limits(grid), count, *sizes[1:])
        with _device_of(values):
            self._channels_launcher(
                _blocks(count), _key(values, values, count), arguments, {"BLOCK": BLOCK}
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
        rows = step.numel() // sizes.steps
        limits = grid.row, rows, *_limits(grid), float(grid.factor)
        block = min(_power_of_two(sizes.repeats * sizes.inner), BLOCK)
        with _device_of(values):
            self._channel_gradients_launcher(
                sizes.steps,
                _key(values, gradient, sizes.inner),
                (gradient, values, of_values, step, of_step, *limits, *sizes[1:]),
                {
                    "BLOCK": block,
                    "ROWS": _power_of_two(rows),
                    "REPEATED": int(sizes.repeats > 1),
                },
            )


def _limits(grid: Grid) -> tuple[float, float]:
    """The lowest and the highest code, as floats: Triton would compile whole numbers anew."""
    return float(grid.qmin), float(grid.qmax)


def _key(values: Tensor, gradient: Tensor, number: int) -> Arguments:
    """What Triton compiles differently: `number` is the whole number that it specializes.

    New tensors are aligned, and step sizes are read as if they were not.
    """
    return (
        values.get_device(),
        values.dtype,
        values.data_ptr() % 16 == 0,
        gradient.data_ptr() % 16 == 0,
        number % 16 == 0,
        number == 1,
    )


def _blocks(count: int) -> int:
    return -(-count // BLOCK)


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()


def _device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """In the block the device of `tensor` is the current one: there Triton launches."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return _AS_IT_IS
    return torch.cuda.device(tensor.device)


_AS_IT_IS: AbstractContextManager[Any] = nullcontext()

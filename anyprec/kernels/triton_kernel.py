"""The kernel of CUDA and ROCm devices: launches of the programs in `triton_programs.py`.

Triton looks at every argument of a launch to find the compiled program, which takes longer on the
host than the rest of a quantizer. All that it compiles differently is in a key here, by which
compiled programs are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
import triton
from torch import Tensor

from anyprec.kernels import triton_programs as programs
from anyprec.kernels.fused import FusedKernel, Grid, Operand, Sizes

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
        program: What Triton compiles. Its arguments are tensors, then numbers, then constants.
    """

    def __init__(self, program: Any) -> None:
        self._program = program
        self._compiled: dict[Arguments, Any] = {}

    def __call__(
        self,
        programs: int,
        key: Arguments,
        tensors: tuple[Tensor, ...],
        numbers: tuple[float, ...],
        constants: dict[str, int],
    ) -> None:
        """Launch it on the current stream of the current device.

        Args:
            programs: How many run.
            key: Besides the constants, all that the compiled program depends on: device, dtypes,
                alignment of pointers, and what Triton specializes of the whole numbers.
            tensors: In the program's order.
            numbers: The same. Floats have to be floats.
            constants: By name, in the program's order; `BLOCK` is the first.
        """
        key = (*key, *constants.values())
        launch = self._compiled.get(key)
        if launch is not None:
            # As whole numbers, which Triton does not ask the driver about.
            pointers = [tensor.data_ptr() for tensor in tensors]
            launch(programs, *pointers, *numbers, *constants.values())
            return
        warps = 1 if constants["BLOCK"] <= 256 else 4
        grid = self._program[(programs,)]
        compiled = grid(*tensors, *numbers, **constants, num_warps=warps)
        # Triton's interpreter compiles nothing.
        if compiled is not None and _KEEPS_COMPILED:
            self._compiled[key] = _launch_of(compiled, tensors[0].get_device())


def _launch_of(compiled: Any, device: int) -> Callable[..., None]:
    """What launches a compiled program again: past what Triton does for those who watch launches.

    That takes as long as the launch itself.

    Args:
        compiled: What Triton compiled; it was launched before.
        device: Its number.
    """
    run, function, packed = compiled.run, compiled.function, compiled.packed_metadata
    stream_of = triton.runtime.driver.active.get_current_stream

    def launch(programs: int, *arguments: Any) -> None:
        run(programs, 1, 1, stream_of(device), function, packed, None, None, None, *arguments)

    return launch


class TritonKernel(FusedKernel):
    """Two launches for gradients of a tensor with one step size, or of a pair; one for all else."""

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
        self._pair_launcher = Launcher(programs.quantize_pair)
        self._pair_gradients_launcher = Launcher(programs.pair_gradients)

    def _tensor(self, values: Tensor, result: Tensor, step: Tensor, grid: Grid) -> None:
        count = values.numel()
        with _device_of(values):
            self._tensor_launcher(
                _blocks(count),
                _key(values, values, count),
                (values, result, step),
                (grid.row, *_limits(grid), count),
                {"BLOCK": BLOCK},
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
        number = min(_blocks(count), MOST_PROGRAMS)
        sums = step.new_empty(number)
        key = _key(values, gradient, count)
        with _device_of(values):
            self._tensor_gradients_launcher(
                number,
                key,
                (gradient, values, of_values, sums, step),
                (grid.row, *_limits(grid), count),
                {"BLOCK": BLOCK},
            )
            self._sum_up(sums, step, of_step, grid)

    def _channels(
        self, values: Tensor, result: Tensor, step: Tensor, grid: Grid, sizes: Sizes
    ) -> None:
        count = values.numel()
        first = grid.row * sizes.steps
        with _device_of(values):
            self._channels_launcher(
                _blocks(count),
                _key(values, values, count),
                (values, result, step),
                (first, *_limits(grid), count, *sizes[1:]),
                {"BLOCK": BLOCK},
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
        constants = _constants(rows, sizes)
        with _device_of(values):
            self._channel_gradients_launcher(
                sizes.steps,
                _key(values, gradient, sizes.inner),
                (gradient, values, of_values, step, of_step),
                (*limits, *sizes[1:]),
                {"BLOCK": constants.pop("WEIGHT_BLOCK"), **constants},
            )

    def _pair(
        self,
        values: Tensor,
        result: Tensor,
        weight_result: Tensor,
        input_: Operand,
        weight: Operand,
    ) -> None:
        numbers, sizes = weight.values, weight.sizes
        if sizes is None or not _are_aligned(values, numbers):
            super()._pair(values, result, weight_result, input_, weight)
            return
        count, weight_count = values.numel(), numbers.numel()
        blocks = _blocks(count)
        with _device_of(values):
            self._pair_launcher(
                blocks + _blocks(weight_count),
                _pair_key(values, numbers, count, weight_count),
                (values, result, input_.step, numbers, weight_result, weight.step),
                (
                    *(input_.grid.row, *_limits(input_.grid), count, blocks),
                    *(weight.grid.row * sizes.steps, *_limits(weight.grid), weight_count),
                    *sizes[1:],
                ),
                {"BLOCK": BLOCK},
            )

    def _pair_backward(
        self,
        gradients: tuple[Tensor, Tensor],
        values: Tensor,
        results: tuple[Tensor, Tensor, Tensor, Tensor],
        input_: Operand,
        weight: Operand,
    ) -> None:
        numbers, sizes = weight.values, weight.sizes
        if sizes is None or not _are_aligned(values, numbers, *gradients):
            super()._pair_backward(gradients, values, results, input_, weight)
            return
        of_values, of_step, of_weight, of_weight_step = results
        count, rows = values.numel(), weight.step.numel() // sizes.steps
        programs = min(_blocks(count), MOST_PROGRAMS)
        sums = input_.step.new_empty(programs)
        with _device_of(values):
            self._pair_gradients_launcher(
                programs + sizes.steps,
                _pair_key(values, numbers, count, sizes.inner),
                (
                    *(gradients[0], values, of_values, sums, input_.step),
                    *(gradients[1], numbers, of_weight, weight.step, of_weight_step),
                ),
                (
                    *(input_.grid.row, *_limits(input_.grid), count, programs),
                    *(weight.grid.row, rows, *_limits(weight.grid), float(weight.grid.factor)),
                    *sizes[1:],
                ),
                {"BLOCK": BLOCK, **_constants(rows, sizes)},
            )
            self._sum_up(sums, input_.step, of_step, input_.grid)

    def _sum_up(self, sums: Tensor, step: Tensor, of_step: Tensor, grid: Grid) -> None:
        """Gradient of the step sizes, from the sums of each program."""
        programs, all_steps = sums.numel(), step.numel()
        self._step_gradient_launcher(
            1,
            (step.get_device(),),
            (sums, step, of_step),
            (grid.row, all_steps, programs, float(grid.factor)),
            {"BLOCK": _power_of_two(programs), "STEPS": _power_of_two(all_steps)},
        )


def _constants(rows: int, sizes: Sizes) -> dict[str, int]:
    """Those of the gradients of channels."""
    return {
        "WEIGHT_BLOCK": min(_power_of_two(sizes.repeats * sizes.inner), BLOCK),
        "ROWS": _power_of_two(rows),
        "REPEATED": int(sizes.repeats > 1),
    }


def _are_aligned(*tensors: Tensor) -> bool:
    """Whether all begin where vectors do: pairs are compiled for nothing else."""
    return not any(tensor.data_ptr() % 16 for tensor in tensors)


def _pair_key(values: Tensor, weight: Tensor, count: int, number: int) -> Arguments:
    """What Triton compiles differently of a pair, whose pointers are aligned."""
    return (
        values.get_device(),
        values.dtype,
        weight.dtype,
        count % 16 == 0,
        count == 1,
        number % 16 == 0,
        number == 1,
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

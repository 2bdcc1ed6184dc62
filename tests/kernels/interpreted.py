"""Checks of the Triton programs on a CPU, by Triton's interpreter; `test_triton.py` runs this file.

    TRITON_INTERPRET=1 python tests/kernels/interpreted.py

The interpreter must be asked for before Triton is imported, so this is a process of its own. It
prints a line for each check: its name, and what went wrong.
"""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
# Only what is tried here: the whole package takes seconds to import.
package = types.ModuleType("anyprec")
package.__path__ = [str(ROOT / "anyprec")]
sys.modules["anyprec"] = package
sys.path.insert(0, str(ROOT))

from anyprec.kernels import Grid, Operand, choosing, kernels_off, triton_kernel  # noqa: E402
from anyprec.nn.channels import GroupedAxis, sizes_of_channels  # noqa: E402
from anyprec.nn.functional import fake_quantize  # noqa: E402
from tests.kernels.oracle import step_gradient  # noqa: E402

CANDIDATES = range(2, 9)
SMALL = [1, 2, 7, 16, 255, 1000, 1024, 1025]


def grids(bits: int) -> list[tuple[int, int]]:
    """Symmetric, never negative, lopsided."""
    half, zero = 2 ** (bits - 1), 2**bits // 3
    return [(-half, half - 1), (0, 2**bits - 1), (-zero, 2**bits - 1 - zero)]


def run(values: Tensor, step: Tensor, upstream: Tensor, **arguments: Any) -> tuple[Tensor, ...]:
    """The result, the gradient of the values and that of the step sizes."""
    values, step = values.detach().requires_grad_(), step.detach().clone().requires_grad_()
    result = fake_quantize(values, step, **arguments)
    return (result.detach(), *torch.autograd.grad(result, (values, step), upstream))


def require_same(values: Tensor, step: Tensor, upstream: Tensor, **arguments: Any) -> Tensor:
    """Outputs and gradients of values, bit for bit; returns the gradient of the step sizes."""
    mine = run(values, step, upstream, **arguments)
    with kernels_off():
        theirs = run(values, step, upstream, **arguments)
    assert mine[0].stride() == theirs[0].stride()
    integer = torch.int32 if values.element_size() == 4 else torch.int16
    for one, other in zip(mine[:2], theirs[:2], strict=True):
        assert torch.equal(one.contiguous().view(integer), other.contiguous().view(integer))
    return mine[2]


def require_close(of_step: Tensor, expected: tuple[Tensor, Tensor]) -> None:
    assert (of_step - expected[0]).abs() <= 1e-6 * expected[1]


def tensors_at(bits: int) -> None:
    for qmin, qmax in grids(bits):
        for count in [*SMALL, 70_001] if qmin < 0 < qmax == -qmin - 1 else SMALL:
            values, upstream = torch.randn(count) * qmax / 2, torch.randn(count)
            step = torch.tensor([9.0, -0.3 if count % 2 else 0.7])
            # The interpreter takes as long for a small block as for a large one.
            triton_kernel.BLOCK = 16_384 if count > 10_000 else 1024
            of_step = require_same(values, step, upstream, row=1, qmin=qmin, qmax=qmax)
            assert of_step[0] == 0
            expected = step_gradient(upstream, values, step[1], qmin, qmax)
            require_close(of_step[1], expected)


def weights_at(bits: int) -> None:
    qmin, qmax = grids(bits)[0]
    for shape, axis in (
        ((8, 3, 3, 3), 0),
        ((5, 1, 3, 3), 0),
        ((3, 1500), 0),
        ((4, 6, 2, 2), 1),
        ((4, 3, 20, 20), GroupedAxis(2)),
    ):
        channels = axis.groups * shape[1] if isinstance(axis, GroupedAxis) else shape[axis]
        step = (torch.rand(3, channels) + 0.05) * torch.tensor([1.0, -1.0, 1.0])[:, None]
        values, upstream = torch.randn(shape) * qmax / 4, torch.randn(shape)
        arguments = {"row": 1, "qmin": qmin, "qmax": qmax, "axis": axis}
        of_step = require_same(values, step, upstream, **arguments)
        assert not of_step[[0, 2]].any()
        for channel in range(channels):
            if not isinstance(axis, GroupedAxis):
                of_channel = [tensor.select(axis, channel) for tensor in (upstream, values)]
                expected = step_gradient(*of_channel, step[1, channel], qmin, qmax)
                require_close(of_step[1, channel], expected)


def special_values() -> None:
    qmin, qmax = -8, 7
    for size in (0.25, 0.1, 1e-38, 2.0**-130, 0.0, 1e36):
        step = max(size, 2.0**-120)
        ties = (torch.arange(qmin - 2, qmax + 3) + 0.5) * step
        borders = torch.tensor([qmin * step, qmax * step])
        around = [torch.nextafter(borders, torch.tensor(to)) for to in (-math.inf, math.inf)]
        unusual = [0.0, -0.0, 1e-45, -1e-45, 1e-39, -0.1 * step, math.inf, -math.inf, 3e38]
        unusual += [2.0**23 * step, -(2.0**22 + 0.5) * step]
        values = torch.cat([ties, borders, *around, torch.tensor(unusual)])
        # Whole vectors: torch's own gradient of NaN differs in the rest.
        values = torch.cat([values, values.new_full((-len(values) % 64,), math.nan)])
        upstream = torch.randn(len(values))
        require_same(values, torch.tensor([size]), upstream, qmin=qmin, qmax=qmax)
        rows, sizes = values.reshape(2, -1), torch.full((2,), size)
        require_same(rows, sizes, upstream.reshape(2, -1), qmin=qmin, qmax=qmax, axis=0)


def layouts() -> None:
    images, tokens = torch.randn(3, 5, 6, 7), torch.randn(4, 37, 24)
    for values in (
        images.contiguous(memory_format=torch.channels_last),
        images[:, ::2],
        tokens[:, 0],  # a class token: each of them a row, far from the next one
        tokens.permute(2, 0, 1),
        tokens[:, :1].expand(-1, 5, -1),
        tokens[::2, ::3, 1::4],
        torch.randn(2000)[1:],
        torch.randn(()),
    ):
        for upstream in (torch.randn(values.shape), torch.ones(()).expand(values.shape)):
            require_same(values, torch.tensor(0.2), upstream, qmin=-4, qmax=3)
    weight = torch.randn(4, 6, 3, 3).contiguous(memory_format=torch.channels_last)
    require_same(weight, torch.rand(4) + 0.1, torch.randn(4, 6, 3, 3), qmin=-4, qmax=3, axis=0)


def narrow_values() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        values, upstream = torch.randn(32, 50).to(dtype), torch.randn(32, 50).to(dtype)
        for axis, count in ((None, 1), (0, 32)):
            step = torch.rand(count) * 0.02 + 0.01
            arguments = {"qmin": -128, "qmax": 127, "axis": axis}
            mine = run(values, step, upstream, **arguments)
            wide = run(values.float(), step, upstream.float(), **arguments)
            expected = wide[0].to(dtype)
            if dtype == torch.bfloat16:
                # A GPU rounds to even here, and the interpreter cuts off.
                expected = (wide[0].view(torch.int32) & -(2**16)).view(torch.float32).to(dtype)
            assert torch.equal(mine[0], expected)
            assert torch.equal(mine[1], wide[1].to(dtype))
            assert torch.equal(mine[2], wide[2])
    largest = torch.tensor([65504.0, -65504.0, math.nan]).half()
    quantized = fake_quantize(largest, torch.tensor([8.7e3]), qmin=-8, qmax=7)
    assert quantized[:2].isfinite().all()
    assert quantized[2].isnan()


def pairs() -> None:
    """What one launch makes of two operands is what two make of them."""
    kernel = triton_kernel.TritonKernel()
    images, pixels = torch.randn(3, 5, 6, 7), torch.randn(2, 4, 30, 40)
    grouped = GroupedAxis(2)
    for values, shape, axis in (
        (images.contiguous(memory_format=torch.channels_last), (8, 5, 3, 3), 0),
        (pixels, (6, 1, 3, 3), 0),
        (images[:, ::2], (4, 6, 2, 2), 1),
        (torch.randn(7, 16), (3, 1500), 0),
        (torch.randn(1), (1, 1), 0),
        (torch.randn(70_001), (4, 3, 20, 20), grouped),
        (torch.randn(2000)[1:], (8, 16), 0),  # as Triton's vectors do not begin
        (torch.randn(32, 50).bfloat16(), (8, 16), 0),
    ):
        weight = torch.randn(shape)
        sizes = sizes_of_channels(weight.shape, axis)
        input_ = Operand(values, torch.tensor([9.0, -0.3]), Grid(1, -8, 7, 0.5))
        step = torch.rand(3, sizes.steps) + 0.05
        operand = Operand(weight, step, Grid(2, -4, 3, 0.25), sizes)
        alone = kernel.quantize(*input_), kernel.quantize(*operand)
        of_input, of_weight = torch.randn_like(alone[0]), torch.randn_like(weight)
        alone += kernel.quantize_backward(of_input, *input_)
        alone += kernel.quantize_backward(of_weight, *operand)
        together = kernel.quantize_pair(input_, operand)
        together += kernel.quantize_pair_backward(of_input, of_weight, input_, operand)
        for one, other in zip(together, alone, strict=True):
            assert one.stride() == other.stride()
            assert torch.equal(one, other)


def checks() -> dict[str, Callable[[], None]]:
    """Every check, by name."""
    every = {"special values": special_values, "layouts": layouts, "narrow values": narrow_values}
    every["pairs"] = pairs
    for bits in CANDIDATES:
        every[f"tensors at {bits} bits"] = lambda bits=bits: tensors_at(bits)
        every[f"weights at {bits} bits"] = lambda bits=bits: weights_at(bits)
    return every


def main() -> None:
    torch.set_num_threads(1)
    # Nothing is built or loaded by an import.
    assert not choosing._MACHINE.plain
    # On a CPU the programs run in the place of the C kernel.
    choosing._make = lambda _: (triton_kernel.TritonKernel(), "interpreted")
    for name, check in checks().items():
        torch.manual_seed(0)
        try:
            check()
        except Exception as error:  # noqa: BLE001 (it is the parent that fails)
            print(f"{name}\t{error!r}"[:500].replace("\n", " "))  # noqa: T201
        else:
            print(f"{name}\tright")  # noqa: T201


if __name__ == "__main__":
    main()

"""The Triton programs: what they compute, by Triton's interpreter, and what they compile to."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from anyprec.kernels import Grid, Operand, triton_programs  # noqa: E402
from anyprec.kernels.triton_kernel import Launcher, TritonKernel  # noqa: E402
from anyprec.nn.channels import sizes_of_channels  # noqa: E402
from anyprec.nn.functional import fake_quantize  # noqa: E402

ROOT = Path(__file__).parents[2]
NAMES = ["special values", "layouts", "narrow values", "pairs"]
NAMES += [f"{what} at {bits} bits" for bits in range(2, 9) for what in ("tensors", "weights")]


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    """What `interpreted.py` printed of each check."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "kernels" / "interpreted.py")],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(line.split("\t", 1) for line in done.stdout.splitlines())


@pytest.mark.parametrize("name", NAMES)
def test_the_programs_compute_what_torchs_operations_compute(
    interpreted: dict[str, str], name: str
) -> None:
    assert interpreted[name] == "right"


def test_every_check_of_the_interpreter_is_a_test(interpreted: dict[str, str]) -> None:
    assert sorted(interpreted) == sorted(NAMES)


FLOATS = ("low", "high", "factor", "weight_low", "weight_high")
VALUES = ("values", "result", "gradient", "of_values")
WEIGHTS = ("weight", "weight_result", "weight_gradient", "of_weight")
STEPS = ("steps", "of_steps", "sums", "weight_steps", "of_weight_steps")
ALIGNED = (*VALUES, *WEIGHTS, "sums", "count", "weight_count", "inner")
PROGRAMS: dict[str, dict[str, int]] = {
    "quantize_tensor": {"BLOCK": 1024},
    "tensor_gradients": {"BLOCK": 1024},
    "step_gradient": {"BLOCK": 1024, "STEPS": 8},
    "quantize_channels": {"BLOCK": 1024},
    "channel_gradients": {"BLOCK": 1024, "ROWS": 8, "REPEATED": 0},
    "quantize_pair": {"BLOCK": 1024},
    "pair_gradients": {"BLOCK": 1024, "WEIGHT_BLOCK": 1024, "ROWS": 8, "REPEATED": 0},
}


def type_of(argument: str, dtype: str) -> str:
    if argument in VALUES:
        return f"*{dtype}"
    # Weights stay in 32 bits where the input has 16.
    if argument in (*STEPS, *WEIGHTS):
        return "*fp32"
    return "fp32" if argument in FLOATS else "i32"


def compiled_to(name: str, dtype: str, capability: int) -> Any:
    """What Triton compiles a program to for a GPU that need not be there."""
    program, constants = getattr(triton_programs, name), PROGRAMS[name]
    arguments = list(program.arg_names)
    source = ASTSource(
        fn=program,
        signature={
            argument: "constexpr" if argument in constants else type_of(argument, dtype)
            for argument in arguments
        },
        constexprs={(arguments.index(constant),): value for constant, value in constants.items()},
        attrs={
            (number,): [["tt.divisibility", 16]]
            for number, argument in enumerate(arguments)
            if argument in ALIGNED
        },
    )
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": 4}).asm


@pytest.mark.parametrize(("dtype", "capability"), [("fp32", 80), ("fp32", 90), ("bf16", 90)])
@pytest.mark.parametrize("name", PROGRAMS)
def test_they_compile_to_wide_loads_and_to_division_as_ieee_754_has_it(
    name: str, dtype: str, capability: int
) -> None:
    assembly = compiled_to(name, dtype, capability)
    assert assembly["cubin"]
    text = assembly["ptx"]
    assert not re.search(r"div\.(full|approx)", text)
    # These lose NaN, or the sign of zero.
    assert not re.search(r"(min|max)(\.\w+)*\.f32", text)
    if name != "step_gradient":
        assert "div.rn.f32" in text
        assert re.search(r"ld\.global[^;]*\.v4", text)
        assert re.search(r"st\.global[^;]*\.v4", text)
    if name.startswith("quantize") and dtype == "bf16":
        assert "cvt.rn.bf16" in text  # rounded, not cut off


class Program:
    """Stands for what Triton compiles: notes how it and what it compiled are launched."""

    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **constants: Any) -> Any:
            self.launches.append((grid, arguments, constants))
            return self

        return launch

    def run(self, *arguments: Any) -> None:
        self.launches.append(arguments)


def test_a_program_is_compiled_once_for_each_key_and_launched_with_all_its_arguments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    active = SimpleNamespace(get_current_stream=lambda device: f"stream of {device}")
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=active))
    program = Program()
    launch = Launcher(program)
    first, second = torch.zeros(3), torch.ones(4)
    launch(3, ("a",), (first,), (1, 2.0), {"BLOCK": 1024})
    launch(5, ("a",), (second,), (3, 4.0), {"BLOCK": 1024})
    launch(5, ("b",), (first,), (5, 6.0), {"BLOCK": 64})
    launch(7, ("a",), (first,), (7, 8.0), {"BLOCK": 1024})
    again = (1, 1, "stream of -1", "function", "metadata", None, None, None)
    assert program.launches == [
        ((3,), (first, 1, 2.0), {"BLOCK": 1024, "num_warps": 4}),
        (5, *again, second.data_ptr(), 3, 4.0, 1024),
        ((5,), (first, 5, 6.0), {"BLOCK": 64, "num_warps": 1}),
        (7, *again, first.data_ptr(), 7, 8.0, 1024),
    ]


def placed(tensor: Tensor, device: str, start: int) -> Tensor:
    """A copy on a device that begins so many values behind an aligned address."""
    memory = torch.zeros(tensor.numel() + start, dtype=tensor.dtype, device=device)
    memory[start:] = tensor.flatten().to(device)
    return memory[start:].reshape(tensor.shape)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("start", [0, 1])
def test_on_a_gpu_results_are_those_of_a_cpu(
    axis: int | None, dtype: torch.dtype, start: int
) -> None:
    # The second launch is that of a kept program; odd sizes are other programs.
    for count in (4096, 4096, 5001, 1):
        values, upstream = torch.randn(2, 8, count).to(dtype).unbind()
        step = torch.rand(3, 8 if axis == 0 else 1) * 0.02 + 0.01
        results = []
        for device in ("cpu", "cuda"):
            input_ = placed(values, device, start).requires_grad_()
            steps = step.to(device).requires_grad_()
            result = fake_quantize(input_, steps, row=1, qmin=-128, qmax=127, axis=axis)
            output_gradient = placed(upstream, device, start)
            gradients = torch.autograd.grad(result, (input_, steps), output_gradient)
            results.append([tensor.cpu() for tensor in (result.detach(), *gradients)])
        for mine, theirs in zip(results[1][:2], results[0][:2], strict=True):
            assert torch.equal(mine, theirs)
        torch.testing.assert_close(results[1][2], results[0][2], rtol=1e-4, atol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8, 5, 3, 3), (12, 1, 3, 3), (16, 48)])
def test_on_a_gpu_pairs_are_what_two_launches_make(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    kernel = TritonKernel()
    for count in (4096, 4096, 5001, 1):
        values, weight = torch.randn(count).to("cuda", dtype), torch.randn(shape).cuda()
        sizes = sizes_of_channels(weight.shape, 0)
        steps = torch.rand(3).cuda() + 0.05, torch.rand(3, sizes.steps).cuda() + 0.05
        input_ = Operand(values, steps[0], Grid(1, -8, 7, 0.5))
        operand = Operand(weight, steps[1], Grid(2, -4, 3, 0.25), sizes)
        of_input, of_weight = torch.randn_like(values), torch.randn_like(weight)
        together = kernel.quantize_pair(input_, operand)
        together += kernel.quantize_pair_backward(of_input, of_weight, input_, operand)
        alone = kernel.quantize(*input_), kernel.quantize(*operand)
        alone += kernel.quantize_backward(of_input, *input_)
        alone += kernel.quantize_backward(of_weight, *operand)
        for one, other in zip(together, alone, strict=True):
            assert torch.equal(one, other)

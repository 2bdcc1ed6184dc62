"""Which kernel runs: by device and dtype of the tensors, at every call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from anyprec.kernels.building import BuildError, load
from anyprec.kernels.c_kernel import CKernel
from anyprec.kernels.fused import FusedKernel
from anyprec.kernels.meta_kernel import MetaKernel

# A derived class of these may watch operations, or have no memory of its own.
_PLAIN = (Tensor, nn.Parameter)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_MOST_VALUES = 2**30
"""Kernels of GPUs count in 32 bits, beyond the end as well."""

# torch has no public names for these. They are all that a call costs, in every pass of a layer.
_watchers: Callable[[], int] = torch._C._len_torch_dispatch_stack  # noqa: SLF001 (see above)
_keys_of: Callable[[Tensor], Any] = torch._C._dispatch_keys  # noqa: SLF001 (see above)


class _Machine:
    """The kernels of this machine, each made when it is first asked for.

    Attributes:
        enabled: Whether kernels run at all.
        reasons: By type of device: how its kernel was made, or why there is none.
        plain: The dispatch keys of tensors that a kernel may read, and the kernel.
    """

    def __init__(self) -> None:
        self.enabled = True
        self.reasons: dict[str, str] = {}
        self.plain: dict[int, FusedKernel] = {}
        self._kernels: dict[str, FusedKernel | None] = {}
        self._lock = Lock()

    def kernel(self, device: str) -> FusedKernel | None:
        """The kernel of a type of device, made now if need be; None if there is none."""
        if device not in self._kernels:
            with self._lock:
                if device not in self._kernels:  # or another thread was first
                    self._make(device)
        return self._kernels.get(device)

    def _make(self, device: str) -> None:
        kernel, reason = _make(device)
        if kernel is not None:
            examples = []
            for inference in (False, True):
                with torch.inference_mode(mode=inference):
                    examples.append(torch.empty(0, device=device))
            if type(examples[0]) is not Tensor:
                return  # a mode makes other tensors now: the next call tries again
            for example in examples:
                self.plain[_keys_of(example).raw_repr()] = kernel
        self._kernels[device], self.reasons[device] = kernel, reason


# What this process has loaded, and the one option. Nothing is loaded at import.
_MACHINE = _Machine()


def kernel_for(values: Tensor, step: Tensor, gradient: Tensor | None = None) -> FusedKernel | None:
    """The kernel that quantizes `values` with `step`; None if torch's operations are to do so.

    None where somebody watches operations (a compiler, a mode, a derived class of tensors), and for
    tensors that are not plain memory on one device.

    Args:
        values: What is quantized.
        step: Step sizes.
        gradient: Of the result, in a backward pass.
    """
    if not _MACHINE.enabled or torch.compiler.is_compiling():
        return None
    # On the meta device a mode counts launches: there it is shown what a GPU would run.
    if _watchers() > 0 and not values.is_meta:
        return None
    kernel = _kernel_of(values)
    if kernel is None or _kernel_of(step) is not kernel or not _is_readable(values, step):
        return None
    if gradient is not None and _kernel_of(gradient) is not kernel:
        return None
    return kernel


def serves(kernel: FusedKernel, *tensors: Tensor) -> bool:
    """Whether `kernel`, which served a layer before, may read these tensors of it now.

    Args:
        kernel: What `kernel_for` returned for tensors of the same dtypes.
        *tensors: Those that may be others since.
    """
    if not _MACHINE.enabled or torch.compiler.is_compiling():
        return False
    if _watchers() > 0 and not tensors[0].is_meta:
        return False
    for tensor in tensors:
        if _kernel_of(tensor) is not kernel or not 0 < tensor.numel() <= _MOST_VALUES:
            return False
    return True


def _is_readable(values: Tensor, step: Tensor) -> bool:
    """Whether kernels know the dtypes, the number of values and the layout of the step sizes."""
    return (
        step.dtype is torch.float32
        and values.dtype in _DTYPES
        and 0 < values.numel() <= _MOST_VALUES
        and step.is_contiguous()
        # Only of these may there be several.
        and (not values.is_cuda or values.get_device() == step.get_device())
    )


def _kernel_of(tensor: Tensor) -> FusedKernel | None:
    """The kernel of a tensor's device; None too if it is not just numbers in memory.

    The dispatch keys say so: those of a sparse or batched tensor, of a view with the sign turned,
    or of zeros without memory are not those of a plain one.
    """
    if type(tensor) not in _PLAIN:
        return None
    keys = _keys_of(tensor).raw_repr()
    kernel = _MACHINE.plain.get(keys)
    if kernel is None and _MACHINE.kernel(tensor.device.type) is not None:
        kernel = _MACHINE.plain.get(keys)
    return kernel


def use_kernels(*, enabled: bool) -> None:
    """Let kernels run from now on in this process, or torch's operations on every device.

    Outputs and gradients are the same bit for bit, but for gradients of step sizes, whose sums have
    another order.
    """
    _MACHINE.enabled = enabled


@contextmanager
def kernels_off() -> Iterator[None]:
    """In the block torch's operations run, in all threads of this process."""
    before = _MACHINE.enabled
    _MACHINE.enabled = False
    try:
        yield
    finally:
        _MACHINE.enabled = before


def describe(device: str = "cpu") -> str:
    """What quantizes tensors on a type of device, and why; the C kernel is built if need be.

    Example:
        >>> describe("mps")
        "aten: there is no kernel for devices of type 'mps'"
    """
    if not _MACHINE.enabled:
        return "aten: kernels are off (anyprec.kernels.use_kernels)"
    kernel = _MACHINE.kernel(device)
    name = "aten" if kernel is None else kernel.name
    return f"{name}: {_MACHINE.reasons[device]}"


def _make(device: str) -> tuple[FusedKernel | None, str]:
    """The kernel of a type of device, if there is one, and how it was made or why there is none."""
    if device == "cpu":
        try:
            library, reason = load()
        except BuildError as error:
            return None, str(error)
        return CKernel(library), reason
    if device == "meta":
        return MetaKernel(), "an operation for each launch of a GPU"
    if device != "cuda":
        return None, f"there is no kernel for devices of type {device!r}"
    if find_spec("triton") is None:
        return None, "the package triton is not installed"
    # Only here, since importing it takes a while.
    from anyprec.kernels.triton_kernel import TritonKernel  # noqa: PLC0415

    return TritonKernel(), "compiled by triton on first use"

"""Which kernel runs: by device and dtype of the tensors, at every call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from threading import Lock

import torch
from torch import Tensor, nn

from anyprec.kernels.building import BuildError, load
from anyprec.kernels.c_kernel import CKernel
from anyprec.kernels.fused import FusedKernel
from anyprec.kernels.meta_kernel import MetaKernel

# A derived class of these may watch operations, or have no memory of its own.
_PLAIN = (Tensor, nn.Parameter)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_MOST_VALUES = 2**31 - 1
"""Kernels of GPUs count in 32 bits."""

# Both without another call, since every quantizer asks in every pass; torch has no public names.
_watchers: Callable[[], int] = torch._C._len_torch_dispatch_stack  # noqa: SLF001 (see above)
_is_transformed: Callable[[Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor  # noqa: SLF001


class _Machine:
    """The kernels of this machine, each made when it is first asked for.

    Attributes:
        enabled: Whether kernels run at all.
        reasons: By type of device: how its kernel was made, or why there is none.
    """

    def __init__(self) -> None:
        self.enabled = True
        self.reasons = {"meta": "an operation for each launch of a GPU"}
        self._kernels: dict[str, FusedKernel | None] = {"meta": MetaKernel()}
        self._lock = Lock()

    def kernel(self, device: str) -> FusedKernel | None:
        """The kernel of a type of device, made now if need be; None if there is none."""
        try:
            return self._kernels[device]
        except KeyError:
            pass
        with self._lock:
            if device not in self._kernels:
                self._kernels[device], self.reasons[device] = _make(device)
        return self._kernels[device]


# What this process has loaded, and the one option. Nothing is loaded at import.
_MACHINE = _Machine()


def kernel_for(values: Tensor, step: Tensor) -> FusedKernel | None:
    """The kernel that quantizes `values` with `step`; None if torch's operations are to do so.

    None where somebody watches operations (a compiler, a mode, a derived class of tensors), and for
    tensors that are not plain memory on one device.
    """
    if not _MACHINE.enabled or torch.compiler.is_compiling():
        return None
    if not (is_plain(values) and is_plain(step)) or values.dtype not in _DTYPES:
        return None
    if step.dtype != torch.float32 or not step.is_contiguous():
        return None
    if not 0 < values.numel() <= _MOST_VALUES:
        return None
    device = values.device
    # On the meta device a mode counts launches: there it is shown what a GPU would run.
    if device != step.device or (_watchers() > 0 and device.type != "meta"):
        return None
    return _MACHINE.kernel(device.type)


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is just numbers in memory, as it says: no view of another kind."""
    return (
        type(tensor) in _PLAIN
        and tensor.layout == torch.strided
        and not tensor.is_neg()
        and not _is_transformed(tensor)
    )


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
    if device != "cuda":
        return None, f"there is no kernel for devices of type {device!r}"
    if find_spec("triton") is None:
        return None, "the package triton is not installed"
    # Only here, since importing it takes a while.
    from anyprec.kernels.triton_kernel import TritonKernel  # noqa: PLC0415

    return TritonKernel(), "compiled by triton on first use"

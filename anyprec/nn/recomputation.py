"""Computing a tensor again in the backward pass instead of keeping it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class _View:
    """What part of the tensor an operator saved."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


def recomputing(
    tensor: Tensor, compute: Callable[[], Tensor], sources: Sequence[Tensor]
) -> AbstractContextManager[Any]:
    """In the block, operators that would save `tensor` or a view of it for backward save nothing.

    Args:
        tensor: What `compute` returns, bit for bit and in the same layout.
        compute: Called in the backward pass, without gradients, at every use.
        sources: What it computes from.

    Raises:
        RuntimeError: In the backward pass, if a source was changed in place since, as torch says of
            any saved tensor.
    """
    # Operators save the tensor itself or views of it: all have its storage.
    storage = tensor.untyped_storage().data_ptr()
    versions = _versions(sources)

    def pack(saved: Tensor) -> Tensor | _View:
        if saved.untyped_storage().data_ptr() != storage:
            return saved
        return _View(saved.shape, saved.stride(), int(saved.storage_offset()))

    def unpack(saved: Tensor | _View) -> Tensor:
        if not isinstance(saved, _View):
            return saved
        if _versions(sources) != versions:
            msg = "a weight or step size was changed in place between the forward pass and its "
            msg += "backward pass, which computes the quantized weight again: call backward before "
            msg += "the optimizer's step"
            raise RuntimeError(msg)
        with torch.no_grad():
            return compute().as_strided(saved.shape, saved.stride, saved.offset)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    """How often each tensor was changed in place."""
    return [tensor._version for tensor in tensors]  # noqa: SLF001 (torch has no public name for it)

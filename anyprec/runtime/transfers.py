"""Moving values between the host and a device without making one wait for the other.

A single number that Python reads from a device (`float(tensor)`, `if tensor:`) stops the host until
the device has done all that it was asked for. So numbers are read together, and late.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_WITHOUT_QUEUE = frozenset({"cpu", "meta"})


class Transfer:
    """Copies a tensor to the host while the device goes on with what it is asked for later.

    Args:
        tensor: On any device.
    """

    def __init__(self, tensor: Tensor) -> None:
        device = tensor.device.type
        self._is_copied: torch.cuda.Event | None = None
        # Of other accelerators it is not known when a copy that was only queued has arrived.
        self._copy = tensor.detach().to(
            "cpu", non_blocking=device == "cuda" or device in _WITHOUT_QUEUE
        )
        if device == "cuda":
            with torch.cuda.device(tensor.device):
                self._is_copied = torch.cuda.Event()
                self._is_copied.record()

    def result(self) -> Tensor:
        """The copy, as soon as it is there; what was asked for after it is not waited for."""
        if self._is_copied is not None:
            self._is_copied.synchronize()
        return self._copy


def numbers_of(scalars: Sequence[Tensor]) -> list[float]:
    """The values of scalars of one dtype as Python numbers, in one transfer.

    What is sharded over processes (FSDP) is read one by one.
    """
    if not scalars:
        return []
    if any(type(scalar) is not Tensor for scalar in scalars):
        return [scalar.item() for scalar in scalars]
    # A network may be spread over several devices.
    together = [scalar.to(scalars[0].device) for scalar in scalars]
    numbers: list[float] = torch.stack(together).tolist()
    return numbers


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on a device, where the host does not wait for the copy if the device is CUDA."""
    return tensor.to(device, non_blocking=device.type == "cuda")

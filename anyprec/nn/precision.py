"""Modules whose floating-point tensors keep 32 bits when their network gets fewer.

`model.half()` and the like are for weights and activations. Step sizes are far smaller: rounded to
float16 most of those at 8 bits would lose digits, and some would be zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from anyprec.nn.functional import widened


class FullPrecision(nn.Module):
    """A module that follows its network to other devices and to float64, but not below float32."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:  # noqa: FBT001, FBT002 (the signature of nn.Module)
        def apply(tensor: Tensor) -> Tensor:
            applied = fn(tensor)
            if not applied.is_floating_point() or applied.element_size() >= 4:
                return applied
            # What was asked for besides the dtype is the device.
            return tensor.to(device=applied.device, dtype=torch.float32)

        return super()._apply(apply, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        # Loading with `assign=True` takes over the dtype of what is loaded.
        for tensor in (*self._parameters.values(), *self._buffers.values()):
            if tensor is not None and tensor.is_floating_point():
                tensor.data = widened(tensor.data)

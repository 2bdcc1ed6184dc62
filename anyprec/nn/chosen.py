"""Which candidate is active, as data: what compiled networks read instead of Python numbers.

A number would be part of the compiled program, so that each precision would compile one of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Chosen(nn.Module):
    """Indices of what is active, a buffer of shape `(1,)` for each name.

    It is a child of the layer or norm whose choice it holds, and no part of the quantizers or
    copies that it chooses from: the views of a network share those, and each has its own precision.

    Args:
        names: Of the indices, which are 0 at first.
        device: Where they are.
    """

    # Of a layer.
    weight: Tensor
    input: Tensor
    # Of a norm.
    row: Tensor
    statistics: Tensor

    def __init__(self, *names: str, device: torch.device) -> None:
        super().__init__()
        for name in names:
            index = torch.zeros(1, dtype=torch.int64, device=device)
            self.register_buffer(name, index, persistent=False)

    def choose(self, **indices: int) -> None:
        """Set these indices, by name."""
        for name, index in indices.items():
            # Past nn.Module.__getattr__, since `set_bits` does this for every layer.
            self._buffers[name].fill_(index)  # type: ignore[union-attr]

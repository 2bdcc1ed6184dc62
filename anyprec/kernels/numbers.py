"""What every kernel makes of small steps and narrow dtypes.

Arithmetic is in 32 bits at least, whatever dtype values have: in bfloat16 one 8-bit code in twelve
comes out wrong.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEP_FLOOR = 2.0**-120
"""Step sizes are used as `max(|step|, STEP_FLOOR)`.

So an optimizer step across zero cannot corrupt a layer. Products of it and a code are still normal
numbers of float32, and no weight is too small to be quantized: a norm behind it may enlarge it.
"""


def widened(values: Tensor) -> Tensor:
    """`values` in at least 32 bits."""
    if values.element_size() < 4:
        return values.float()
    return values


def narrowed(result: Tensor, dtype: torch.dtype) -> Tensor:
    """The result of a computation, in the dtype that was asked for."""
    if dtype == torch.float16 and result.dtype != dtype:
        # The code next to the largest number may stand for one beyond it.
        limit = torch.finfo(dtype).max
        result = result.clamp(-limit, limit)
    return result.to(dtype)

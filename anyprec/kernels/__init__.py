"""Fake quantization in one operation per device: forward, and backward with the step's gradient.

torch's operations read and write an activation some ten times to fake-quantize it; these kernels do
so once, with a call that is short on the host as well. They know no autograd, which is in
`nn/straight_through.py`, and no layers.

Which one runs is chosen by device and dtype at each call (`choosing.py`):

- `c_kernel.py`, on a CPU: C code that the system's compiler builds on first use (`building.py`).
- `triton_kernel.py`, on CUDA and ROCm devices.
- `meta_kernel.py`, on the meta device: an operation for each launch that a GPU would make.
- None, anywhere else, without a compiler, and where somebody watches operations: torch's own.

`use_kernels(enabled=False)` turns them off, and `describe()` says what runs and why.
"""

from anyprec.kernels.choosing import describe, kernel_for, kernels_off, serves, use_kernels
from anyprec.kernels.fused import FusedKernel, Grid, Operand, Sizes
from anyprec.kernels.numbers import STEP_FLOOR, narrowed, widened

__all__ = [
    "STEP_FLOOR",
    "FusedKernel",
    "Grid",
    "Operand",
    "Sizes",
    "describe",
    "kernel_for",
    "kernels_off",
    "narrowed",
    "serves",
    "use_kernels",
    "widened",
]

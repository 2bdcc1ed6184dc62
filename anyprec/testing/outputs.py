"""Outputs of a network: running it, and what is required of the tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from anyprec.nn.operators import tensors_in
from anyprec.testing.report import BrokenPromiseError

_SEED = 5


def run(model: nn.Module, images: Tensor, *, train: bool = False) -> list[Tensor]:
    """All tensors of the output, in train or eval mode.

    Dropout draws the same in every run, and buffers are left as they were. The model is in eval
    mode afterwards.
    """
    model.train(train)
    torch.manual_seed(_SEED)
    with restoring_buffers(model), torch.no_grad():
        outputs = list(tensors_in([model(images)]))
    model.eval()
    return outputs


@contextmanager
def restoring_buffers(model: nn.Module) -> Iterator[None]:
    """Undo what a forward pass in train mode does to buffers, such as norm statistics."""
    saved = {}
    if model.training:
        saved = {name: buffer.clone() for name, buffer in model.named_buffers()}
    yield
    with torch.no_grad():
        for name, buffer in saved.items():
            model.get_buffer(name).copy_(buffer)


def are_equal(first: list[Tensor], second: list[Tensor]) -> bool:
    """Whether two outputs of the same structure are equal, bit for bit."""
    return all(torch.equal(*pair) for pair in zip(first, second, strict=True))


def require(holds: bool, message: str) -> None:  # noqa: FBT001 (reads as an assertion)
    """Raise `BrokenPromiseError` with this message unless `holds`."""
    if not holds:
        raise BrokenPromiseError(message)


def require_finite(outputs: list[Tensor]) -> None:
    """Require at least one tensor, and no infinity or NaN."""
    require(bool(outputs), "no output")
    for output in outputs:
        finite = bool(torch.isfinite(output.float()).all())
        require(finite, "the output is not finite")


def require_same(outputs: list[Tensor], expected: list[Tensor]) -> None:
    """Require outputs that are equal bit for bit, in dtype and shape too."""
    require(len(outputs) == len(expected), f"{len(outputs)} outputs instead of {len(expected)}")
    for output, wanted in zip(outputs, expected, strict=True):
        require(
            output.shape == wanted.shape and output.dtype == wanted.dtype,
            f"{output.dtype} {tuple(output.shape)} instead of {wanted.dtype} {tuple(wanted.shape)}",
        )
        if not torch.equal(output, wanted):
            difference = float((output.float() - wanted.float()).abs().max())
            msg = f"off by {difference:.3g}"
            raise BrokenPromiseError(msg)

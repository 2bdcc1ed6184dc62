"""Images for a comparison, in pieces that a file accepts and that memory holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from anyprec.errors import BatchError
from anyprec.runtime.batches import Batch, images_of, labels_of, take

_MOST_AT_ONCE = 8
"""Images that run together: the values of all layers are kept for them."""


@dataclass(frozen=True, eq=False)
class Piece:
    """Images that run together.

    Attributes:
        images: On the CPU, float32.
        number: How many count; those behind them fill up a batch.
        labels: Class of each image that counts, if known.
    """

    images: Tensor
    number: int
    labels: Tensor | None


def pieces_of(images: Tensor | Iterable[Batch], *, batch_size: int | None) -> Iterator[Piece]:
    """All images.

    Args:
        images: One tensor, or a loader.
        batch_size: What every piece must have; None for any number.

    Raises:
        BatchError: They are no images.
    """
    size = batch_size or _MOST_AT_ONCE
    batches = [images] if isinstance(images, Tensor) else take(images, None)
    for batch in batches:
        tensor = images_of(batch).detach().cpu().float()
        classes = None if isinstance(batch, Tensor) else _classes(batch)
        for start in range(0, len(tensor), size):
            part = tensor[start : start + size]
            number = len(part)
            if batch_size is not None and number < size:
                repeats = -(-size // number)
                part = torch.cat([part] * repeats)[:size]
            chosen = None if classes is None else classes[start : start + number]
            yield Piece(part.contiguous(), number, chosen)


def _classes(batch: Batch) -> Tensor | None:
    """Class indices in a batch; None if it has none."""
    try:
        labels = labels_of(batch)
    except BatchError:
        return None
    return None if labels.is_floating_point() or labels.ndim != 1 else labels.cpu()

"""What a data loader yields: taking images and labels out of a batch, and moving them to a device."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Batch = Any
"""A tensor of images, a pair (images, labels), or a mapping with such values."""

_IMAGE_KEYS = ("image", "images", "pixel_values", "input", "x")
_LABEL_KEYS = ("label", "labels", "target", "targets", "y")


def images_of(batch: Batch) -> Tensor:
    """The images of a batch.

    Raises:
        TypeError: `batch` is neither a tensor, nor a sequence that starts with one, nor a mapping with a known key.
    """
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in _IMAGE_KEYS if key in batch), None)
    elif isinstance(batch, (tuple, list)):
        found = batch[0] if batch else None
    else:
        found = batch
    if not isinstance(found, Tensor):
        msg = f"cannot find images in a batch of type {type(batch).__name__}: yield a tensor, a pair (images, labels), "
        msg += f"or a mapping with one of {_IMAGE_KEYS}"
        raise TypeError(msg)
    return found


def labels_of(batch: Batch) -> Tensor:
    """The labels of a batch.

    Raises:
        TypeError: `batch` has none.
    """
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in _LABEL_KEYS if key in batch), None)
    else:
        found = batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
    if not isinstance(found, Tensor):
        msg = f"cannot find labels in a batch of type {type(batch).__name__}: yield a pair (images, labels), or a "
        msg += f"mapping with one of {_LABEL_KEYS}"
        raise TypeError(msg)
    return found


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter or buffer; the CPU if there is none."""
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def take(loader: Iterable[Batch], limit: int | None) -> Iterator[Batch]:
    """The first `limit` batches, or all of them."""
    return itertools.islice(loader, limit)

"""What a data loader yields: the images and labels of a batch, and the device that they go to."""

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
        TypeError: `batch` is neither a tensor, nor a sequence that starts with one, nor a mapping
            with a known key.
    """
    images = batch
    if isinstance(batch, Mapping):
        images = _first_value(batch, _IMAGE_KEYS)
    elif isinstance(batch, (tuple, list)) and batch:
        images = batch[0]
    if not isinstance(images, Tensor):
        msg = f"cannot find images in a batch of type {type(batch).__name__}: yield a tensor, a "
        msg += f"pair (images, labels), or a mapping with one of {_IMAGE_KEYS}"
        raise TypeError(msg)
    return images


def labels_of(batch: Batch) -> Tensor:
    """The labels of a batch.

    Raises:
        TypeError: `batch` has none.
    """
    labels = None
    if isinstance(batch, Mapping):
        labels = _first_value(batch, _LABEL_KEYS)
    elif isinstance(batch, (tuple, list)) and len(batch) > 1:
        labels = batch[1]
    if not isinstance(labels, Tensor):
        msg = f"cannot find labels in a batch of type {type(batch).__name__}: yield a pair "
        msg += f"(images, labels), or a mapping with one of {_LABEL_KEYS}"
        raise TypeError(msg)
    return labels


def _first_value(batch: Mapping[str, Any], keys: Iterable[str]) -> Any:
    for key in keys:
        if key in batch:
            return batch[key]
    return None


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter or buffer; the CPU if there is none."""
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def take(loader: Iterable[Batch], limit: int | None) -> Iterator[Batch]:
    """The first `limit` batches, or all of them."""
    return itertools.islice(loader, limit)

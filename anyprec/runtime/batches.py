"""What a data loader yields: the images and labels of a batch, and the device that they go to.

Nothing is converted here. What does not fit is refused with the remedy, since a guess (which axis
holds channels, how bytes are normalised) would be wrong without a word. Whether images fit a
network is the matter of `model/accepted_images.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from anyprec.errors import BatchError

Batch = Any
"""A tensor of images, a pair (images, labels), or a mapping with such values."""

_IMAGE_KEYS = ("image", "images", "pixel_values", "input", "x")
_LABEL_KEYS = ("label", "labels", "target", "targets", "y")


def images_of(batch: Batch) -> Tensor:
    """The images of a batch.

    Raises:
        BatchError: `batch` is neither a tensor, nor a sequence that starts with one, nor a mapping
            with a known key.
    """
    images = batch
    if isinstance(batch, Mapping):
        images = _first_value(batch, _IMAGE_KEYS)
    elif isinstance(batch, (tuple, list)) and batch:
        images = batch[0]
    if not isinstance(images, Tensor):
        msg = f"cannot find images in a batch of type {_description(batch)}: yield a tensor, a "
        msg += f"pair (images, labels), or a mapping with one of {_IMAGE_KEYS}{_remedy(images)}"
        raise BatchError(msg)
    return images


def labels_of(batch: Batch) -> Tensor:
    """The labels of a batch.

    Raises:
        BatchError: `batch` has none, or they are no tensor.
    """
    labels = None
    if isinstance(batch, Mapping):
        labels = _first_value(batch, _LABEL_KEYS)
    elif isinstance(batch, (tuple, list)) and len(batch) > 1:
        labels = batch[1]
    if not isinstance(labels, Tensor):
        msg = f"cannot find labels in a batch of type {_description(batch)}: yield a pair "
        msg += f"(images, labels), or a mapping with one of {_LABEL_KEYS}{_remedy(labels)}"
        raise BatchError(msg)
    return labels


def _first_value(batch: Mapping[str, Any], keys: Iterable[str]) -> Any:
    for key in keys:
        if key in batch:
            return batch[key]
    return None


def _description(batch: Batch) -> str:
    """Type of a batch, and what is in it."""
    kind = type(batch).__name__
    if isinstance(batch, Mapping):
        return f"{kind} with the keys {tuple(batch)}"
    if isinstance(batch, (tuple, list)):
        kinds = [type(value).__name__ for value in batch[:3]]
        more = ", ..." if len(batch) > 3 else ""
        return f"{kind} ({', '.join(kinds)}{more})"
    return kind


def _remedy(value: Any) -> str:
    """What makes a tensor of `value`, if that is known."""
    module = type(value).__module__.partition(".")[0]
    if module == "numpy":
        return "; of a numpy array, torch.from_numpy(array) makes a tensor"
    if module == "PIL":
        return "; of PIL images, a transform such as torchvision.transforms.ToTensor() makes them"
    if isinstance(value, (list, tuple, int)) and not isinstance(value, bool):
        return "; of numbers, torch.tensor(numbers) makes a tensor"
    if isinstance(value, str):
        return "; texts must be numbers first, e.g. class indices"
    return ""


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter or buffer; the CPU if there is none."""
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def take(loader: Iterable[Batch], limit: int | None) -> Iterator[Batch]:
    """The first `limit` batches, or all of them.

    Raises:
        BatchError: `loader` is a tensor, or nothing that can be iterated over.
    """
    if isinstance(loader, Tensor):
        msg = f"the loader is a tensor of shape {tuple(loader.shape)}, which would be taken apart "
        msg += "into single images: pass a list of batches, [images]"
        raise BatchError(msg)
    try:
        batches = iter(loader)
    except TypeError as error:
        msg = f"the loader is a {type(loader).__name__}, which yields no batches ({error}): pass a "
        msg += "DataLoader or a list of batches"
        raise BatchError(msg) from error
    return itertools.islice(batches, limit)

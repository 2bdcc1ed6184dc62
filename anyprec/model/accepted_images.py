"""Which images a network takes, and why it does not run on others.

A network may do anything with its input, so nothing is refused that it runs on. Only an image
without a batch axis is, since a convolution takes it for a batch. If a forward pass fails, the
message compares dtype, axes and channels with those that the network was converted with. If these
are the same, the images are not the cause, and the network's own error is passed on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from anyprec.errors import AnyprecError, BatchError
from anyprec.model.converted import ConvertedModel

_FAILURES = (RuntimeError, ValueError, TypeError, AssertionError, IndexError, AttributeError)
"""What networks raise on an input that does not fit."""


def require_batch_axis(model: ConvertedModel, images: Tensor) -> None:
    """Refuse a single image in the place of a batch.

    Raises:
        BatchError: It has one axis less than the input that the network was converted with, and
            begins with the channels of that.
    """
    sample = model.anyprec_record.facts.example_shape[1:]
    if images.ndim == len(sample) > 0 and images.shape[0] == sample[0]:
        msg = f"images of shape {tuple(images.shape)} have no batch axis, the network takes "
        msg += f"(batch, {', '.join(map(str, sample))}): pass images[None], or let a DataLoader "
        msg += "make batches"
        raise BatchError(msg)


@contextmanager
def explaining_images(
    model: ConvertedModel, images: Tensor, *, only_known: bool = False
) -> Iterator[None]:
    """Say why the network does not run on `images`, if a forward pass in the block fails.

    Args:
        model: The network.
        images: What it is run on.
        only_known: Leave an error as it is unless dtype, axes or channels explain it.

    Raises:
        BatchError: In place of what the network raised, if the images differ in dtype or shape from
            what it was converted with. Errors of our own and a lack of memory are passed on.
    """
    try:
        yield
    except (AnyprecError, torch.OutOfMemoryError):
        raise
    except _FAILURES as error:
        remedies = [*_dtype_remedies(model, images), *_shape_remedies(model, images)]
        example = model.anyprec_record.facts.example_shape
        if not remedies and (only_known or tuple(images.shape[1:]) == example[1:]):
            raise
        if not remedies:
            remedies = [f"the network was converted with an input of shape {example}"]
        msg = f"the network does not run on images of shape {tuple(images.shape)} and dtype "
        msg += f"{images.dtype} ({type(error).__name__}: {error}): {'; '.join(remedies)}"
        raise BatchError(msg) from error


def _dtype_remedies(model: ConvertedModel, images: Tensor) -> Iterator[str]:
    wanted = None
    for parameter in model.parameters():
        if parameter.is_floating_point():
            wanted = parameter.dtype
            break
    if wanted is None or images.dtype == wanted:
        return
    if images.is_floating_point():
        yield f"its weights are {wanted}, so pass images.to({wanted})"
    else:
        yield (
            f"its weights are {wanted}, so convert and normalise the images as in training, e.g. "
            "images.float() / 255"
        )


def _shape_remedies(model: ConvertedModel, images: Tensor) -> Iterator[str]:
    example = model.anyprec_record.facts.example_shape
    shape = tuple(images.shape)
    if len(shape) == len(example) - 1:
        yield f"a batch axis seems to be missing ({len(example)} axes are wanted): images[None]"
    if len(shape) != len(example) or len(shape) < 4 or shape[1] == example[1]:
        return
    channels = example[1]
    if shape[-1] == channels:
        axes = (0, len(shape) - 1, *range(1, len(shape) - 1))
        yield f"channels seem to stand last, and are wanted second: images.permute{axes}"
    else:
        yield f"they have {shape[1]} channels, and it was converted with {channels}"

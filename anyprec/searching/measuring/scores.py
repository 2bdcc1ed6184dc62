"""What scores are made of: logits, class labels, and what a function of the user's returns.

What does not fit is refused at the first batch. Left to torch, some of it would be found late, and
some never: a label outside of the classes counts as an error, and -100 as no image.
"""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

from anyprec.errors import SearchError


def require_logits(output: Any, *, objective: str) -> Tensor:
    """The logits that a network returns, in float32.

    Raises:
        SearchError: `output` is no tensor of shape (batch, classes).
    """
    if isinstance(output, Tensor) and output.ndim == 2:
        return output.float()
    returned = f"a {type(output).__name__}"
    if isinstance(output, Tensor):
        returned = f"a tensor of shape {tuple(output.shape)}"
    msg = f"objective {objective!r} needs logits of shape (batch, classes), and the network "
    msg += f"returns {returned}: pass a function of the model instead"
    raise SearchError(msg)


class ClassLabels:
    """The range of all labels of a loader, each batch of which must be class indices."""

    def __init__(self) -> None:
        self._lowest = 0
        self._highest = 0

    def add(self, labels: Tensor, *, images: int) -> None:
        """Take in the labels of a batch of so many images.

        Raises:
            SearchError: They are not one class index for each image.
        """
        if tuple(labels.shape) != (images,) or not _holds_integers(labels):
            msg = f"labels of shape {tuple(labels.shape)} and dtype {labels.dtype} for {images} "
            msg += "images: objectives 'loss' and 'error' need one label for each image, a class "
            msg += f"index ({_remedy(labels, images)}), or pass a function of the model instead"
            raise SearchError(msg)
        if images:
            lowest, highest = torch.aminmax(labels)
            self._lowest = min(self._lowest, int(lowest))
            self._highest = max(self._highest, int(highest))

    def require_classes(self, logits: Tensor, *, objective: str) -> None:
        """Refuse labels that are no classes of these logits.

        Raises:
            SearchError: A label is negative, or not below the number of classes.
        """
        classes = logits.shape[1]
        for label in (self._lowest, self._highest):
            if not 0 <= label < classes:
                msg = f"a label is {label}, and the network has {classes} classes: objective "
                msg += f"{objective!r} needs labels from 0 to {classes - 1}; images without a "
                msg += "class (-1, -100 and 255 are used for these) must be left out"
                raise SearchError(msg)


def number_of(score: Any) -> float:
    """The number that a function of the user's returned.

    Raises:
        SearchError: It is none, or several.
    """
    value = score
    is_one_element = isinstance(value, Tensor) and value.numel() == 1
    is_scalar_array = getattr(value, "ndim", None) == 0 and hasattr(value, "item")
    if is_one_element or is_scalar_array:
        value = value.item()
    if not isinstance(value, bool) and isinstance(value, numbers.Real):
        return float(value)
    returned = repr(score)[:80]
    if isinstance(score, Tensor):
        returned = f"a tensor of shape {tuple(score.shape)} and dtype {score.dtype}"
    msg = f"the objective returned {returned}: return one real number, lower is better"
    raise SearchError(msg)


def _holds_integers(labels: Tensor) -> bool:
    is_number = labels.dtype not in (torch.bool,) and not labels.is_complex()
    return is_number and not labels.is_floating_point()


def _remedy(labels: Tensor, images: int) -> str:
    if labels.ndim == 2 and labels.shape[0] == images and labels.shape[1] > 1:
        return "labels.argmax(dim=1) of one-hot ones"
    if labels.ndim == 2 and labels.shape[1] == 1:
        return "labels.squeeze(1)"
    if labels.ndim == 1 and len(labels) == images:
        return "labels.long()"
    return f"a tensor of shape ({images},)"

"""A converted network under test, with what its float network gave."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from anyprec.model.converted import ConvertedModel


@dataclass(frozen=True)
class Trial:
    """A converted network under test, with what its float network gave.

    Attributes:
        model: The converted network.
        images: A batch of images.
        bits: Candidates, in ascending order.
        eval_outputs: Outputs of the float network for these images in eval mode.
        train_outputs: The same in train mode.
    """

    model: ConvertedModel
    images: Tensor
    bits: tuple[int, ...]
    eval_outputs: list[Tensor]
    train_outputs: list[Tensor]

    @property
    def lowest(self) -> int:
        """The lowest bit-width."""
        return self.bits[0]

    @property
    def second(self) -> int:
        """The second lowest bit-width."""
        return self.bits[1]

    @property
    def highest(self) -> int:
        """The highest bit-width."""
        return self.bits[-1]

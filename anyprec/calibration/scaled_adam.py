"""Adam in units of each parameter's own: weights move in step sizes, step sizes in themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DECAYS = 0.9, 0.99
"""Of the averages of the gradient and of its square; fast ones, since runs are short."""

_LARGEST = 3.0
"""Of a step before the learning rate: a rare gradient moves a parameter no further."""

_TINY = 1e-12


@dataclass(eq=False)
class _Entry:
    """A parameter, its unit and learning rate, and the averages of its gradient and of its square.

    Attributes:
        start: What it is pulled back to; None if it is not.
        steps: How many steps had a gradient of it.
    """

    parameter: Tensor
    unit: Tensor
    lr: float
    mean: Tensor
    square: Tensor
    start: Tensor | None
    steps: int = 0


class ScaledAdam:
    """Adam (Kingma and Ba, ICLR 2015) with a unit for each entry of each parameter.

    Args:
        pull: Part of the way back to where they started that some parameters go after each step.
    """

    def __init__(self, pull: float = 0.0) -> None:
        self._pull = pull
        self._entries: list[_Entry] = []

    @property
    def parameters(self) -> list[Tensor]:
        """What it moves."""
        return [entry.parameter for entry in self._entries]

    def add(self, parameter: Tensor, unit: Tensor, lr: float, *, is_pulled: bool = False) -> None:
        """Move this parameter from now on.

        Args:
            parameter: A leaf.
            unit: What a step of 1 is, positive; it is expanded to the shape of the parameter.
            lr: Units of a step.
            is_pulled: It is pulled back to what it is now.
        """
        mean, square = torch.zeros_like(parameter), torch.zeros_like(parameter)
        start = parameter.detach().clone() if is_pulled else None
        self._entries.append(_Entry(parameter, unit.detach().clone(), lr, mean, square, start))

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """Move all parameters that have a gradient, and drop it.

        Args:
            factor: On all learning rates.
        """
        for entry in self._entries:
            gradient = entry.parameter.grad
            if gradient is None:
                continue
            entry.parameter.grad = None
            entry.steps += 1
            # In the unit of the parameter, so that `_TINY` is small beside all of them.
            gradient = gradient * entry.unit
            entry.mean.lerp_(gradient, 1 - DECAYS[0])
            entry.square.mul_(DECAYS[1]).addcmul_(gradient, gradient, value=1 - DECAYS[1])
            mean = entry.mean / (1 - DECAYS[0] ** entry.steps)
            root = (entry.square / (1 - DECAYS[1] ** entry.steps)).sqrt_()
            move = mean.div_(root.add_(_TINY)).clamp_(-_LARGEST, _LARGEST)
            entry.parameter.sub_(move.mul_(entry.unit), alpha=entry.lr * factor)
            if entry.start is not None:
                entry.parameter.lerp_(entry.start, self._pull)

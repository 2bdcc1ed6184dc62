"""Input quantizers of layers that read what is quantized already.

With `convert(placement="integer")` a layer may read a value that an `OutputQuantizer` has put on a
grid of 8 bits. At 8 bits the layer has the very same grid, on which all these numbers are, so there
is nothing left to quantize. At fewer bits it quantizes them again, with step sizes of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anyprec.nn.grids import GridRule
from anyprec.nn.outputs import OUTPUT_BITS, OutputQuantizer
from anyprec.nn.quantizers import InputQuantizer


class SharedInputQuantizer(InputQuantizer):
    """Quantizer of an input that is on the grid of its 8-bit candidate already.

    Args:
        candidates: Bit-widths, ascending, 8 the last of them.
        nonnegative: As for `InputQuantizer`.
        trunk: What has quantized the input. It belongs to another module, and is no child.
        rule: As for `InputQuantizer`; it holds for the candidates below 8 bits.
    """

    def __init__(
        self,
        candidates: tuple[int, ...],
        *,
        nonnegative: bool,
        trunk: OutputQuantizer,
        rule: GridRule | None = None,
    ) -> None:
        super().__init__(candidates, nonnegative=nonnegative, rule=rule)
        # Past nn.Module.__setattr__, which would make it a child.
        vars(self)["_trunk"] = trunk

    @property
    def trunk(self) -> OutputQuantizer:
        """What has quantized the input."""
        return vars(self)["_trunk"]  # type: ignore[no-any-return]

    @property
    def own_candidates(self) -> tuple[int, ...]:
        """The candidates below 8 bits."""
        return self.candidates[:-1]

    def is_shared(self, index: int) -> bool:
        """Whether the candidate at `index` is the grid that the input is on."""
        return index == len(self.own_candidates)

    def grid(self, index: int) -> tuple[Tensor, int]:
        """Step size, shape `()`, and zero point of the candidate at `index`."""
        return self.trunk.grid(0) if self.is_shared(index) else super().grid(index)

    @property
    def kind(self) -> str:
        """As of `InputQuantizer`; that of the shared grid if there is no other."""
        return super().kind if self.own_candidates else self.trunk.kind

    def limits(self, index: int) -> tuple[int, int]:
        """Lowest and highest code at a candidate, less the zero point."""
        return self.trunk.limits(0) if self.is_shared(index) else super().limits(index)

    def forward(self, values: Tensor, index: int) -> Tensor:  # type: ignore[override]  # as its base's
        """Fake-quantize `values` at a candidate; at the shared one they are that already."""
        return values if self.is_shared(index) else super().forward(values, index)

    def _uses_step(self, index: int) -> bool:
        """As of `InputQuantizer`; not at the shared one."""
        return not self.is_shared(index) and super()._uses_step(index)

    def forward_selected(self, values: Tensor, choice: Tensor) -> Tensor:
        """`forward` at the candidate of the index `choice`, which is data and not program."""
        number = len(self.own_candidates)
        if number == 0:
            return values
        quantized = super().forward_selected(values, choice.clamp(max=number - 1))
        return torch.where(choice == number, values, quantized)


def input_quantizer_of(
    candidates: tuple[int, ...],
    *,
    nonnegative: bool,
    trunk: OutputQuantizer | None,
    rule: GridRule | None = None,
) -> InputQuantizer:
    """The quantizer of a layer's input.

    Args:
        candidates: Bit-widths, ascending.
        nonnegative: The input is known to be never negative.
        trunk: What has quantized the input before, or None.
        rule: What is allowed of its grid; None is any.
    """
    if trunk is None or OUTPUT_BITS not in candidates:
        return InputQuantizer(candidates, nonnegative=nonnegative, rule=rule)
    return SharedInputQuantizer(candidates, nonnegative=nonnegative, trunk=trunk, rule=rule)

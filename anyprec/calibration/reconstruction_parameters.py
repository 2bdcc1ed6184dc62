"""What a reconstruction moves, in which units, and how far in a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from anyprec.calibration.scaled_adam import ScaledAdam
from anyprec.model.converted import ConvertedModel
from anyprec.model.intact import switchable_norms
from anyprec.nn.channels import along

WEIGHT_LR, STEP_LR, AFFINE_LR = 0.02, 0.005, 0.005
"""Of weights, in step sizes; of step sizes and of scales and shifts, in parts of themselves."""

PULL = 0.005
"""Part of the way back to the float network's that weights go after each step: high bit-widths lose
the more, the more weights move."""


def optimizer_of(model: ConvertedModel) -> ScaledAdam:
    """What moves the layers that have several bit-widths, and the norms."""
    optimizer = ScaledAdam(PULL)
    moved: set[int] = set()

    def add(parameter: Any, unit: Tensor, lr: float, *, is_pulled: bool = False) -> None:
        # Several modules may share one.
        if isinstance(parameter, nn.Parameter) and id(parameter) not in moved:
            moved.add(id(parameter))
            optimizer.add(parameter, unit, lr, is_pulled=is_pulled)

    for layer in model.quantized_layers.values():
        quantizer = layer.weight_quantizer
        if len(quantizer.candidates) == 1:
            continue
        # That of 4 bits, or of the candidate next to it.
        nearest = min(quantizer.candidates, key=lambda bits: abs(bits - 4))
        step = quantizer.step.detach()[quantizer.candidates.index(nearest)].abs()
        unit = along(step, quantizer.axis, layer.weight)
        add(layer.weight, unit, WEIGHT_LR, is_pulled=True)
        add(quantizer.step, quantizer.step.abs(), STEP_LR)
        add(layer.input_quantizer.step, layer.input_quantizer.step.abs(), STEP_LR)
    for _, norm in switchable_norms(model):
        copies: Any = norm.bank
        if copies is not None and copies.weight is not None:
            scale = copies.weight.detach().abs()
            scale = scale.clamp_min(0.1 * float(scale.mean()))
            add(copies.weight, scale, AFFINE_LR)
            add(copies.bias, scale, AFFINE_LR)
    return optimizer


@contextmanager
def learning(model: nn.Module, parameters: Iterable[Tensor]) -> Iterator[None]:
    """In the block these parameters alone require gradients."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(requires_grad=False)
    for learning in parameters:
        learning.requires_grad_()
    try:
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)

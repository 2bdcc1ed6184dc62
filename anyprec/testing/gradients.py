"""Gradients: both step sizes of every layer get one, so no layer is bypassed.

With random weights and few bits, whole inputs round to zero or gates saturate, and no gradient
passes. A layer without one is therefore tried in milder settings before it counts as bypassed:

1. all layers at the low bit-width, then again with input step sizes that fit the arriving values;
2. the layer at the low bit-width, all others at the highest;
3. in floating point: where no output depends on the weight there, no gradient can be expected
   (in some networks a class token alone reaches the head);
4. one operand of the layer at the low bit-width, its other operand and all other layers at the
   highest; first all such layers together, then one by one.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from anyprec.bits import BitConfig, Bits, uniform
from anyprec.model.converted import ConvertedModel
from anyprec.nn.layers import QuantizedLayer
from anyprec.nn.operators import tensors_in
from anyprec.testing.outputs import require, restoring_buffers
from anyprec.testing.report import Report
from anyprec.testing.trial import Trial

_MOST_SINGLE = 40
"""Layers that are tried one by one at most, since each takes up to four passes."""


def check_gradients(trial: Trial, width: int, report: Report) -> None:
    """At a bit-width every active step size gets a gradient.

    Args:
        trial: The network.
        width: The bit-width.
        report: Notes what came of it, and which layers needed milder settings.
    """
    with report.check(f"gradients at {width} bits"):
        alone, report.unreached = require_gradients(trial, width)
        report.alone[str(width)] = len(alone)


def require_gradients(trial: Trial, width: int) -> tuple[list[str], list[str]]:
    """Require a gradient on both active step sizes of every layer.

    Returns:
        Layers that got one only with all others at their highest bits; layers to which the float
        network passes none either, which are excused.
    """
    with _restoring(trial.model) as steps:
        passes = _Passes(trial, width)
        # Each setting is milder than the one before it; few networks come past the first.
        missing = passes.missing_at_low_bits(steps)
        alone = sorted(missing)
        missing = passes.missing_among_high(missing)
        unreached = passes.without_float_gradient(missing)
        missing -= unreached
        missing -= passes.reached_by_operand(missing)
        for path in sorted(missing)[:_MOST_SINGLE]:
            missing -= passes.reached_by_operand({path})
    require(not missing, f"{len(missing)} layers have none: {', '.join(sorted(missing)[:4])}")
    return alone, sorted(unreached)


class _Passes:
    """Forward and backward passes, and the layers that they leave without a gradient."""

    def __init__(self, trial: Trial, width: int) -> None:
        self.model = trial.model
        self.images = trial.images
        self.low = uniform(width, trial.model.candidates)
        self.high = uniform(trial.highest, trial.model.candidates)

    def missing_at_low_bits(self, steps: dict[str, Tensor]) -> set[str]:
        """Layers without a gradient while all run at the low bit-width.

        Args:
            steps: Input step sizes as calibrated.
        """
        layers = self.model.quantized_layers
        missing = self.missing(self.low, set(layers))
        if missing:
            with self.model.using_bits(self.low):
                _fit_steps_to_arriving_inputs(self.model.eval(), self.images)
            missing = self.missing(self.low, missing)
            # Not exactly as calibrated: a step size that fits a constant input has no gradient.
            _set_input_steps(layers, steps, factor=1.07)
        return missing

    def missing_among_high(self, paths: Set[str]) -> set[str]:
        """Which of these layers have none at the low bit-width, all others at the highest."""
        low = {path: self.low[path] for path in paths}
        return self.missing(self.high.replace(low), paths)

    def missing(
        self, config: BitConfig, paths: Set[str], operands: tuple[str, ...] = ("weight", "input")
    ) -> set[str]:
        """Which of these layers have a step size without gradient.

        Gradients of a pass in eval mode and one in train mode are added.
        """
        missing = set(paths)
        layers = self.model.quantized_layers
        self.model.zero_grad(set_to_none=True)
        with self.model.using_bits(config):
            for train in (False, True):
                if not missing:
                    break
                _run_backward(self.model.train(train), self.images)
                missing = {path for path in paths if not _has_gradients(layers[path], operands)}
        return missing

    def reached_by_operand(self, paths: Set[str]) -> set[str]:
        """Layers that get both gradients, each with the other operand at the highest bits.

        A weight of few values may round to zero where the gradient of the input would pass, and an
        input where that of the weight would.
        """
        low_weights, low_inputs = {}, {}
        for path in paths:
            low, high = self.low[path], self.high[path]
            low_weights[path] = Bits(low.weight, high.activation)
            low_inputs[path] = Bits(high.weight, low.activation)
        reached = set(paths)
        reached -= self.missing(self.high.replace(low_weights), paths, ("weight",))
        reached -= self.missing(self.high.replace(low_inputs), reached, ("input",))
        return reached

    def without_float_gradient(self, paths: Set[str]) -> set[str]:
        """Layers on whose latent weight no output depends in floating point."""
        unreached = set(paths)
        with self.model.using_bits(None):
            for train in (False, True):
                if not unreached:
                    break
                self.model.zero_grad(set_to_none=True)
                self.model.train(train)
                with restoring_buffers(self.model):
                    _run_backward(self.model, self.images)
                for path in sorted(unreached):
                    gradient = self.model.quantized_layers[path].weight.grad
                    if gradient is not None and bool(gradient.any()):
                        unreached.remove(path)
        return unreached


@contextmanager
def _restoring(model: ConvertedModel) -> Iterator[dict[str, Tensor]]:
    """Undo what the passes do to precision, gradients, mode and input step sizes.

    Yields:
        The input step sizes of all layers.
    """
    layers = model.quantized_layers
    steps = {path: layer.input_quantizer.step.detach().clone() for path, layer in layers.items()}
    try:
        yield steps
    finally:
        model.set_bits(None)
        model.zero_grad(set_to_none=True)
        model.eval()
        _set_input_steps(layers, steps)


def _run_backward(model: nn.Module, images: Tensor) -> None:
    loss = torch.zeros((), device=images.device)
    for output in tensors_in([model(images)]):
        loss = loss + output.float().square().mean()
    loss.backward()


def _has_gradients(layer: QuantizedLayer, operands: tuple[str, ...]) -> bool:
    """Whether the active step sizes of these operands have a finite gradient that is not zero."""
    bits = layer.bits
    if bits is None:
        return False
    quantizers = {
        "weight": (layer.weight_quantizer, bits.weight),
        "input": (layer.input_quantizer, bits.activation),
    }
    for operand in operands:
        quantizer, width = quantizers[operand]
        step: Any = quantizer.step
        if step.grad is None or not bool(torch.isfinite(step.grad).all()):
            return False
        if not bool(step.grad[quantizer.candidates.index(width)].any()):
            return False
    return True


@torch.no_grad()
def _set_input_steps(
    layers: dict[str, QuantizedLayer], steps: dict[str, Tensor], *, factor: float = 1.0
) -> None:
    for path, layer in layers.items():
        layer.input_quantizer.step.copy_(factor * steps[path])


@torch.no_grad()
def _fit_steps_to_arriving_inputs(model: ConvertedModel, images: Tensor) -> None:
    """Set the active input step sizes during a pass, layer by layer, each from what arrives."""
    with ExitStack() as observed:
        for layer in model.quantized_layers.values():
            observer = partial(_fit_step, layer)
            observed.enter_context(layer.operand_observers.including(observer))
        model(images)


def _fit_step(layer: Any, values: Tensor, _weight: Tensor) -> None:
    quantizer = layer.input_quantizer
    index = quantizer.candidates.index(layer.bits.activation)
    magnitudes = values[values != 0].abs()
    if magnitudes.numel():
        # Typical values fall inside the range, not on its border, where no gradient passes.
        quantizer.step[index] = 1.2 * magnitudes.median()

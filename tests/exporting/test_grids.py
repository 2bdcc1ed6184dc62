"""Exported grids are those in use: powers of two, and zero points that are allowed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import anyprec
from anyprec.exporting.lowering import lower
from anyprec.exporting.operators import FAKE_QUANTIZE


@pytest.mark.parametrize(
    ("scale", "grid", "zeros"),
    [("power-of-two", "symmetric", {0, 128}), ("any", "signed", {128})],
)
def test_a_lowered_network_has_the_grids_in_use(
    float_net: nn.Module, images: Tensor, scale: str, grid: str, zeros: set[int]
) -> None:
    model = anyprec.convert(
        float_net,
        bits=(4, 8),
        activation_grid=grid,
        activation_scale=scale,
        example_input=images,
    )
    anyprec.calibrate(model, [images])
    with torch.no_grad():
        for layer in model.quantized_layers.values():
            layer.input_quantizer.step.mul_(1.3)  # as training leaves them
    lowered = lower(model, "W4A8", example_input=images)
    model.set_bits("W4A8")
    assert torch.equal(lowered.graph(images), model(images))
    quantizers = [node.args for node in lowered.graph.graph.nodes if node.target is FAKE_QUANTIZE]
    assert {args[2] for args in quantizers} == zeros
    are_powers = [math.log2(args[1]).is_integer() for args in quantizers]
    assert all(are_powers) if scale == "power-of-two" else not any(are_powers)

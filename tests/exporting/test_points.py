"""Names of the places that have codes, and what stands in a reference run at each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from anyprec.exporting.lowering import lower
from anyprec.exporting.points import codes_name, layer_of, point_of, quantizers_of
from anyprec.exporting.reference import Reference
from tests.exporting.networks import converted


class Repeated(nn.Module):
    """A layer that is called twice, and a pooling on codes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.conv(torch.relu(self.conv(x)))


def test_each_call_of_a_layer_has_a_name_of_its_own() -> None:
    images = torch.randn(2, 3, 8, 8)
    lowered = lower(converted(Repeated(), images, first_last_bits=None), 4)
    names = [point_of(node) for node in quantizers_of(lowered.graph)]
    assert names == ["stem", "conv", "conv:2"]
    assert [layer_of(name) for name in names] == ["stem", "conv", "conv"]
    assert codes_name("conv:2", lowered.config) == "conv:2.input_codes"
    assert codes_name("output_quantizers.0", lowered.config) == "output_quantizers.0.codes"


def test_the_reference_has_values_and_codes_of_every_point() -> None:
    torch.manual_seed(0)
    images = torch.randn(2, 3, 8, 8)
    model = converted(Repeated(), images, first_last_bits=None)
    inputs: list[Tensor] = []
    for layer in model.quantized_layers.values():
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad(), model.using_bits((8, 4)):
        expected = model(images)
        layers = model.quantized_layers
        quantizers = [layers[name].input_quantizer for name in ("stem", "conv", "conv")]
        indices = [layers[name].input_index for name in ("stem", "conv", "conv")]
    for layer in model.quantized_layers.values():
        layer._forward_pre_hooks.clear()
    output, points = Reference(lower(model, (8, 4))).run(images)
    assert torch.equal(output, expected)
    assert list(points) == ["stem", "conv", "conv:2"]
    for values, quantizer, index, point in zip(
        inputs, quantizers, indices, points.values(), strict=True
    ):
        low, high = quantizer.limits(index)
        codes = (values / quantizer.step[index]).round().clamp(low, high) - low
        assert torch.equal(point.codes, codes.to(torch.uint8))

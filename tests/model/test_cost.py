"""Costs: the published figures, the definition, and that nothing is dropped in silence."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import anyprec
from anyprec.errors import BitsError
from anyprec.model.costing import cost_model


# G BitOPs at 224 x 224 as the literature counts them: first and last layer at W8A8.
@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("resnet18", {2: 14.37, 3: 22.85, 4: 34.71, 5: 49.97, 6: 68.63, 8: 116.1}),
        ("mobilenetv2_100", {3: 3.37, 4: 5.39, 6: 11.17, 8: 19.25}),
    ],
)
def test_published_bitops_are_reproduced(name: str, published: dict[int, float]) -> None:
    model = anyprec.convert(timm.create_model(name))
    for bits, expected in published.items():
        assert anyprec.cost_of(model, bits).bitops / 1e9 == pytest.approx(
            expected, abs=0.006
        )  # the published digits


def test_bitops_and_size_are_their_definitions(net: anyprec.ConvertedModel) -> None:
    macs = {"stem": 13824, "depthwise": 4608, "pointwise": 4096, "head": 16384, "fc": 80}
    weights = {"stem": 216, "depthwise": 72, "pointwise": 64, "head": 256, "fc": 80}
    cost = anyprec.cost_of(net, {"depthwise": (3, 4), "pointwise": (2, 8), "head": (4, 2)})
    pairs = {"stem": (8, 8), "depthwise": (3, 4), "pointwise": (2, 8), "head": (4, 2), "fc": (8, 8)}
    assert cost.bitops == sum(macs[path] * w * a for path, (w, a) in pairs.items())
    assert cost.size == sum(weights[path] * w for path, (w, _) in pairs.items())
    assert cost.average_bits == cost.size / sum(weights.values())
    assert cost_model(net).macs == sum(macs.values())


def test_the_active_configuration_is_the_default_and_float_counts_32_bits(
    net: anyprec.ConvertedModel,
) -> None:
    net.set_bits(4)
    assert anyprec.cost_of(net).bitops == anyprec.cost_of(net, 4).bitops
    net.set_bits(None)
    assert anyprec.cost_of(net).bitops == cost_model(net).macs * 1024


def test_what_is_not_counted_is_listed() -> None:
    model = timm.create_model("test_vit", img_size=48)
    model = anyprec.convert(
        model, exclude="blocks.0.mlp.fc1", example_input=torch.zeros(2, 3, 48, 48)
    )
    entries = {entry.name: entry for entry in cost_model(model).uncounted}
    attention = entries["scaled_dot_product_attention"]
    tokens, width, blocks = 10, 64, 6
    assert (attention.calls, attention.macs) == (blocks, blocks * 2 * tokens**2 * width)
    assert entries["layer_norm"].calls == 2 * blocks + 1
    left_out = entries["blocks.0.mlp.fc1"]
    assert left_out.reason == "float layer: excluded by 'blocks.0.mlp.fc1'"
    assert left_out.macs == tokens * width * 3 * width or left_out.macs > 0
    assert "blocks.0.mlp.fc1" in str(anyprec.cost_of(model, 4))


def test_parameters_are_accounted_for(net: anyprec.ConvertedModel) -> None:
    costs = cost_model(net)
    own = sum(
        p.numel()
        for name, p in net.named_parameters()
        if "quantizer" not in name and "bank" not in name
    )
    assert costs.weights + costs.float_parameters == own
    assert (
        costs.steps == (8 + 8 + 8 + 16 + 5) + 5
    )  # a weight step per channel and an input step per layer


def test_a_configuration_of_another_network_is_refused(net: anyprec.ConvertedModel) -> None:
    with pytest.raises(BitsError, match="does not fit this network: 1 layers differ, e.g. 'spare'"):
        cost_model(net).cost(anyprec.BitConfig({**net.resolve_bits(4), "spare": 4}))


def test_a_layer_that_is_called_twice_costs_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(self.conv(x))

    model = anyprec.convert(Twice(), first_last_bits=None, example_input=torch.zeros(1, 3, 4, 4))
    assert anyprec.cost_of(model, 2).bitops == 2 * 16 * 9 * 4
    assert anyprec.cost_of(model, 2).size == 9 * 2

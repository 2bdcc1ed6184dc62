"""Facts about networks: first and last layers, signs, norms, MACs, uses without a call."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from anyprec.errors import ConversionError
from anyprec.network.analysis import analyze


def test_the_small_network_is_understood(
    small_net: Callable[..., nn.Module], images: Tensor
) -> None:
    facts = analyze(small_net(), images)
    assert facts.untraceable is None
    layers = facts.layers
    assert list(layers) == ["stem", "depthwise", "pointwise", "head", "fc"]
    assert [path for path, layer in layers.items() if layer.first] == ["stem"]
    assert [path for path, layer in layers.items() if layer.last] == ["fc"]
    assert [path for path, layer in layers.items() if layer.depthwise] == ["depthwise"]
    assert [path for path, layer in layers.items() if layer.nonnegative] == [
        "depthwise",
        "pointwise",
    ]
    expected = {
        "stem_norm": "stem",
        "depthwise_norm": "depthwise",
        "pointwise_norm": "pointwise",
        "joint_norm": None,
    }
    assert facts.norms == expected
    assert (
        layers["stem"].macs == 8 * 8 * 8 * 27
    )  # 8x8 outputs of 8 channels, 27 products each, for one sample
    assert layers["fc"].macs == 16 * 5


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_efficientnet", "test_vit", "test_convnext", "test_nfnet"]
)
def test_macs_equal_those_of_torchs_counter(name: str) -> None:
    model, x = timm.create_model(name).eval(), torch.randn(2, 3, 160, 160)
    facts = analyze(model, x)
    # torch's counter misses the fused attention of the CPU, so it counts the products in it.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(x)
    counted = sum(layer.macs for layer in facts.layers.values()) + sum(
        macs for _, macs in facts.uncounted.values()
    )
    assert counted == counter.get_total_flops() / 2 / len(x)


def test_a_norm_is_paired_by_edge_and_not_by_order() -> None:
    class Crossed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
            self.norm_of_second, self.norm_of_first = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm_of_first(self.first(x)) + self.norm_of_second(self.second(x))

    facts = analyze(Crossed(), torch.randn(1, 3, 4, 4))
    assert facts.norms == {"norm_of_second": "second", "norm_of_first": "first"}


def test_densenet_norms_after_a_concatenation_belong_to_no_layer() -> None:
    facts = analyze(
        timm.create_model("densenet121", growth_rate=4, block_config=(2, 2)),
        torch.randn(1, 3, 32, 32),
    )
    assert (
        facts.norms["features.denseblock1.denselayer1.norm2"]
        == "features.denseblock1.denselayer1.conv1"
    )
    assert facts.norms["features.denseblock1.denselayer2.norm1"] is None


def test_a_weight_used_without_calling_its_layer_is_found_with_its_owner() -> None:
    model = timm.create_model("eva02_tiny_patch14_224", img_size=28, depth=1, num_classes=3)
    facts = analyze(model, torch.randn(1, 3, 28, 28))
    assert facts.layers["blocks.0.attn.qkv"].owner == "blocks.0.attn"
    assert facts.layers["blocks.0.attn.proj"].owner is None
    assert facts.layers["head"].last


def test_a_layer_whose_input_is_constant_is_found() -> None:
    model = timm.create_model(
        "swinv2_tiny_window8_256", img_size=32, window_size=4, embed_dim=12, depths=(1, 1, 1, 1)
    )
    facts = analyze(model, torch.randn(1, 3, 32, 32))
    constant = [path for path, layer in facts.layers.items() if layer.constant]
    assert constant
    assert all("cpb_mlp" in path for path in constant)
    assert [path for path, layer in facts.layers.items() if layer.first] == ["patch_embed.proj"]


def test_every_call_of_a_layer_counts() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x))

    layer = analyze(Twice(), torch.randn(1, 3, 4, 4)).layers["conv"]
    assert (layer.calls, layer.macs) == (2, 2 * 16 * 9)


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        if x.sum() > 0:  # what torch.fx cannot follow
            x = x * 2
        return self.fc(x.mean(dim=(2, 3)))


def test_an_untraceable_network_is_understood_from_one_forward_pass() -> None:
    facts = analyze(Untraceable(), torch.randn(1, 3, 6, 6))
    assert facts.untraceable is not None
    assert "control flow" in facts.untraceable
    assert facts.norms == {"norm": "conv"}
    assert facts.layers["conv"].first
    assert facts.layers["fc"].last
    assert not any(layer.nonnegative for layer in facts.layers.values())


@pytest.mark.filterwarnings("ignore:LSTM with projections")  # torch says that it will be slower
def test_hidden_and_unused_layers_have_a_problem_named() -> None:
    class Hiding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.memory = nn.LSTM(8, 16, batch_first=True, proj_size=8)
            self.unused, self.fc = nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.memory(x)[0])

    layers = analyze(Hiding(), torch.randn(1, 5, 8)).layers
    assert (
        layers["memory.matrices.weight_ih_l0"].problem == "read by lstm, which hides the operator"
    )
    assert layers["unused"].problem == "never used in an eval-mode forward pass"
    assert layers["fc"].problem is None


def test_nothing_of_the_network_changes(
    small_net: Callable[..., nn.Module], images: Tensor
) -> None:
    model = small_net().train()
    model.stem_norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    analyze(model, images)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert not model.stem_norm.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_input_that_does_not_fit_is_refused_by_name(small_net: Callable[..., nn.Module]) -> None:
    with pytest.raises(
        ConversionError, match=r"SmallNet does not run on an example input of shape \(1, 4, 8, 8\)"
    ):
        analyze(small_net(), torch.randn(1, 4, 8, 8))

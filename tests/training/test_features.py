"""Information distortion mitigation: which features, against which targets, for which layers."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import anyprec
from anyprec.training.features import FeatureDistances


class InPlace(nn.Module):
    """What could change a feature after it was taken: an in-place activation, an in-place sum."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=True)
        self.second = nn.Conv2d(8, 8, 1)
        self.third = nn.Conv2d(8, 8, 1)
        self.gelu = nn.GELU()
        self.fourth = nn.Conv2d(8, 8, 1)
        self.group = nn.GroupNorm(2, 8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.conv(self.stem(x))))
        y = self.second(x)
        y += x
        y = self.gelu(self.third(y))
        y = self.group(self.fourth(y))
        y += 1
        return self.fc(y.mean(dim=(2, 3)))


@pytest.fixture
def network() -> anyprec.ConvertedModel:
    model = anyprec.convert(InPlace(), bits=(2, 4, 8), example_input=torch.randn(1, 3, 8, 8))
    anyprec.calibrate(model, [torch.randn(8, 3, 8, 8)])
    return model.eval()


def outputs(model: nn.Module, images: Tensor, names: list[str]) -> dict[str, Tensor]:
    """Outputs of modules, copied before anything can change them."""
    found: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda _module, _args, output, name=name: found.__setitem__(
                name, output.detach().clone()
            )
        )
        for name in names
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    return found


def test_features_are_norm_activation_or_own_output_before_anything_changes_them(
    network: anyprec.ConvertedModel,
) -> None:
    images = torch.randn(4, 3, 8, 8)
    place = {"conv": "norm", "second": "second", "third": "gelu", "fourth": "group"}
    network.set_bits(8)
    high = outputs(network, images, list(place.values()))
    distances = FeatureDistances(network)
    with distances.keeping(set(place)):
        network(images)
    network.set_bits(2)
    low = outputs(network, images, list(place.values()))
    with distances.measuring(set(place)) as found:
        network(images)
    expected = []
    for path in sorted(place):
        here, there = low[place[path]], high[place[path]]
        scale = 1.0 if path in {"conv", "fourth"} else there.square().mean()
        expected.append(F.mse_loss(here, there) / scale)
    distances = [distance.item() for distance in found()]
    assert distances == pytest.approx([distance.item() for distance in expected])
    assert all(value > 0 for value in distances)


def test_only_layers_at_their_lowest_bit_width_are_pulled(network: anyprec.ConvertedModel) -> None:
    images, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    oneshot = anyprec.OneShot(
        network,
        total_steps=1,
        random_paths=1,
        random_weight=1.0,
        feature_weight=0.5,
        distillation=0.0,
    )
    config = network.resolve_bits({"*": 8, "conv": (2, 8), "second": (4, 8), "third": (8, 2)})
    oneshot.random_configs = lambda count: [config] * count
    distances = FeatureDistances(network)
    network.set_bits(8)
    with distances.keeping({"conv"}):
        network(images)
    network.set_bits(config)
    with distances.measuring({"conv"}) as measured:
        network(images)
    (expected,) = measured()
    network.set_bits(None)
    losses = []
    for path in oneshot.paths():
        losses.append(path.loss(network(images), labels, F.cross_entropy))
        assert ("features" in oneshot.last_terms) != path.is_max
    torch.testing.assert_close(oneshot.last_terms["features"], expected.detach())
    with network.using_bits(config):
        task = F.cross_entropy(network(images), labels)
    torch.testing.assert_close(losses[1], task + 0.5 * expected)
    losses[1].backward()
    assert network.conv.weight.grad.any()


def test_a_frozen_lowest_bit_width_makes_the_next_one_the_lowest(
    network: anyprec.ConvertedModel,
) -> None:
    network.freeze({"conv": (4, 2)})
    oneshot = anyprec.OneShot(network, total_steps=1, random_paths=1, feature_weight=1.0)
    config = network.resolve_bits({"*": 8, "conv": (4, 8)})
    oneshot.random_configs = lambda count: [config] * count
    for path in oneshot.paths():
        path.loss(network(torch.randn(4, 3, 8, 8)), torch.arange(4), F.cross_entropy)
    assert float(oneshot.last_terms["features"]) > 0


def test_nothing_stays_behind(network: anyprec.ConvertedModel) -> None:
    oneshot = anyprec.OneShot(
        network, total_steps=1, feature_weight=1.0, error_weight=1.0, error_start=0.0
    )
    with pytest.raises(RuntimeError, match="stop"):
        for path in oneshot.paths():
            path.loss(network(torch.randn(4, 3, 8, 8)), torch.arange(4), F.cross_entropy)
            if path.index == 2:
                raise RuntimeError("stop")
    assert not any(module._forward_hooks for module in network.modules())
    assert not any(
        layer.operand_observers or layer.output_observers
        for layer in network.quantized_layers.values()
    )
    assert not network.norm.output_observers


@pytest.mark.parametrize(
    "name", ["test_vit", "test_convnext", "test_efficientnet_gn", "test_resnet", "test_nfnet"]
)
def test_networks_of_every_norm_have_features(name: str) -> None:
    size = 160 if name == "test_vit" else 64
    images = torch.randn(4, 3, size, size)
    model = anyprec.convert(
        timm.create_model(name, num_classes=5), bits=(2, 8), example_input=images[:1]
    )
    anyprec.calibrate(model, [images])
    oneshot = anyprec.OneShot(
        model, total_steps=1, random_paths=1, feature_weight=0.01, sampler="sandwich"
    )
    for path in oneshot.paths():
        path.loss(model(images), torch.arange(4), F.cross_entropy).backward()
    assert 0 < float(oneshot.last_terms["features"]) < float("inf")

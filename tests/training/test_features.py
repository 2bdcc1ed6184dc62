"""Information distortion mitigation: which features, against which targets, for which layers."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import anyprec
from anyprec.training import feature_sources
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
        features="norm",
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


class Residual(nn.Module):
    """What residual networks do behind a norm, in place or not, in several ways of writing it."""

    def __init__(self, *, inplace: bool) -> None:
        super().__init__()
        self.inplace = inplace
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.act = nn.ReLU(inplace=inplace)  # runs more than once, like torchvision's
        self.first, self.first_norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second, self.second_norm = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.shortcut, self.shortcut_norm = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.linear, self.linear_norm = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.last, self.last_norm = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem_norm(self.stem(x)))
        y = F.relu(self.first_norm(self.first(x)), inplace=self.inplace)
        y = self.second_norm(self.second(y))
        z = self.shortcut_norm(self.shortcut(x))
        if self.inplace:
            y += z
        else:
            y = y + z
        y = self.act(y)
        y = self.linear_norm(self.linear(y))  # read by two: a feature as it is
        z = self.drop(torch.relu_(self.last_norm(self.last(y))) if self.inplace else
                      torch.relu(self.last_norm(self.last(y))))  # fmt: skip
        z = y + z
        return self.fc(z.mean(dim=(2, 3)))


LAYERS = ("first", "second", "shortcut", "linear", "last")


def residual(*, inplace: bool) -> anyprec.ConvertedModel:
    torch.manual_seed(5)
    model = anyprec.convert(
        Residual(inplace=inplace), bits=(2, 8), example_input=torch.randn(1, 3, 8, 8)
    )
    anyprec.calibrate(model, [torch.randn(8, 3, 8, 8)])
    return model.eval()


def distances(model: anyprec.ConvertedModel, images: Tensor, point: str) -> dict[str, float]:
    found = {}
    with torch.no_grad():
        for layer in LAYERS:
            measured = FeatureDistances(model, point)
            model.set_bits(8)
            with measured.keeping({layer}):
                model(images)
            model.set_bits(2)
            with measured.measuring({layer}) as found_distances:
                model(images)
            (distance,) = found_distances()
            found[layer] = distance.item()
    return found


def norm_outputs(model: anyprec.ConvertedModel, images: Tensor, bits: int) -> dict[str, Tensor]:
    """The published code's way: what has become of each norm's output in the end."""
    kept: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(f"{layer}_norm").register_forward_hook(
            lambda _module, _args, output, layer=layer: kept.__setitem__(layer, output)
        )
        for layer in LAYERS
    ]
    with torch.no_grad(), model.using_bits(bits):
        model(images)
    for hook in hooks:
        hook.remove()
    return kept


@pytest.mark.parametrize("inplace", [False, True])
def test_features_are_what_in_place_networks_make_of_the_norms_output(*, inplace: bool) -> None:
    images = torch.randn(4, 3, 8, 8)
    source = residual(inplace=True)
    high, low = norm_outputs(source, images, 8), norm_outputs(source, images, 2)
    expected = {layer: F.mse_loss(low[layer], high[layer]).item() for layer in LAYERS}
    found = distances(residual(inplace=inplace), images, "after-activation")
    assert found == pytest.approx(expected, rel=1e-5)
    plain = distances(residual(inplace=inplace), images, "norm")
    changed = {layer for layer in LAYERS if plain[layer] != pytest.approx(found[layer])}
    assert changed == {"first", "second", "last"}


@pytest.mark.parametrize("name", ["resnet18", "test_resnet"])
def test_features_of_networks_that_work_in_place_are_those_of_the_published_code(name: str) -> None:
    model = anyprec.convert(
        timm.create_model(name, num_classes=5),
        bits=(2, 8),
        example_input=torch.randn(1, 3, 32, 32),
    ).eval()
    images = torch.randn(2, 3, 32, 32)
    norms = {layer: norm for norm, layer in model.anyprec_record.norms.items() if layer}
    kept: dict[str, Tensor] = {}
    for layer, norm in norms.items():
        model.get_submodule(norm).register_forward_hook(
            lambda _module, _args, output, layer=layer: kept.__setitem__(layer, output)
        )
    taken = FeatureDistances(model, "after-activation")
    with torch.no_grad(), taken.keeping(set(norms)):
        model(images)
    for layer in norms:
        (target,) = taken._taps[layer].targets
        assert torch.equal(target, kept[layer]), layer


def test_compiled_networks_have_the_features_of_eager_ones_and_one_program() -> None:
    torch._dynamo.reset()
    images, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    losses = []
    counter = CompileCounterWithBackend("eager")
    for compiled in (False, True):
        model = residual(inplace=True).eval()
        network = torch.compile(model, backend=counter, fullgraph=True) if compiled else model
        oneshot = anyprec.OneShot(
            model, total_steps=9, feature_weight=1.0, compiled=compiled, sampler="uniform"
        )
        for _ in range(3):
            for path in oneshot.paths():
                losses.append(path.loss(network(images), labels, F.cross_entropy))
                losses[-1].backward()
                if not path.is_max:
                    losses.append(oneshot.last_terms.get("features", torch.zeros(())))
        oneshot.close()
    half = len(losses) // 2
    for eager, other in zip(losses[:half], losses[half:], strict=True):
        torch.testing.assert_close(other, eager)
    assert counter.frame_count == 2


def test_a_network_that_cannot_be_traced_has_the_features_of_its_norms(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(feature_sources, "trace", lambda *_args, **_settings: (None, "no graph"))
    images = torch.randn(4, 3, 8, 8)
    model = residual(inplace=True)
    assert distances(model, images, "after-activation") == distances(model, images, "norm")


def test_an_unknown_feature_is_refused() -> None:
    with pytest.raises(ValueError, match="features='relu' is not known: use one of"):
        anyprec.Recipe(features="relu")
    assert anyprec.Recipe.paper().features == "after-activation"

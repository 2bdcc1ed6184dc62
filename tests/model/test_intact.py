"""What was replaced or removed after conversion is named, before any answer is wrong."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.utils.model import freeze_batch_norm_2d, reparameterize_model
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.ops import FrozenBatchNorm2d

import anyprec
from anyprec.errors import ConversionError
from anyprec.model.conversion import revert
from anyprec.model.intact import parts_of
from anyprec.nn.norms import SwitchableNorm

Change = Callable[[nn.Module], object]


def exchange_norm(net: nn.Module) -> None:
    net.joint_norm = nn.BatchNorm2d(16).eval()


def freeze_by_torchvision(net: nn.Module) -> None:
    net.stem_norm = FrozenBatchNorm2d(8)


def synchronise(net: nn.Module) -> None:
    nn.SyncBatchNorm.convert_sync_batchnorm(net)


def fuse(net: nn.Module) -> None:
    net.pointwise = fuse_conv_bn_eval(net.pointwise, net.pointwise_norm)
    net.pointwise_norm = nn.Identity()


def wrap(net: nn.Module) -> None:
    net.head = nn.Sequential(net.head)


def drop(net: nn.Module) -> None:
    net.stem_norm = None


def put_a_float_layer(net: nn.Module) -> None:
    layer = copy.deepcopy(net.head)
    revert(layer)
    net.head = layer


CHANGES = [
    (exchange_norm, "norm 'joint_norm' was replaced by a BatchNorm2d after conversion: convert"),
    (freeze_batch_norm_2d, "norm 'stem_norm' was replaced by a FrozenBatchNorm2d after conv"),
    (freeze_by_torchvision, "norm 'stem_norm' was replaced by a FrozenBatchNorm2d after conv"),
    (synchronise, r"norm 'stem_norm' was replaced by a SyncBatchNorm .*before anyprec.convert"),
    (fuse, "norm 'pointwise_norm' was replaced by a Identity after conversion"),
    (wrap, "layer 'head' was replaced by a Sequential after conversion"),
    (drop, "norm 'stem_norm' was removed after conversion: .*merge branches before anyprec"),
    (put_a_float_layer, "layer 'head' was replaced by a Conv2d after conversion: merge branches"),
]


@pytest.mark.parametrize(("change", "text"), CHANGES)
def test_a_call_at_a_precision_names_what_was_replaced(
    change: Change, text: str, net: anyprec.ConvertedModel, images: Tensor
) -> None:
    net.set_bits(2)
    net(images)
    change(net)
    with pytest.raises(ConversionError, match=text):
        net(images)


def refresh(net: anyprec.ConvertedModel, images: Tensor) -> None:
    anyprec.update_norms(net, [images])


def recalibrate(net: anyprec.ConvertedModel, images: Tensor) -> None:
    anyprec.calibrate(net, [images])


def look_for(net: anyprec.ConvertedModel, images: Tensor) -> None:
    anyprec.search(net, [(images, torch.zeros(8, dtype=torch.long))], "W4A4")


@pytest.mark.parametrize(
    "use",
    [
        lambda net, _: net.set_bits(4),
        lambda net, _: net.set_bits(None),
        lambda net, _: net.using_bits(4).__enter__(),
        lambda net, _: net.bits,
        lambda net, _: net.summary(),
        lambda net, _: net.load_state_dict(net.float_state_dict()),
        lambda net, _: anyprec.save(net, Path("never-written.safetensors")),
        lambda net, _: anyprec.cost_model(net),
        refresh,
        recalibrate,
        look_for,
    ],
)
def test_whoever_reads_or_switches_the_network_names_a_replaced_norm(
    use: Callable[[anyprec.ConvertedModel, Tensor], object],
    net: anyprec.ConvertedModel,
    images: Tensor,
) -> None:
    net.joint_norm = nn.Identity()
    with pytest.raises(ConversionError, match="norm 'joint_norm' was replaced by a Identity"):
        use(net, images)


def test_a_refused_switch_leaves_the_precision_of_every_layer(
    net: anyprec.ConvertedModel,
) -> None:
    net.set_bits(2)
    layers = net.quantized_layers
    before = [layer.bits for layer in layers.values()]
    net.joint_norm = nn.Identity()
    with pytest.raises(ConversionError):
        net.set_bits(8)
    assert [layer.bits for layer in layers.values()] == before


def test_in_floating_point_a_changed_network_runs_as_its_float_network(
    net: anyprec.ConvertedModel, images: Tensor
) -> None:
    expected = net(images)
    fuse(net)
    torch.testing.assert_close(net(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", ["rep", "one"])  # RepVGG's and MobileOne's
@pytest.mark.parametrize("inplace", [False, True])
def test_branches_merged_after_conversion_are_an_error_at_once(block: str, inplace: bool) -> None:
    x = torch.randn(2, 3, 16, 16)
    blocks = 2 * (ByoBlockCfg(block, d=1, c=8, s=2),)
    network = ByobNet(ByoModelCfg(blocks, stem_type=block, stem_chs=8), num_classes=5).eval()
    model = anyprec.convert(network, bits=(2, 8), example_input=x)
    anyprec.calibrate(model, [x])
    model.set_bits(2)
    model(x)
    merged = reparameterize_model(model, inplace=inplace)
    with pytest.raises(ConversionError, match="was removed after conversion: merge branches"):
        merged(x)


def test_a_network_none_of_whose_layers_is_left_does_not_run() -> None:
    x = torch.randn(2, 4)
    model = anyprec.convert(nn.Sequential(nn.Linear(4, 4)), bits=(2, 8), example_input=x)
    anyprec.calibrate(model, [x])
    model.set_bits(8)
    model[0] = nn.Linear(4, 4)
    with pytest.raises(ConversionError, match="layer '0' was replaced by a Linear"):
        model(x)


def test_a_copy_looks_at_its_own_modules(net: anyprec.ConvertedModel, images: Tensor) -> None:
    net.set_bits(2)
    expected = net(images)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert twin.anyprec_structure.parts is None
        assert torch.equal(twin(images), expected)
        twin.joint_norm = nn.Identity()
        with pytest.raises(ConversionError):
            twin(images)
    assert torch.equal(net(images), expected)


def test_a_quantized_layer_in_the_place_of_another_is_used(
    net: anyprec.ConvertedModel, images: Tensor
) -> None:
    net.set_bits(2)
    low = net(images)
    net.head = copy.deepcopy(net.head)
    assert torch.equal(net(images), low)
    net.set_bits(8)
    assert net.quantized_layers["head"] is net.head
    assert net.head.bits == anyprec.Bits(8, 8)


def test_a_weight_used_without_a_call_stays_with_the_module_that_quantizes_it() -> None:
    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.inner.weight)

    x = torch.randn(4, 8)
    network = nn.Sequential(nn.Linear(8, 8), Owner(), nn.Linear(8, 2)).eval()
    model = anyprec.convert(network, bits=(2, 8), example_input=x)
    anyprec.calibrate(model, [x])
    model.set_bits(2)
    model(x)
    again = copy.deepcopy(model)
    parametrize.register_parametrization(again[1].inner, "weight", nn.Identity())
    with pytest.raises(ConversionError, match="'inner' was parametrized after conversion"):
        again(x)
    other = Owner()
    other.inner = model[1].inner
    model[1] = other
    with pytest.raises(ConversionError, match="module '1' was replaced by a Owner .* '1.inner'"):
        model(x)


def test_a_layer_parametrized_after_conversion_quantizes_the_weight_that_it_computes(
    net: anyprec.ConvertedModel, images: Tensor
) -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.head.weight.mul_(2)
    net.set_bits(4)
    before = net(images)
    parametrize.register_parametrization(net.head, "weight", Doubled(), unsafe=True)
    twin.set_bits(4)
    assert not torch.equal(net(images), before)
    assert torch.equal(net(images), twin(images))


def test_another_classifier_has_switchable_norms_like_the_old_one(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 32, 32)
    model = anyprec.convert(NormedHead().eval(), bits=(2, 8), example_input=x)
    anyprec.calibrate(model, [x])
    rows = model.norm.bank.rows
    for classes, norms in ((7, {"norm"}), (0, set()), (3, {"norm"})):
        model.set_bits(2)
        model.reset_classifier(classes)
        assert set(parts_of(model).norms) == norms
        if classes:
            assert isinstance(model.norm, SwitchableNorm)
            assert model.norm.bank.rows == rows
        anyprec.calibrate(model, [x])
        model.set_bits(2)
        anyprec.save(model, tmp_path / "net.safetensors", rebuildable=False)
        fresh = NormedHead()
        fresh.reset_classifier(classes)
        loaded = anyprec.load(tmp_path / "net.safetensors", fresh.eval())
        loaded.set_bits(2)
        assert torch.equal(loaded(x), model(x))


class NormedHead(nn.Module):
    """A network whose classifier has a norm, as LeViT's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.reset_classifier(5)

    def reset_classifier(self, classes: int) -> None:
        self.norm = nn.BatchNorm1d(8) if classes else nn.Identity()
        self.fc = nn.Linear(8, classes) if classes else nn.Identity()
        self.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(self.stem(x).relu()).mean((2, 3))
        return self.fc(self.norm(features))


def test_a_look_at_an_intact_network_takes_no_new_walk(net: anyprec.ConvertedModel) -> None:
    parts = parts_of(net)
    net.set_bits(4)
    net(torch.randn(1, 3, 16, 16))
    assert parts_of(net) is parts

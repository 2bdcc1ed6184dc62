"""A converted model: switching, describing itself, float weights, another classifier."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import anyprec
from anyprec.bits import BitConfig, Bits
from anyprec.errors import BitsError, ConversionError, NotCalibratedError
from anyprec.model.conversion import revert


class OwnUse(nn.Module):
    """Uses the weight of its own layer without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(nn.functional.linear(x, self.layer.weight).relu())


def test_set_bits_takes_numbers_pairs_notation_patterns_and_configurations(
    net: anyprec.ConvertedModel,
) -> None:
    net.set_bits(4)
    assert set(net.bits.values()) == {Bits(4, 4), Bits(8, 8)}
    assert net.bits["stem"] == Bits(8, 8)
    net.set_bits((4, 8))
    assert net.bits["pointwise"] == Bits(4, 8)
    net.set_bits("W2A8")
    assert net.bits["pointwise"] == Bits(2, 8)
    net.set_bits({"*wise": (3, 4), "head": 2})
    assert net.bits == BitConfig(
        {"stem": 8, "depthwise": (3, 4), "pointwise": (3, 4), "head": 2, "fc": 8}
    )
    config = net.bits.replace({"head": 4})
    net.set_bits(config)
    assert net.bits == config
    net.configs["mine"] = config.replace({"head": 3})
    net.set_bits("mine")
    assert net.bits["head"] == Bits(3, 3)
    net.set_bits(None)
    assert net.bits is None


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (5, "weight bit-width 5 is not a candidate of the network"),
        (16, "weight bit-width 16 is not supported"),
        ((4, 6), "activation bit-width 6 is not a candidate"),
        ("small", "cannot read 'small' as a precision.*"),
        ({"haed": 4}, "path 'haed' matches no layer; layers are 'stem'"),
        ({"layer9.*": 4}, r"pattern 'layer9\.\*' matches no layer"),
        ({"depthwise": 2}, "W2A2 is not a candidate of layer 'depthwise'"),
        (BitConfig({"head": 4}), "leaves 4 layers unnamed"),
        (4.0, "cannot read 4.0 as a precision"),
    ],
)
def test_a_bad_request_is_refused_and_the_precision_stays(
    request_: object, text: str, net: anyprec.ConvertedModel, images: Tensor
) -> None:
    net.set_bits(3)
    before, expected = net.bits, net(images)
    with pytest.raises(BitsError, match=text):
        net.set_bits(request_)
    assert net.bits == before
    assert torch.equal(net(images), expected)


def test_an_unknown_name_is_answered_with_the_known_ones(net: anyprec.ConvertedModel) -> None:
    net.configs["phone"] = net.resolve_bits(4)
    with pytest.raises(BitsError, match="or name one of the stored configurations: 'phone'"):
        net.set_bits("camera")


def test_using_bits_restores_also_after_an_exception_and_from_a_mixed_state(
    net: anyprec.ConvertedModel,
) -> None:
    net.set_bits({"head": 2})
    before = net.bits
    with pytest.raises(RuntimeError, match="in the block"), net.using_bits(4):
        assert net.bits["head"] == Bits(4, 4)
        raise RuntimeError("in the block")
    assert net.bits == before
    with net.using_bits(None):
        assert net.bits is None
    assert net.bits == before


def test_every_precision_gives_another_answer_and_returns_exactly(
    net: anyprec.ConvertedModel, images: Tensor
) -> None:
    outputs = {}
    for bits in (2, 3, 4, 8, None):
        net.set_bits(bits)
        outputs[bits] = net(images)
    assert len({tuple(output.flatten().tolist()) for output in outputs.values()}) == 5
    for bits in (None, 8, 2, 4, 3):
        net.set_bits(bits)
        assert torch.equal(net(images), outputs[bits])


def test_more_bits_come_closer_to_the_float_network(
    net: anyprec.ConvertedModel, images: Tensor
) -> None:
    expected = net(images)
    errors = []
    for bits in (2, 3, 4, 8):
        with net.using_bits(bits), torch.no_grad():
            errors.append(float((net(images) - expected).square().mean()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01 * errors[0]


def test_a_precision_before_calibration_is_refused(float_net: nn.Module, images: Tensor) -> None:
    model = anyprec.convert(float_net, example_input=images)
    with pytest.raises(
        NotCalibratedError,
        match=r"5 of 5 layers have no activation step sizes yet.*anyprec\.calibrate",
    ):
        model.set_bits(4)
    assert model.bits is None
    model.set_bits(None)


def test_norms_follow_the_pair_of_the_layer_that_feeds_them(net: anyprec.ConvertedModel) -> None:
    net.set_bits({"pointwise": (3, 8)})
    assert net.pointwise_norm.row == 1 * 4 + 3
    assert net.joint_norm.row == 0
    net.set_bits(None)
    assert net.pointwise_norm.row is None


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_keep_the_precision_and_are_independent(
    again: Callable[[nn.Module], anyprec.ConvertedModel],
    net: anyprec.ConvertedModel,
    images: Tensor,
) -> None:
    net.eval().set_bits(3)
    with torch.no_grad():
        expected = net(images)
        other = again(net)
        assert other.bits == net.bits
        assert torch.equal(other(images), expected)
        other.set_bits(2)
        for parameter in other.parameters():
            parameter.zero_()
        assert torch.equal(net(images), expected)


def test_a_state_dict_goes_into_a_fresh_conversion(
    net: anyprec.ConvertedModel, small_net: Callable[..., nn.Module], images: Tensor
) -> None:
    other = anyprec.convert(small_net().eval(), bits=(2, 3, 4, 8), example_input=images)
    other.load_state_dict(net.state_dict())
    for bits in (2, (3, 8), None):
        net.set_bits(bits)
        other.set_bits(bits)
        assert torch.equal(net(images), other(images))


def test_a_state_dict_with_a_missing_step_is_refused(net: anyprec.ConvertedModel) -> None:
    state = net.state_dict()
    del state["head.weight_quantizer.step"]
    with pytest.raises(
        RuntimeError, match=r"Missing key\(s\) in state_dict: \"head.weight_quantizer.step\""
    ):
        net.load_state_dict(state)


def test_a_float_state_dict_loads_and_asks_for_calibration(
    net: anyprec.ConvertedModel, small_net: Callable[..., nn.Module], images: Tensor
) -> None:
    other = small_net().eval()
    other.stem_norm.running_mean.uniform_(-1, 1)
    net.set_bits(4)
    net.load_state_dict(other.state_dict())
    assert net.bits is None
    assert torch.equal(net(images), other(images))
    assert torch.equal(net.stem_norm.bank.running_mean[0], other.stem_norm.running_mean)
    with pytest.raises(NotCalibratedError):
        net.set_bits(4)
    anyprec.calibrate(net, [images])
    net.set_bits(8)
    torch.testing.assert_close(
        net(images), other(images), atol=0.05, rtol=0.05
    )  # 8 bits are close, not equal


def test_reset_classifier_quantizes_the_new_layer(
    converted: Callable[..., anyprec.ConvertedModel],
) -> None:
    model, x = converted("test_resnet", num_classes=5), torch.randn(2, 3, 64, 64)
    steps = model.fc.input_quantizer.step.clone()
    model.set_bits(4)
    model.reset_classifier(7)
    assert model.bits is None
    assert model(x).shape == (2, 7)
    assert torch.equal(model.fc.input_quantizer.step, steps)
    assert model.candidates["fc"].weight == (8,)
    model.set_bits(2)
    assert model(x).shape == (2, 7)
    assert anyprec.cost_of(model, 8).model.layers["fc"].macs == 96 * 7


def test_reset_classifier_to_none_drops_the_layer_and_configurations(
    converted: Callable[..., anyprec.ConvertedModel],
) -> None:
    model = converted("test_resnet", num_classes=5)
    model.configs["mine"] = model.resolve_bits(4)
    model.reset_classifier(0)
    assert "fc" not in model.quantized_layers
    assert model.configs == {}
    model.set_bits(4)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 96)
    model.reset_classifier(4)
    assert "fc" in model.quantized_layers
    model.set_bits(2)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 4)
    assert model.anyprec_record.facts.layers["fc"].macs == 96 * 4


def test_another_classifier_leaves_the_earlier_record_as_it_was(
    converted: Callable[..., anyprec.ConvertedModel],
) -> None:
    model = converted("test_resnet", num_classes=5)
    earlier = model.anyprec_record
    coverage, layers = earlier.coverage, dict(earlier.facts.layers)
    model.reset_classifier(7)
    assert (earlier.coverage, earlier.facts.layers) == (coverage, layers)
    assert model.anyprec_record.facts.layers["fc"].weights == 96 * 7
    with pytest.raises(dataclasses.FrozenInstanceError):
        earlier.coverage = ()


def test_freezing_what_is_frozen_already_changes_nothing(net: anyprec.ConvertedModel) -> None:
    net.freeze({"head": 3})
    net.freeze(net.anyprec_record.frozen)
    assert net.frozen == {"head": Bits(3, 3)}


def test_a_network_without_a_classifier_of_its_own_has_no_reset_classifier(
    net: anyprec.ConvertedModel,
) -> None:
    assert not hasattr(net, "reset_classifier")


def test_a_layer_that_was_replaced_by_hand_is_named(net: anyprec.ConvertedModel) -> None:
    net.fc = nn.Linear(16, 9)
    with pytest.raises(
        ConversionError, match="layer 'fc' was replaced by a Linear after conversion"
    ):
        net.set_bits(4)


def test_summary_shows_candidates_and_the_active_precision(net: anyprec.ConvertedModel) -> None:
    net.set_bits({"head": (2, 4)})
    line = next(line for line in str(net.summary()).splitlines() if line.startswith("head"))
    assert line.split() == [
        "head",
        "Conv2d",
        "256",
        "16,384",
        "2,3,4,8",
        "2,3,4,8",
        "affine",
        "W2A4",
    ]


def test_functions_refuse_a_float_network_by_name(float_net: nn.Module) -> None:
    for call in (
        lambda: anyprec.calibrate(float_net, []),
        lambda: anyprec.update_norms(float_net, []),
        lambda: anyprec.cost_of(float_net),
        lambda: anyprec.OneShot(float_net, total_steps=1),
        lambda: anyprec.fit(float_net, [], epochs=1),
        lambda: anyprec.param_groups(float_net),
        lambda: anyprec.search(float_net, [], "W4A4"),
        lambda: anyprec.save(float_net, "net.safetensors"),
    ):
        with pytest.raises(
            ConversionError, match="needs a converted model, got SmallNet: call anyprec.convert"
        ):
            call()


def test_a_network_that_uses_its_own_layers_weight_directly_keeps_every_promise() -> None:
    model, x = OwnUse().eval(), torch.randn(6, 8)
    expected = model(x)
    converted = anyprec.convert(model, bits=(2, 8), first_last_bits=None, example_input=x)
    anyprec.calibrate(converted, [x])
    converted.set_bits(2)
    low = converted(x)
    assert not torch.equal(low, expected)
    for again in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert type(again) is type(converted)
        assert torch.equal(again(x), low)
    revert(converted)
    assert type(converted) is OwnUse
    assert torch.equal(converted(x), expected)


def test_a_float_state_dict_loads_into_a_network_with_a_shared_layer() -> None:
    def make() -> nn.Module:
        shared = nn.Linear(8, 8)
        return nn.Sequential(shared, nn.ReLU(), shared)

    x = torch.randn(4, 8)
    converted, other = anyprec.convert(make(), bits=(2, 8), example_input=x), make()
    converted.load_state_dict(other.state_dict())
    assert torch.equal(converted(x), other(x))


def test_a_bfloat16_network_stays_bfloat16(float_net: nn.Module, images: Tensor) -> None:
    x = images.bfloat16()
    model = anyprec.convert(float_net.bfloat16(), bits=(2, 8), example_input=x)
    anyprec.calibrate(model, [x])
    for bits in (2, 8):
        model.set_bits(bits)
        output = model(x)
        assert output.dtype == torch.bfloat16
        output.float().square().sum().backward()
    assert model.head.weight.grad.dtype == torch.bfloat16
    assert model.head.weight_quantizer.step.grad.any()


def test_timms_ema_follows_a_converted_model(
    converted: Callable[..., anyprec.ConvertedModel],
) -> None:
    model = converted("test_resnet", num_classes=5)
    ema = timm.utils.ModelEmaV3(model, decay=0.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    ema.update(model)
    x = torch.randn(2, 3, 64, 64)
    model.eval().set_bits(4)
    ema.module.set_bits(4)
    assert torch.equal(ema.module(x), model(x))


def wrapped(net: anyprec.ConvertedModel, wrapper: str) -> nn.Module:
    if wrapper == "compiled":
        return torch.compile(net, backend="eager")
    if wrapper == "compiled and parallel":
        return torch.compile(nn.DataParallel(net), backend="eager")
    if wrapper == "averaged":
        return torch.optim.swa_utils.AveragedModel(net)
    return nn.DataParallel(net)


@pytest.mark.parametrize(
    ("wrapper", "inner"),
    [
        ("parallel", "module"),
        ("averaged", "module"),
        ("compiled", "_orig_mod"),
        ("compiled and parallel", "_orig_mod.module"),
    ],
)
def test_a_wrapper_around_a_converted_model_is_refused_with_what_to_pass(
    wrapper: str, inner: str, net: anyprec.ConvertedModel, images: Tensor, tmp_path: Path
) -> None:
    network = wrapped(net, wrapper)
    loader = [(images, torch.arange(8) % 5)]
    calls = {
        "fit": lambda: anyprec.fit(network, loader, epochs=1),
        "OneShot": lambda: anyprec.OneShot(network, total_steps=1),
        "param_groups": lambda: anyprec.param_groups(network),
        "calibrate": lambda: anyprec.calibrate(network, [images]),
        "update_norms": lambda: anyprec.update_norms(network, [images]),
        "search": lambda: anyprec.search(network, loader, "W4A4"),
        "save": lambda: anyprec.save(network, tmp_path / "file.safetensors"),
        "cost_of": lambda: anyprec.cost_of(network, 4),
    }
    for purpose, call in calls.items():
        text = rf"{purpose} needs the converted model itself, .*pass its `\.{inner}`, the network"
        with pytest.raises(ConversionError, match=text):
            call()
    assert net.get_submodule("") is network.get_submodule(inner) or wrapper == "averaged"


class _OwnLoading(nn.Module):
    """Changes a state dict before it is loaded, and takes arguments in a way of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))

    def load_state_dict(self, state_dict, **kwargs):
        renamed = {name.removeprefix("module."): value for name, value in state_dict.items()}
        return super().load_state_dict(renamed, **kwargs)


class _StrictLoading(_OwnLoading):
    def load_state_dict(self, state_dict, strict=True):
        return super().load_state_dict(state_dict, strict=strict)


class _PlainLoading(_OwnLoading):
    def load_state_dict(self, state_dict):
        return super().load_state_dict(state_dict)


class _LoadingWithMore(_OwnLoading):
    def load_state_dict(self, state_dict, strict=True, *, prefix=""):
        state = {name.removeprefix(prefix): value for name, value in state_dict.items()}
        return super().load_state_dict(state, strict=strict)


_LOADING = [_OwnLoading, _StrictLoading, _PlainLoading, _LoadingWithMore]


@pytest.mark.parametrize("kind", _LOADING)
@pytest.mark.parametrize("packed", [False, True])
def test_a_network_with_its_own_load_state_dict_is_loaded(
    kind: type[nn.Module], packed: bool, tmp_path: Path
) -> None:
    x = torch.randn(4, 8)
    model = anyprec.convert(kind().eval(), bits=(2, 8), first_last_bits=None, example_input=x)
    anyprec.calibrate(model, [x])
    anyprec.save(model, tmp_path / "net.safetensors", rebuildable=False, packed=packed)
    loaded = anyprec.load(tmp_path / "net.safetensors", kind().eval())
    loaded.set_bits(2)
    model.set_bits(2)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize("kind", _LOADING)
def test_a_network_with_its_own_load_state_dict_takes_states_of_both_kinds(
    kind: type[nn.Module],
) -> None:
    x, floats = torch.randn(4, 8), kind().eval()
    model = anyprec.convert(kind().eval(), bits=(2, 8), first_last_bits=None, example_input=x)
    model.load_state_dict(floats.state_dict())
    assert torch.equal(model(x), floats(x))
    twin = anyprec.convert(kind().eval(), bits=(2, 8), first_last_bits=None, example_input=x)
    twin.load_state_dict(model.state_dict(), True)
    assert torch.equal(twin(x), floats(x))


def test_further_arguments_reach_the_networks_own_methods() -> None:
    class Network(_LoadingWithMore):
        def train(self, mode=True, *, deep=False):
            self.deep = deep
            return super().train(mode)

    x, floats = torch.randn(4, 8), _OwnLoading().eval()
    model = anyprec.convert(Network().eval(), bits=(2, 8), example_input=x)
    state = {f"teacher.{name}": value for name, value in floats.state_dict().items()}
    model.load_state_dict(state, prefix="teacher.", strict=True)
    assert torch.equal(model(x), floats(x))
    assert model.train(deep=True).deep


def test_load_state_dict_assigns_if_asked() -> None:
    x, floats = torch.randn(4, 8), _OwnLoading().eval()
    model = anyprec.convert(_OwnLoading().eval(), bits=(2, 8), example_input=x)
    model.load_state_dict({**model.state_dict(), **floats.state_dict()}, assign=True)
    assert model.first.weight.data_ptr() == floats.first.weight.data_ptr()

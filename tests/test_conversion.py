"""`convert`: what becomes of each layer, what is refused, and that the network stays the user's own."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

import anyprec
from anyprec.conversion import revert
from anyprec.errors import BitsError, ConversionError
from anyprec.layers import FunctionalOwner, QuantizedLayer
from anyprec.norms import SwitchableNorm

BITS = (2, 4, 8)


def test_the_model_is_converted_in_place_and_keeps_its_class(float_net: nn.Module, images: Tensor) -> None:
    kind, names = type(float_net), list(float_net.state_dict())
    model = anyprec.convert(float_net, bits=BITS, example_input=images)
    assert model is float_net
    assert isinstance(model, kind)
    assert isinstance(model.stem, nn.Conv2d)
    assert [name for name in model.state_dict() if name in names] == names


def test_inplace_false_leaves_the_model_alone(float_net: nn.Module, images: Tensor) -> None:
    names, expected = list(float_net.state_dict()), float_net(images)
    model = anyprec.convert(float_net, bits=BITS, example_input=images, inplace=False)
    assert model is not float_net
    assert list(float_net.state_dict()) == names
    assert not any(isinstance(module, QuantizedLayer) for module in float_net.modules())
    assert torch.equal(float_net(images), expected)


def test_candidates_follow_the_facts(float_net: nn.Module, images: Tensor) -> None:
    model = anyprec.convert(float_net, bits=BITS, activation_bits=(3, 8), example_input=images)
    candidates = model.candidates
    assert candidates["stem"].weight == candidates["stem"].activation == (8,)
    assert candidates["fc"].weight == (8,)
    assert (candidates["depthwise"].weight, candidates["depthwise"].activation) == ((4, 8), (3, 8))
    assert (candidates["pointwise"].weight, candidates["pointwise"].activation) == (BITS, (3, 8))


def test_first_last_bits_none_searches_every_layer(float_net: nn.Module, images: Tensor) -> None:
    model = anyprec.convert(float_net, bits=BITS, first_last_bits=None, example_input=images)
    assert model.candidates["stem"].weight == model.candidates["fc"].weight == BITS


def test_norms_get_a_copy_for_each_pair_of_the_layer_that_feeds_them(float_net: nn.Module, images: Tensor) -> None:
    model = anyprec.convert(float_net, bits=BITS, example_input=images)
    rows = {name: norm.bank.rows for name, norm in model.named_modules() if isinstance(norm, SwitchableNorm)}
    assert rows == {"stem_norm": 1, "depthwise_norm": 4, "pointwise_norm": 9, "joint_norm": 1}


def test_per_tensor_weights_have_one_step_each(float_net: nn.Module, images: Tensor) -> None:
    model = anyprec.convert(float_net, bits=BITS, per_channel=False, example_input=images)
    assert model.pointwise.weight_quantizer.step.shape == (3, 1)


def test_every_layer_is_covered_or_named_with_the_reason(float_net: nn.Module, images: Tensor) -> None:
    float_net.spare = nn.Linear(3, 3)
    model = anyprec.convert(float_net, bits=BITS, exclude="head", example_input=images)
    rows = {row.path: (row.status, row.reason) for row in model.coverage}
    assert list(rows) == ["stem", "depthwise", "pointwise", "head", "fc", "spare"]
    assert rows["head"] == ("exempt", "excluded by 'head'")
    assert rows["spare"] == ("skipped", "never used in an eval-mode forward pass")
    assert {path for path, (status, _) in rows.items() if status == "quantized"} == set(model.quantized_layers)
    assert "4 of 6 layers quantized" in str(model.summary())
    assert "excluded by 'head'" in str(model.summary())


def test_include_quantizes_only_what_matches(float_net: nn.Module, images: Tensor) -> None:
    model = anyprec.convert(float_net, bits=BITS, include=["*wise"], exclude=["depth*"], example_input=images)
    assert list(model.quantized_layers) == ["pointwise"]
    assert {row.reason for row in model.coverage if row.path == "fc"} == {"not named by include"}


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"bits": (2, 16)}, BitsError, "bits: bit-width 16 is not supported"),
        ({"bits": ()}, BitsError, "bits is empty"),
        ({"activation_bits": (1,)}, BitsError, "activation_bits: bit-width 1"),
        ({"first_last_bits": 32}, BitsError, "first_last_bits 32 is not supported"),
        ({"bits": (2,)}, BitsError, "depthwise convolution 'depthwise' has no candidate left"),
        ({"exclude": "layer*"}, ConversionError, r"exclude: pattern 'layer\*' matches no layer"),
        ({"include": ["stem", "typo"]}, ConversionError, "include: path 'typo' matches no layer"),
        ({"exclude": "*"}, ConversionError, "nothing to quantize in SmallNet"),
        ({"example_input": torch.zeros(0, 3, 16, 16)}, ConversionError, "at least one sample"),
        ({"example_input": torch.zeros(1, 9, 16, 16)}, ConversionError, "does not run on an example input"),
    ],
)
def test_what_cannot_be_converted_is_refused_and_left_as_it_was(
    arguments: dict[str, object], error: type[Exception], text: str, float_net: nn.Module, images: Tensor
) -> None:
    names, classes = list(float_net.state_dict()), [type(module) for module in float_net.modules()]
    with pytest.raises(error, match=text):
        anyprec.convert(float_net, **{"bits": BITS, "example_input": images, **arguments})
    assert list(float_net.state_dict()) == names
    assert [type(module) for module in float_net.modules()] == classes


def test_a_converted_network_is_refused_also_inside_another(net: anyprec.ConvertedModel, images: Tensor) -> None:
    with pytest.raises(ConversionError, match="it is converted already"):
        anyprec.convert(net, example_input=images)
    with pytest.raises(ConversionError, match="its '0' is converted already"):
        anyprec.convert(nn.Sequential(net), example_input=images)


@pytest.mark.parametrize(
    ("thing", "text"), [("resnet18", "takes a torch.nn.Module, got str"), (nn.Linear(3, 3), "a single Linear")]
)
def test_what_is_no_network_is_refused(thing: object, text: str) -> None:
    with pytest.raises(ConversionError, match=text):
        anyprec.convert(thing)


def test_a_network_without_layers_is_refused() -> None:
    with pytest.raises(ConversionError, match="it has no Conv or Linear layer"):
        anyprec.convert(nn.Sequential(nn.ReLU()), example_input=torch.zeros(1, 3))


def test_reverting_gives_the_float_network_back(net: anyprec.ConvertedModel, images: Tensor) -> None:
    net.set_bits(None)
    expected = net(images)
    revert(net)
    assert type(net).__name__ == "SmallNet"
    assert not any("quantizer" in name or "bank" in name for name in net.state_dict())
    assert torch.equal(net(images), expected)
    anyprec.convert(net, bits=BITS, example_input=images)


def test_the_input_is_guessed_from_timms_configuration() -> None:
    model = anyprec.convert(timm.create_model("test_vit", in_chans=1, img_size=48, num_classes=3), bits=BITS)
    assert model.anyprec_record.facts.example_shape == (1, 1, 48, 48)


def test_a_network_whose_input_cannot_be_guessed_says_so() -> None:
    with pytest.raises(ConversionError, match="cannot guess what input Sequential takes.*example_input"):
        anyprec.convert(nn.Sequential(nn.Linear(7, 3)))


# One network for each mechanism of the converter, all small.
NETWORKS: dict[str, Callable[[], tuple[nn.Module, int]]] = {
    "plain and depthwise": lambda: (timm.create_model("test_efficientnet", num_classes=5), 64),
    "residual": lambda: (timm.create_model("test_resnet", num_classes=5, drop_path_rate=0.2), 64),
    "weight standardisation": lambda: (timm.create_model("test_nfnet", num_classes=5), 64),
    "pre-norm with StdConv": lambda: (timm.create_model("test_byobnet", num_classes=5), 64),
    "LayerNorm": lambda: (timm.create_model("test_convnext", num_classes=5, drop_path_rate=0.2), 64),
    "attention": lambda: (timm.create_model("test_vit", num_classes=5, img_size=48, drop_rate=0.1), 48),
    "F.linear in the owner": lambda: (
        timm.create_model("eva02_tiny_patch14_224", img_size=28, depth=2, num_classes=5, attn_drop_rate=0.1),
        28,
    ),
    "F.linear and constant inputs": lambda: (
        timm.create_model(
            "swinv2_tiny_window8_256",
            img_size=32,
            window_size=4,
            embed_dim=12,
            depths=(1, 1),
            num_heads=(2, 2),
            num_classes=5,
            drop_path_rate=0.2,
        ),
        32,
    ),
    "norms after a concatenation": lambda: (
        timm.create_model("densenet121", growth_rate=4, block_config=(2, 2), num_classes=5, drop_rate=0.1),
        32,
    ),
    "SAME padding": lambda: (timm.create_model("tf_mobilenetv3_small_minimal_100", num_classes=5), 32),
    "several branches with their own norms": lambda: (timm.create_model("repvgg_a0", num_classes=5), 32),
}


def _waken(model: nn.Module, size: int) -> None:
    """Give zero-initialised parameters a value (they would block every gradient), and norms some statistics."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() == 1 or parameter.std() == 0:
                parameter.copy_(
                    0.3 + torch.rand_like(parameter) if parameter.ndim < 2 else torch.randn_like(parameter) * 0.1
                )
        model.train()
        for _ in range(3):
            model(torch.randn(4, 3, size, size))


@pytest.mark.parametrize("name", list(NETWORKS))
def test_a_network_of_each_kind_keeps_every_promise(name: str) -> None:
    model, size = NETWORKS[name]()
    _waken(model, size)
    original, x = copy.deepcopy(model), torch.randn(8, 3, size, size)
    anyprec.convert(model, bits=BITS, example_input=x[:1])
    assert all(row.status != "skipped" for row in model.coverage)
    anyprec.calibrate(model, [x])

    # Floating point: bit for bit, in both modes.
    for training in (False, True):
        outputs = []
        for network in (copy.deepcopy(original), copy.deepcopy(model)):
            torch.manual_seed(3)
            outputs.append(network.train(training)(x))
        assert torch.equal(*outputs)

    # Switching there and back; a copy; a round trip through a fresh network.
    model.eval()
    with torch.no_grad():
        model.set_bits(4)
        first = model(x)
        with model.using_bits(2):
            assert not torch.equal(model(x), first)
        assert torch.equal(model(x), first)
        assert torch.equal(copy.deepcopy(model)(x), first)
        fresh = anyprec.convert(copy.deepcopy(original), bits=BITS, example_input=x[:1])
        fresh.load_state_dict(model.state_dict())
        fresh.eval().set_bits(4)
        assert torch.equal(fresh(x), first)

    # One backward pass at the lowest bits reaches both steps of every layer: none is bypassed.
    model.train().set_bits(2)
    model(x).square().sum().backward()
    for path, layer in model.quantized_layers.items():
        assert layer.weight_quantizer.step.grad is not None, path
        assert layer.weight_quantizer.step.grad[0].any(), path
        assert layer.input_quantizer.step.grad[0].any(), path

    # timm's own methods.
    model.eval().set_bits(4)
    assert torch.isfinite(model.forward_features(x)).all()
    model.reset_classifier(3)
    anyprec.calibrate(model, [x])
    model.set_bits(2)
    assert model(x).shape == (8, 3)
    assert set(model.quantized_layers) == {row.path for row in model.coverage if row.status == "quantized"}


def test_quantizing_a_weight_that_its_owner_uses_changes_the_output() -> None:
    model, size = NETWORKS["F.linear in the owner"]()
    x = torch.randn(2, 3, size, size)
    model = anyprec.convert(model.eval(), bits=BITS, include="*qkv", first_last_bits=None, example_input=x)
    anyprec.calibrate(model, [x])
    assert any(isinstance(module, FunctionalOwner) for module in model.modules())
    model.set_bits((2, 8))
    low = model(x)
    model.set_bits((8, 8))
    assert not torch.equal(low, model(x))

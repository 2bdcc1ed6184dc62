"""`convert`: what becomes of each layer, what is refused, and that the network stays the user's."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import anyprec
from anyprec.errors import BitsError, ConversionError
from anyprec.model.conversion import revert
from anyprec.nn.layers import QuantizedLayer
from anyprec.nn.norms import SwitchableNorm
from anyprec.nn.owners import FunctionalOwner

BITS = (2, 4, 8)


def test_the_model_is_converted_in_place_and_keeps_its_class(
    float_net: nn.Module, images: Tensor
) -> None:
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


def test_norms_get_a_copy_for_each_pair_of_the_layer_that_feeds_them(
    float_net: nn.Module, images: Tensor
) -> None:
    model = anyprec.convert(float_net, bits=BITS, example_input=images)
    rows = {
        name: norm.bank.rows
        for name, norm in model.named_modules()
        if isinstance(norm, SwitchableNorm)
    }
    assert rows == {"stem_norm": 1, "depthwise_norm": 4, "pointwise_norm": 9, "joint_norm": 1}


def test_per_tensor_weights_have_one_step_each(float_net: nn.Module, images: Tensor) -> None:
    model = anyprec.convert(float_net, bits=BITS, per_channel=False, example_input=images)
    assert model.pointwise.weight_quantizer.step.shape == (3, 1)


def test_every_layer_is_covered_or_named_with_the_reason(
    float_net: nn.Module, images: Tensor
) -> None:
    float_net.spare = nn.Linear(3, 3)
    model = anyprec.convert(float_net, bits=BITS, exclude="head", example_input=images)
    rows = {row.path: (row.status, row.reason) for row in model.coverage}
    assert list(rows) == ["stem", "depthwise", "pointwise", "head", "fc", "spare"]
    assert rows["head"] == ("exempt", "excluded by 'head'")
    assert rows["spare"] == ("skipped", "never used in an eval-mode forward pass")
    assert {path for path, (status, _) in rows.items() if status == "quantized"} == set(
        model.quantized_layers
    )
    assert "4 of 6 layers quantized" in str(model.summary())
    assert "excluded by 'head'" in str(model.summary())


def test_include_quantizes_only_what_matches(float_net: nn.Module, images: Tensor) -> None:
    model = anyprec.convert(
        float_net, bits=BITS, include=["*wise"], exclude=["depth*"], example_input=images
    )
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
        (
            {"example_input": torch.zeros(1, 9, 16, 16)},
            ConversionError,
            "does not run on an example input",
        ),
    ],
)
def test_what_cannot_be_converted_is_refused_and_left_as_it_was(
    arguments: dict[str, object],
    error: type[Exception],
    text: str,
    float_net: nn.Module,
    images: Tensor,
) -> None:
    names, classes = list(float_net.state_dict()), [type(module) for module in float_net.modules()]
    with pytest.raises(error, match=text):
        anyprec.convert(float_net, **{"bits": BITS, "example_input": images, **arguments})
    assert list(float_net.state_dict()) == names
    assert [type(module) for module in float_net.modules()] == classes


def test_a_converted_network_is_refused_also_inside_another(
    net: anyprec.ConvertedModel, images: Tensor
) -> None:
    with pytest.raises(ConversionError, match="it is converted already"):
        anyprec.convert(net, example_input=images)
    with pytest.raises(ConversionError, match="its '0' is converted already"):
        anyprec.convert(nn.Sequential(net), example_input=images)


@pytest.mark.parametrize(
    ("thing", "text"),
    [("resnet18", "takes a torch.nn.Module, got str"), (nn.Linear(3, 3), "a single Linear")],
)
def test_what_is_no_network_is_refused(thing: object, text: str) -> None:
    with pytest.raises(ConversionError, match=text):
        anyprec.convert(thing)


def test_a_network_without_layers_is_refused() -> None:
    with pytest.raises(ConversionError, match="it has no Conv or Linear layer"):
        anyprec.convert(nn.Sequential(nn.ReLU()), example_input=torch.zeros(1, 3))


def test_reverting_gives_the_float_network_back(
    net: anyprec.ConvertedModel, images: Tensor
) -> None:
    net.set_bits(None)
    expected = net(images)
    revert(net)
    assert type(net).__name__ == "SmallNet"
    assert not any("quantizer" in name or "bank" in name for name in net.state_dict())
    assert torch.equal(net(images), expected)
    anyprec.convert(net, bits=BITS, example_input=images)


def test_the_input_is_guessed_from_timms_configuration() -> None:
    model = anyprec.convert(
        timm.create_model("test_vit", in_chans=1, img_size=48, num_classes=3), bits=BITS
    )
    assert model.anyprec_record.facts.example_shape == (1, 1, 48, 48)


def test_the_input_of_a_wrapped_network_is_guessed_from_the_network_inside() -> None:
    model = anyprec.convert(
        nn.Sequential(timm.create_model("test_vit", img_size=48, num_classes=3)), bits=BITS
    )
    assert model.anyprec_record.facts.example_shape == (1, 3, 48, 48)


def test_a_network_whose_input_cannot_be_guessed_says_so() -> None:
    with pytest.raises(
        ConversionError, match="cannot guess what input Sequential takes.*example_input"
    ):
        anyprec.convert(nn.Sequential(nn.Linear(7, 3)))


def test_quantizing_a_weight_that_its_owner_uses_changes_the_output() -> None:
    size = 28
    model = timm.create_model("eva02_tiny_patch14_224", img_size=size, depth=2, num_classes=5)
    x = torch.randn(2, 3, size, size)
    model = anyprec.convert(
        model.eval(), bits=BITS, include="*qkv", first_last_bits=None, example_input=x
    )
    anyprec.calibrate(model, [x])
    assert any(isinstance(module, FunctionalOwner) for module in model.modules())
    model.set_bits((2, 8))
    low = model(x)
    model.set_bits((8, 8))
    assert not torch.equal(low, model(x))


class Attentive(nn.Module):
    """A bare parameter in a matrix product, and attention, whose packed projection is no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mix = nn.Parameter(torch.randn(8, 6) * 0.3)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.fc((tokens @ self.mix).mean(dim=1))


@pytest.fixture
def attentive(images: Tensor) -> anyprec.ConvertedModel:
    model = anyprec.convert(Attentive().eval(), bits=BITS, example_input=images[:1])
    anyprec.calibrate(model, [images])
    return model


def test_bare_parameters_are_layers_and_keep_their_names(attentive: anyprec.ConvertedModel) -> None:
    assert list(attentive.quantized_layers) == [
        "matrices.mix",
        "patches",
        "attention.matrices.in_proj_weight",
        "attention.out_proj",
        "fc",
    ]
    assert set(Attentive().state_dict()) <= set(attentive.state_dict())
    assert {row.kind for row in attentive.coverage if "matrices" in row.path} == {"Parameter"}
    projection = attentive.quantized_layers["attention.matrices.in_proj_weight"]
    assert projection.weight is attentive.attention.in_proj_weight
    assert projection.weight_quantizer.step.shape == (len(BITS), 24)
    assert attentive.quantized_layers["matrices.mix"].weight_quantizer.step.shape == (len(BITS), 6)


def test_a_bare_parameter_is_quantized_where_it_is_used(
    attentive: anyprec.ConvertedModel, images: Tensor
) -> None:
    attentive.set_bits({"*": 8, "matrices.mix": 2})
    found = attentive(images)
    layer = attentive.quantized_layers["matrices.mix"]
    tokens = attentive.patches(images).flatten(2).transpose(1, 2)
    tokens = attentive.attention(tokens, tokens, tokens, need_weights=False)[0]
    product = layer.input_quantizer(tokens, 0) @ layer.weight_quantizer(attentive.mix, 0)
    assert torch.equal(found, attentive.fc(product.mean(dim=1)))


def test_bare_parameters_survive_copies_pickles_and_files(
    attentive: anyprec.ConvertedModel, images: Tensor, tmp_path: Path
) -> None:
    attentive.configs["low"] = attentive.resolve_bits(2)
    attentive.set_bits("low")
    expected = attentive(images)
    copied = copy.deepcopy(attentive)
    assert copied.quantized_layers["matrices.mix"].weight is copied.mix
    assert torch.equal(copied(images), expected)
    assert torch.equal(pickle.loads(pickle.dumps(attentive))(images), expected)
    anyprec.save(attentive, tmp_path / "file", rebuildable=False)
    loaded = anyprec.load(tmp_path / "file", Attentive().eval())
    loaded.set_bits("low")
    assert torch.equal(loaded(images), expected)


def test_reverting_removes_what_quantized_bare_parameters(
    attentive: anyprec.ConvertedModel,
) -> None:
    revert(attentive)
    assert list(attentive.state_dict()) == list(Attentive().state_dict())
    assert [type(module) for module in attentive.modules()] == [
        type(module) for module in Attentive().modules()
    ]


def test_a_holder_with_an_attribute_of_our_name_is_refused_and_left_as_it_was(
    images: Tensor,
) -> None:
    model = Attentive().eval()
    model.matrices = nn.Identity()
    with pytest.raises(
        ConversionError, match=r"Attentive has an attribute 'matrices' of its own.*parameter 'mix'"
    ):
        anyprec.convert(model, bits=BITS, example_input=images[:1])
    assert list(model.state_dict()) == list(Attentive().state_dict())
    assert isinstance(model.matrices, nn.Identity)
    anyprec.convert(model, bits=BITS, example_input=images[:1], exclude="matrices.mix")


def test_a_network_converts_without_values(images: Tensor) -> None:
    with torch.device("meta"):
        model = timm.create_model("test_vit")
    converted = anyprec.convert(model)
    assert anyprec.cost_of(converted, 4).bitops > 0
    assert all(parameter.is_meta for parameter in converted.parameters())


def test_a_copy_is_of_the_same_class_and_can_be_made_float_again(
    float_net: nn.Module, images: Tensor
) -> None:
    expected, kind = float_net(images), type(float_net)
    names = list(float_net.state_dict())
    model = anyprec.convert(float_net, example_input=images[:1])
    for twin in (copy.deepcopy(copy.deepcopy(model)), pickle.loads(pickle.dumps(model))):
        assert type(twin) is type(model)
        assert [type(module) for module in twin.modules()] == [
            type(module) for module in model.modules()
        ]
        revert(twin)
        assert type(twin) is kind
        assert list(twin.state_dict()) == names
        assert torch.equal(twin(images), expected)


def test_a_network_with_a_classifier_of_timms_is_copied_as_one() -> None:
    model = anyprec.convert(timm.create_model("test_resnet", num_classes=5))
    twin = copy.deepcopy(model)
    assert type(twin) is type(model)
    revert(twin)
    assert type(twin) is timm.models.ResNet


@pytest.mark.parametrize(
    "example",
    [
        [torch.zeros(1, 3, 16, 16)],
        (torch.zeros(1, 3, 16, 16), torch.zeros(1)),
        {"image": torch.zeros(1, 3, 16, 16)},
        torch.zeros(1, 3, 16, 16).numpy(),
        (1, 3, 16, 16),
        "image",
        224,
    ],
)
def test_an_example_that_is_no_tensor_is_refused_and_the_network_stays(
    example: object, float_net: nn.Module
) -> None:
    kind = type(float_net)
    text = f"example_input is a {type(example).__name__}: pass one tensor"
    with pytest.raises(ConversionError, match=text):
        anyprec.convert(float_net, example_input=example)
    assert type(float_net) is kind

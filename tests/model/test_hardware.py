"""The table of hardware, and what convert and the lists of problems make of it."""

from __future__ import annotations

from importlib import resources
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import anyprec
from anyprec.bits import Bits
from anyprec.errors import BitsError, ConversionError, HardwareError
from anyprec.exporting.lowering import lower
from anyprec.model import presets
from anyprec.model.hardware import read_table
from anyprec.model.intact import output_quantizers
from anyprec.model.pairs import nearest_pair
from benchmarks.hardware import page

ENTRY = """
[chip]
title = "A chip"
weights = "per-channel"
grid = "symmetric"
scale = "any"
placement = "layers"
export = ""
route = "By hand."
evidence = "from documents"
sources = [{title = "Its guide", url = "https://example.org/guide"}]
[chip.pairs]
convolution = ["W2/4 A8", "W8 A8/16"]
depthwise = []
linear = ["W8 A8"]
other = ["W1 A8"]
"""


def texts(pairs: tuple[Bits, ...]) -> list[str]:
    return list(map(str, pairs))


# --- The table


def test_the_targets_are_those_that_were_promised() -> None:
    assert anyprec.hardware_names() == (
        "onnxruntime",
        "openvino",
        "tensorrt",
        "xnnpack",
        "litert",
        "imx500",
        "hailo",
        "qualcomm-htp",
        "ti-c2000",
        "max78000",
        "ethos-u",
        "stm32n6",
        "fpga",
    )


@pytest.mark.parametrize("name", anyprec.hardware_names())
def test_every_target_runs_w8a8_convolutions_and_names_a_document(name: str) -> None:
    target = anyprec.hardware(name)
    assert target.name == name
    assert Bits(8, 8) in target.pairs.convolution
    assert Bits(8, 8) in target.pairs.linear
    for source in target.sources:
        assert source.url.startswith("https://")


def test_facts_that_users_rely_on() -> None:
    litert, tensorrt = anyprec.hardware("litert"), anyprec.hardware("tensorrt")
    assert texts(litert.pairs.convolution) == texts(litert.pairs.linear) == ["W4A8", "W8A8"]
    assert texts(litert.pairs.depthwise) == ["W8A8"]
    assert (tensorrt.grid, texts(tensorrt.pairs.convolution)) == ("signed", ["W8A8"])
    imx500 = anyprec.hardware("imx500")
    assert (imx500.grid, imx500.scale) == ("symmetric", "power-of-two")
    assert texts(imx500.pairs.depthwise) == ["W2A8", "W4A8", "W8A8"]
    assert anyprec.hardware("max78000").pairs.depthwise == ()
    assert anyprec.hardware("hailo").unavailable["convolution"] == ("W8A16", "W16A16")
    assert len(anyprec.hardware("fpga").pairs.convolution) == 49


def test_pairs_are_read_ascending_and_those_beyond_our_bits_kept_apart() -> None:
    chip = read_table(ENTRY)["chip"]
    assert texts(chip.pairs.convolution) == ["W2A8", "W4A8", "W8A8"]
    assert chip.unavailable == {
        "convolution": ("W8A16",),
        "depthwise": (),
        "linear": (),
        "other": ("W1A8",),
    }
    assert chip.pairs.other == ()
    assert (chip.first_last, chip.notes, chip.unchecked) == (None, "", "")
    assert read_table(ENTRY.replace("[chip]", "[chip]\nfirst_last = 8"))["chip"].first_last == 8


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('title = "A chip"', "", "required field `title`"),
        ('title = "A chip"', 'title = "A chip"\ncolour = "red"', "unknown field `colour`"),
        ('title = "A chip"', 'title = ""', "length >= 1"),
        ('grid = "symmetric"', 'grid = "lopsided"', "Invalid enum value 'lopsided'"),
        ('scale = "any"', "scale = 3", "Expected `str`, got `int`"),
        ('evidence = "from documents"', 'evidence = "guessed"', "Invalid enum value 'guessed'"),
        ('export = ""', 'export = "exe"', "Invalid enum value 'exe'"),
        ('"W2/4 A8"', '"W2/4A8"', "chip.pairs.convolution has 'W2/4A8': write precisions as"),
        ('"W2/4 A8"', '"W8 A8"', "chip.pairs.convolution names W8A8 twice"),
        ("linear = ", "lineal = ", "unknown field `lineal`"),
        ('"https://example.org/guide"}', '""}, 3', "Expected `object`, got `int`"),
        ("[chip]", "[chip", "not as expected"),
        ("[chip]", "[chip]\nfirst_last = 9", "Expected `int` <= 8"),
    ],
)
def test_another_form_is_refused(old: str, new: str, message: str) -> None:
    assert old in ENTRY
    with pytest.raises(HardwareError) as caught:
        read_table(ENTRY.replace(old, new))
    assert message in str(caught.value)


def test_an_unknown_target_is_named_with_the_closest_one() -> None:
    with pytest.raises(
        HardwareError, match=r"no hardware 'LiteRT2' is known, did you mean 'litert'\?"
    ):
        anyprec.hardware("LiteRT2")
    with pytest.raises(HardwareError, match="There are onnxruntime, openvino, .*, fpga$"):
        anyprec.hardware("zzzz")


def test_the_table_is_part_of_the_package() -> None:
    assert resources.files("anyprec.model").joinpath("hardware.toml").is_file()


def test_the_documentation_shows_the_table_as_it_is() -> None:
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.in_page(text) == page.rendered(), "run python -m benchmarks.hardware.page"
    for name in anyprec.hardware_names():
        target = anyprec.hardware(name)
        for part in (target.title, target.route, target.notes, target.unchecked, target.evidence):
            assert part in text
        for source in target.sources:
            assert f"[{source.title}]({source.url})" in text
    assert "| [`litert`](#litert) | W4/8 A8 | W8 A8 | W4/8 A8 | W8 A8 | per-channel |" in text


def test_the_nearest_pair_is_the_higher_of_equals() -> None:
    pairs = [Bits(2, 8), Bits(4, 8), Bits(8, 8)]
    assert nearest_pair(Bits(4, 4), pairs) == Bits(4, 8)
    assert nearest_pair(Bits(3, 8), pairs) == Bits(4, 8)
    assert nearest_pair(Bits(3, 8), []) is None


# --- convert


def candidates_of(network: nn.Module, images: Tensor, **arguments: Any) -> dict[str, Any]:
    model = anyprec.convert(network, example_input=images, **arguments)
    return {path: (layer.weight, layer.activation) for path, layer in model.candidates.items()}


def test_each_kind_of_layer_gets_what_the_target_runs(float_net: nn.Module, images: Tensor) -> None:
    found = candidates_of(float_net, images, hardware="litert", first_last_bits=None)
    four = ((4, 8), (8,))
    assert found == {
        "stem": four,
        "depthwise": ((8,), (8,)),
        "pointwise": four,
        "head": four,
        "fc": four,
    }


def test_first_and_last_layers_stay_at_8_bits_by_default(
    float_net: nn.Module, images: Tensor
) -> None:
    found = candidates_of(float_net, images, hardware="imx500")
    assert found["stem"] == found["fc"] == ((8,), (8,))
    assert found["pointwise"] == ((2, 4, 8), (8,))
    assert found["depthwise"] == ((4, 8), (8,))  # depthwise_min_bits=3 still holds


def test_bits_that_are_given_limit_those_of_the_target(
    float_net: nn.Module, images: Tensor
) -> None:
    found = candidates_of(float_net, images, hardware="imx500", bits=(2, 8), inplace=False)
    assert found["pointwise"] == ((2, 8), (8,))
    found = candidates_of(float_net, images, hardware="fpga", bits=(3, 4), activation_bits=(5, 7))
    assert found["pointwise"] == ((3, 4), (5, 7))


def test_without_a_target_nothing_has_changed(float_net: nn.Module, images: Tensor) -> None:
    model = anyprec.convert(float_net, example_input=images)
    settings = model.anyprec_record.settings
    assert settings.bits == settings.activation_bits == presets.DEFAULT_BITS == (2, 3, 4, 5, 6, 8)
    assert settings.per_channel
    assert (settings.activation_grid, settings.activation_scale) == ("affine", "any")
    assert settings.hardware is settings.pairs is None


def test_grids_scales_and_granularity_are_the_targets(float_net: nn.Module, images: Tensor) -> None:
    model = anyprec.convert(float_net, hardware="max78000", example_input=images)
    settings = model.anyprec_record.settings
    assert (settings.activation_grid, settings.activation_scale) == ("signed", "power-of-two")
    assert settings.hardware == "max78000"
    assert not settings.per_channel
    layer = model.pointwise
    assert layer.weight_quantizer.step.shape[1] == 1
    assert layer.input_quantizer.rule == anyprec.GridRule("signed", "power-of-two")
    left = {row.path: row.reason for row in model.coverage if row.status != "quantized"}
    assert left == {"depthwise": "max78000 has no precision for such a layer"}
    anyprec.calibrate(model, [images])
    model.set_bits(8)
    assert anyprec.hardware_problems(model, None, "max78000") == {}
    assert anyprec.grid_problems(model, "max78000") == {}


def test_the_placement_is_what_the_target_recommends_unless_one_is_given() -> None:
    images = torch.randn(1, 3, 32, 32)
    recommended = {"imx500": "integer", "fpga": "layers"}
    for hardware, placement in recommended.items():
        net = timm.create_model("test_resnet", num_classes=5).eval()
        model = anyprec.convert(net, hardware=hardware, example_input=images)
        assert model.anyprec_record.settings.placement == placement
        assert bool(output_quantizers(model)) == (placement == "integer")
    for hardware, placement in (("imx500", "layers"), ("fpga", "integer"), (None, "integer")):
        net = timm.create_model("test_resnet", num_classes=5).eval()
        model = anyprec.convert(net, hardware=hardware, placement=placement, example_input=images)
        assert model.anyprec_record.settings.placement == placement
        assert bool(output_quantizers(model)) == (placement == "integer")


def test_grids_of_outputs_are_the_targets_too() -> None:
    images = torch.randn(2, 3, 32, 32)
    net = timm.create_model("test_resnet", num_classes=5).eval()
    model = anyprec.convert(net, hardware="imx500", example_input=images)
    anyprec.calibrate(model, [images])
    assert anyprec.grid_problems(model, "imx500") == {}
    for output in output_quantizers(model).values():
        assert output.rule == anyprec.GridRule("symmetric", "power-of-two")
    # For TensorRT all must be signed; outputs of a ReLU are on the unsigned grid here.
    problems = anyprec.grid_problems(model, "tensorrt")
    unsigned = [path for path, row in output_quantizers(model).items() if row.kind == "unsigned"]
    assert unsigned
    for path in unsigned:
        assert problems[path] == (
            f"output {path!r} does not fit tensorrt: it has the zero point 0 at 8 bits, and 128 "
            "is allowed: convert with activation_grid='signed'"
        )


def test_a_stricter_grid_than_the_targets_is_taken(float_net: nn.Module, images: Tensor) -> None:
    model = anyprec.convert(
        float_net,
        hardware="litert",
        activation_grid="signed",
        activation_scale="power-of-two",
        example_input=images,
    )
    assert model.head.input_quantizer.rule == anyprec.GridRule("signed", "power-of-two")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"hardware": "litert", "bits": (2, 8)},
            r"bits=\(2, 8\) has 2, but litert runs weight bits \(4, 8\) only",
        ),
        (
            {"hardware": "litert", "activation_bits": (4,)},
            r"activation_bits=\(4,\) has 4, but litert runs activation bits \(8,\) only",
        ),
        (
            {"hardware": "litert", "first_last_bits": 4},
            "first_last_bits=4 stands for W4A4, but litert runs W4A8, W8A8 only",
        ),
        (
            {"hardware": "litert", "per_channel": False},
            "per_channel=False does not fit litert, whose weights have per-channel step sizes",
        ),
        (
            {"hardware": "max78000", "per_channel": True},
            "per_channel=True does not fit max78000, whose weights have per-tensor step sizes",
        ),
        (
            {"hardware": "tensorrt", "activation_grid": "symmetric"},
            "activation_grid='symmetric' does not fit tensorrt, which takes 'signed': leave",
        ),
        (
            {"hardware": "fpga", "activation_grid": "affine"},
            "activation_grid='affine' does not fit fpga, which takes 'symmetric' or 'signed'",
        ),
        (
            {"hardware": "imx500", "activation_scale": "any"},
            "activation_scale='any' does not fit imx500, which takes 'power-of-two'",
        ),
    ],
)
def test_an_argument_that_contradicts_the_target_is_refused(
    float_net: nn.Module, images: Tensor, arguments: dict[str, Any], message: str
) -> None:
    before = dict(float_net.state_dict())
    with pytest.raises(ConversionError, match=message):
        anyprec.convert(float_net, example_input=images, **arguments)
    assert list(float_net.state_dict()) == list(before)
    assert not isinstance(float_net, anyprec.ConvertedModel)


def test_bits_that_leave_a_layer_nothing_name_it(float_net: nn.Module, images: Tensor) -> None:
    with pytest.raises(
        BitsError,
        match=r"litert runs layer 'depthwise' \(depthwise\) at W8A8 only, but bits leaves it "
        r"weight bits \(4,\) and activation bits \(8,\): nearest is W8A8",
    ):
        anyprec.convert(float_net, hardware="litert", bits=(4,), example_input=images)
    assert not isinstance(float_net, anyprec.ConvertedModel)


def test_a_demand_for_first_and_last_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    chip = read_table(ENTRY.replace("[chip]", "[chip]\nfirst_last = 8"))["chip"]
    monkeypatch.setattr(presets, "hardware", {"chip": chip}.__getitem__)
    given = dict.fromkeys(
        (
            "bits",
            "activation_bits",
            "per_channel",
            "activation_grid",
            "activation_scale",
            "placement",
        )
    )
    given["placement"] = None
    others = {"depthwise_min_bits": 3, "include": None, "exclude": ()}
    settings = presets.make_settings("chip", first_last_bits=8, **given, **others)
    assert settings.first_last_bits == 8
    with pytest.raises(ConversionError, match="first_last_bits=None does not fit chip"):
        presets.make_settings("chip", first_last_bits=None, **given, **others)


@pytest.mark.parametrize("given", [None, "layers"])
def test_placement_is_the_recommended_one_unless_it_is_given(
    float_net: nn.Module, images: Tensor, given: str | None
) -> None:
    model = anyprec.convert(float_net, hardware="imx500", placement=given, example_input=images[:1])
    assert model.anyprec_record.settings.placement == (given or "integer")
    outputs = output_quantizers(model)
    assert bool(outputs) == (given is None)
    anyprec.calibrate(model, [images])
    with torch.no_grad():
        for quantizer in outputs.values():
            assert quantizer.rule == anyprec.GridRule("symmetric", "power-of-two")
            quantizer.step.mul_(1.3)  # as training leaves them
    for layer in model.quantized_layers.values():
        index = layer.candidates.activation.index(8)
        assert layer.input_quantizer.step_in_use(index).log2().frac() == 0
    assert anyprec.grid_problems(model, "imx500") == {}
    expected = {path for path, output in outputs.items() if output.kind == "unsigned"}
    problems = anyprec.grid_problems(model, "tensorrt")
    assert expected <= problems.keys()
    model.set_bits("W4A8")
    lowered = lower(model, "W4A8", example_input=images)
    assert torch.equal(lowered.graph(images), model(images))


@pytest.mark.parametrize("argument", ["activation_grid", "activation_scale", "placement"])
def test_unknown_grids_and_scales_are_refused(
    float_net: nn.Module, images: Tensor, argument: str
) -> None:
    with pytest.raises(ValueError, match=rf"{argument}='round' is not known: use one of \("):
        anyprec.convert(float_net, example_input=images, **{argument: "round"})


def test_an_unknown_target_is_refused_by_convert(float_net: nn.Module, images: Tensor) -> None:
    with pytest.raises(HardwareError, match="no hardware 'abacus'"):
        anyprec.convert(float_net, hardware="abacus", example_input=images)


def test_kinds_of_layers_are_read_off_their_class() -> None:
    class Kinds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grouped = nn.Conv2d(4, 8, 1, groups=2)
            self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
            self.up = nn.ConvTranspose2d(8, 8, 2, groups=8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.recurrent = nn.LSTM(8, 4, batch_first=True)
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.up(self.depthwise(self.grouped(x))).flatten(2).transpose(1, 2)
            x, _ = self.attention(x, x, x, need_weights=False)
            x, _ = self.recurrent(x)
            return self.fc(x.mean(1))

    model = anyprec.convert(
        Kinds().eval(),
        bits=(4,),
        first_last_bits=None,
        activation_grid="signed",
        example_input=torch.randn(1, 4, 4, 4),
    )
    anyprec.calibrate(model, [torch.randn(2, 4, 4, 4)])
    for layer in model.quantized_layers.values():  # bare parameters among them
        assert layer.input_quantizer.rule.grid == layer.input_quantizer.kind == "signed"
    problems = anyprec.hardware_problems(model, 4, "litert")
    assert {path: problem.kind for path, problem in problems.items()} == {
        "grouped": "convolution",
        "depthwise": "depthwise",
        "up": "other",
        "attention.out_proj": "linear",
        "attention.matrices.in_proj_weight": "linear",
        "recurrent.matrices.weight_ih_l0": "other",
        "recurrent.matrices.weight_hh_l0": "other",
        "fc": "linear",
    }


def test_a_new_classifier_keeps_rule_and_kind() -> None:
    model = anyprec.convert(
        timm.create_model("test_resnet", num_classes=5).eval(),
        hardware="imx500",
        example_input=torch.randn(1, 3, 64, 64),
    )
    model.reset_classifier(7)
    assert model.fc.input_quantizer.rule == anyprec.GridRule("symmetric", "power-of-two")
    assert model.anyprec_record.facts.layers["fc"].kind == "linear"
    images = torch.randn(2, 3, 64, 64)
    anyprec.calibrate(model, [images])
    assert anyprec.grid_problems(model, "imx500") == {}
    assert model(images).shape == (2, 7)


# --- Problems


def test_problems_name_layer_pair_and_nearest(net: anyprec.ConvertedModel) -> None:
    config = {"pointwise": "W4A4", "depthwise": "W3A8", "head": "W4A8"}
    problems = anyprec.hardware_problems(net, config, "litert")
    assert list(problems) == ["depthwise", "pointwise"]
    assert str(problems["pointwise"]) == (
        "layer 'pointwise' (convolution) has W4A4, but W4A8, W8A8 can run: nearest is W4A8"
    )
    assert problems["depthwise"].nearest == Bits(8, 8)
    assert anyprec.hardware_problems(net, 8, "litert") == {}
    assert anyprec.hardware_problems(net, 2, "fpga") == {}
    left = anyprec.hardware_problems(net, 8, "max78000")
    assert str(left["depthwise"]) == (
        "layer 'depthwise' (depthwise) has W8A8, but such a layer runs in floating point only: "
        "exclude it in convert"
    )


def test_the_nearest_pair_is_one_that_the_layer_may_take(
    float_net: nn.Module, images: Tensor
) -> None:
    model = anyprec.convert(float_net, bits=(3, 8), activation_bits=(4, 8), example_input=images)
    problem = anyprec.hardware_problems(model, "W3A8", "litert")["pointwise"]
    assert problem.nearest == Bits(8, 8)  # W4A8 is nearer, but no candidate
    assert texts(problem.allowed) == ["W4A8", "W8A8"]


def test_grids_that_a_target_cannot_take_are_named(net: anyprec.ConvertedModel) -> None:
    problems = anyprec.grid_problems(net, "tensorrt")
    assert "depthwise" in problems
    assert problems["depthwise"] == (
        "layer 'depthwise' does not fit tensorrt: its input has the zero point 0 at 3 bits, and 4 "
        "is allowed: convert with activation_grid='signed'"
    )
    assert anyprec.grid_problems(net, "onnxruntime") == {}
    assert "no powers of two" in anyprec.grid_problems(net, "imx500")["depthwise"]

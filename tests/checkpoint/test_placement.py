"""Files of networks with integer placement, and old files without that setting."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import anyprec
from anyprec.model.intact import output_quantizers
from anyprec.nn.shared import SharedInputQuantizer
from anyprec.runtime.storage import read_file, write_file

CONFIGS = (2, 8, (4, 8), {"layer1.*": (8, 4)})


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def float_net() -> nn.Module:
    return timm.create_model("test_resnet", num_classes=5).eval()


@pytest.fixture
def net(float_net: nn.Module, images: Tensor) -> anyprec.ConvertedModel:
    model = anyprec.convert(
        float_net, bits=(2, 4, 8), example_input=images[:1], placement="integer"
    )
    anyprec.calibrate(model, [images])
    return model


def _outputs(net: anyprec.ConvertedModel, images: Tensor) -> list[Tensor]:
    outputs = []
    for bits in CONFIGS:
        net.set_bits(bits)
        with torch.no_grad():
            outputs.append(net(images))
    return outputs


@pytest.mark.parametrize("packed", [False, True])
def test_a_loaded_network_computes_the_same(
    net: anyprec.ConvertedModel, images: Tensor, tmp_path: Path, packed: bool
) -> None:
    file = tmp_path / "net.safetensors"
    anyprec.save(net, file, packed=packed)
    again = anyprec.load(file)
    assert again.anyprec_record.settings.placement == "integer"
    assert again.anyprec_record.facts == net.anyprec_record.facts
    for loaded, saved in zip(_outputs(again, images), _outputs(net, images), strict=True):
        assert torch.equal(loaded, saved)


def test_a_converted_network_takes_the_file(
    net: anyprec.ConvertedModel, images: Tensor, tmp_path: Path
) -> None:
    file = tmp_path / "net.safetensors"
    anyprec.save(net, file)
    expected = _outputs(net, images)
    for output in output_quantizers(net).values():
        with torch.no_grad():
            output.step.mul_(2)
    assert not torch.equal(_outputs(net, images)[1], expected[1])
    anyprec.load(file, net)
    for loaded, saved in zip(_outputs(net, images), expected, strict=True):
        assert torch.equal(loaded, saved)


@pytest.mark.parametrize("bits", CONFIGS)
def test_a_single_configuration_is_loaded(
    net: anyprec.ConvertedModel, images: Tensor, tmp_path: Path, bits: object
) -> None:
    file = tmp_path / "net.safetensors"
    anyprec.save(net, file)
    one = anyprec.load(file, bits=bits)
    net.set_bits(bits)
    with torch.no_grad():
        expected = net(images)
        assert torch.equal(one(images), expected)
    reader = one.quantized_layers["layer1.0.conv1"]
    is_shared = isinstance(reader.input_quantizer, SharedInputQuantizer)
    assert is_shared == (reader.bits.activation == 8)
    # A network of one configuration is saved and loaded like any other.
    anyprec.save(one, file, packed=True)
    with torch.no_grad():
        assert torch.equal(anyprec.load(file)(images), expected)


def test_a_network_with_other_placement_is_refused(
    net: anyprec.ConvertedModel, float_net: nn.Module, images: Tensor, tmp_path: Path
) -> None:
    file = tmp_path / "net.safetensors"
    anyprec.save(net, file)
    plain = timm.create_model("test_resnet", num_classes=5)
    plain = anyprec.convert(plain, bits=(2, 4, 8), example_input=images[:1])
    with pytest.raises(anyprec.CheckpointError, match="placement='layers'"):
        anyprec.load(file, plain)


def test_files_of_layers_placement_do_not_mention_it(images: Tensor, tmp_path: Path) -> None:
    net = timm.create_model("test_resnet", num_classes=5)
    net = anyprec.convert(net, bits=(4, 8), example_input=images[:1])
    anyprec.save(net, tmp_path / "net.safetensors")
    document = json.loads(read_file(tmp_path / "net.safetensors")[1])
    assert "placement" not in document["settings"]
    assert document.keys().isdisjoint({"outputs", "apart"})
    assert anyprec.load(tmp_path / "net.safetensors").anyprec_record.settings.placement == "layers"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("path", "act1.output_quantizers.x", "no path of an output quantizer"),
        ("path", "fc.output_quantizers.0", "not inside its owner"),
        ("index", 1, "has index 1 of 1 calls"),
        ("owner", "nowhere", "nowhere"),
        ("counts", [], "counts"),
    ],
)
def test_documents_with_impossible_outputs_are_refused(
    net: anyprec.ConvertedModel, tmp_path: Path, field: str, value: object, message: str
) -> None:
    file = tmp_path / "net.safetensors"
    anyprec.save(net, file)
    tensors, text = read_file(file)
    document = json.loads(text)
    assert document["outputs"][0]["owner"] == "act1"
    document["outputs"][0][field] = value
    write_file(file, tensors, json.dumps(document))
    with pytest.raises(anyprec.CheckpointError, match=message):
        anyprec.load(file)


def test_missing_step_sizes_of_outputs_are_refused(
    net: anyprec.ConvertedModel, tmp_path: Path
) -> None:
    next(iter(output_quantizers(net).values())).forget()
    anyprec.save(net, tmp_path / "net.safetensors")
    with pytest.raises(anyprec.NotCalibratedError, match="no step sizes"):
        anyprec.load(tmp_path / "net.safetensors", bits=8)


class Nested(nn.Module):
    """A function is called in the network itself and in a module of which nothing is quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.act = nn.ReLU()
        self.conv = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(self.act(self.stem(x))))
        return self.fc((x + x.square()).mean((2, 3)))


def test_a_file_knows_which_calls_are_counted_apart(images: Tensor, tmp_path: Path) -> None:
    network = Nested().eval()
    net = anyprec.convert(
        copy.deepcopy(network), bits=(2, 4, 8), example_input=images[:1], placement="integer"
    )
    anyprec.calibrate(net, [images])
    assert net.anyprec_record.facts.apart == ("act", "fc")
    anyprec.save(net, tmp_path / "net.safetensors")
    again = anyprec.load(tmp_path / "net.safetensors", network)
    assert again.anyprec_record.facts == net.anyprec_record.facts
    for bits in (2, 8):
        net.set_bits(bits)
        again.set_bits(bits)
        with torch.no_grad():
            assert torch.equal(again(images), net(images))


def test_a_new_classifier_keeps_outputs(net: anyprec.ConvertedModel, images: Tensor) -> None:
    outputs = output_quantizers(net)
    net.reset_classifier(3)
    assert output_quantizers(net) == outputs
    net.set_bits(8)
    assert net(images).shape == (4, 3)
    net.reset_classifier(0)
    copied = copy.deepcopy(net)
    copied.set_bits(8)
    assert torch.isfinite(copied(images)).all()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bits", [None, "W4A8"])
def test_powers_of_two_on_signed_grids_are_loaded_bit_for_bit(
    float_net: nn.Module, images: Tensor, tmp_path: Path, packed: bool, bits: str | None
) -> None:
    model = anyprec.convert(
        float_net,
        bits=(2, 4, 8),
        activation_grid="signed",
        activation_scale="power-of-two",
        placement="integer",
        example_input=images[:1],
    )
    anyprec.calibrate(model, [images])
    saved = output_quantizers(model)
    assert any(output.nonnegative for output in saved.values())
    with torch.no_grad():
        for output in saved.values():
            assert output.zero_points == (128,)
            assert torch.equal(output.step[0], output.step_in_use(0))
            output.step.mul_(1.3)  # as training leaves them: no powers of two
    anyprec.save(model, tmp_path / "net", packed=packed)
    loaded = anyprec.load(tmp_path / "net", bits=bits)
    settings = dataclasses.replace(loaded.anyprec_record.settings, only=None)
    assert settings == model.anyprec_record.settings
    for path, output in output_quantizers(loaded).items():
        assert output.rule == anyprec.GridRule("signed", "power-of-two")
        assert output.zero_points == (128,)
        assert output.step_in_use(0) == saved[path].step_in_use(0)
        assert output.step_in_use(0).log2().frac() == 0
    shared = 0
    for layer in loaded.quantized_layers.values():
        reader = layer.input_quantizer
        if isinstance(reader, SharedInputQuantizer):
            shared += 1
            last = len(reader.candidates) - 1
            assert reader.step_in_use(last) == reader.trunk.step_in_use(0)
    assert shared
    for config in CONFIGS if bits is None else (bits,):
        with model.using_bits(config), loaded.using_bits(config), torch.no_grad():
            assert torch.equal(loaded(images), model(images))

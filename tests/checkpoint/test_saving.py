"""What survives save and load, whichever way the network is loaded."""

from __future__ import annotations

import copy
import json

import pytest
import timm
import torch
from torch import nn

import anyprec
from anyprec.checkpoint.document import Document
from anyprec.runtime.storage import read_file, write_file


def _outputs(model, images, precisions=(None, 4, (2, 8))):
    results = []
    for precision in precisions:
        model.set_bits(precision)
        with torch.no_grad():
            results.append(model(images))
    model.set_bits(None)
    return results


def _equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_loading_into_a_float_network_converts_it_in_place(path, model, plain, batch, same_state):
    network = plain()
    loaded = anyprec.load(path, network)
    assert loaded is network
    assert isinstance(loaded, anyprec.ConvertedModel)
    assert same_state(loaded.state_dict(), model.state_dict())
    assert _equal(_outputs(loaded, batch), _outputs(model, batch))


def test_loading_into_a_converted_network_with_the_same_settings_fills_it(
    path, model, plain, batch, same_state
):
    other = anyprec.convert(plain(), bits=(2, 4, 8), example_input=batch)
    anyprec.calibrate(other, [batch])
    other.set_bits(2)
    other(batch)  # the quantized weights that it keeps must not outlive its weights
    other.configs["stale"] = other.resolve_bits(8)
    assert anyprec.load(path, other) is other
    assert other.bits is None
    assert list(other.configs) == ["small"]
    assert same_state(other.state_dict(), model.state_dict())
    assert _equal(
        _outputs(other, batch, (None, 4, (2, 8), 2)), _outputs(model, batch, (None, 4, (2, 8), 2))
    )


def test_a_given_network_keeps_its_mode(path, plain):
    assert anyprec.load(path, plain().train()).training
    assert not anyprec.load(path, plain().eval()).training


def test_a_rebuilt_network_is_in_eval_mode_and_floating_point(tmp_path, converted):
    model = converted("test_resnet").train()
    model.set_bits(4)
    anyprec.save(model, tmp_path / "net")
    loaded = anyprec.load(tmp_path / "net")
    assert not loaded.training
    assert loaded.bits is None


def test_saving_changes_nothing_but_the_named_configurations(tmp_path, model, photograph):
    check = photograph(model)
    state, config = torch.get_rng_state(), model.resolve_bits(4)
    anyprec.save(model, tmp_path / "net", configs={"four": config})
    check()
    assert torch.equal(torch.get_rng_state(), state)
    assert model.configs == {"four": config}


def test_neither_saving_nor_loading_draws_from_the_global_generator(tmp_path, converted):
    model = converted("test_vit", size=160)
    before = torch.get_rng_state()
    anyprec.save(model, tmp_path / "net")
    anyprec.load(tmp_path / "net")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_loaded_network_can_be_saved_to_the_same_file_content(path, plain, tmp_path):
    loaded = anyprec.load(path, plain())
    anyprec.save(loaded, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_a_document_reads_back_as_it_was_written(path, model):
    _, text = read_file(path)
    document = Document.from_json(text)
    assert document.to_json() == text
    assert document.convert_settings == model.anyprec_record.settings
    assert document.facts == model.anyprec_record.facts
    assert document.configs == model.configs


def test_named_configurations_survive_and_can_be_set_by_name(path, model, plain):
    loaded = anyprec.load(path, plain())
    assert loaded.configs == {"small": model.resolve_bits((2, 4))}
    loaded.set_bits("small")
    assert loaded.bits == model.resolve_bits((2, 4))


def test_configurations_put_into_the_model_are_saved(tmp_path, model, plain):
    model.configs["mine"] = model.resolve_bits(8)
    anyprec.save(model, tmp_path / "net")
    assert anyprec.load(tmp_path / "net", plain()).configs == {"mine": model.resolve_bits(8)}


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        (
            "x",
            anyprec.BitConfig({"0": 8, "nothing": 4}),
            "configuration 'x' does not fit the model: path 'nothing'",
        ),
        (
            "x",
            anyprec.BitConfig({"3": 4}),
            "configuration 'x' does not fit .* leaves 3 layers unnamed",
        ),
        ("x", 4, r"configuration 'x' is 4: name a BitConfig .* model.resolve_bits\(4\)"),
        (1, anyprec.BitConfig({"3": 4}), "configuration 1 is .*: name a BitConfig by a string"),
    ],
)
def test_a_configuration_that_does_not_fit_is_not_saved(tmp_path, model, name, config, message):
    with pytest.raises(anyprec.BitsError, match=message):
        anyprec.save(model, tmp_path / "net", configs={name: config})
    assert not model.configs
    assert not list(tmp_path.iterdir())


def test_what_could_not_be_read_again_is_not_saved(tmp_path, model):
    name = "half a \ud800 surrogate pair"
    with pytest.raises(anyprec.CheckpointError, match="metadata is not valid JSON"):
        anyprec.save(model, tmp_path / "net", configs={name: model.resolve_bits(4)})
    assert not model.configs
    assert not list(tmp_path.iterdir())


def test_settings_that_are_the_default_of_the_file_are_left_out(tmp_path, plain, batch):
    """Also if the string is not the very object that stands in the class."""
    norm = "-".join(["per", "pair"])
    model = anyprec.convert(plain(), norm=norm, example_input=batch[:1])
    anyprec.save(model, tmp_path / "net")
    assert "norm" not in json.loads(read_file(tmp_path / "net")[1])["settings"]
    assert anyprec.load(tmp_path / "net", plain()).anyprec_record.settings.norm == "per-pair"


def test_an_uncalibrated_network_is_saved_and_stays_uncalibrated(
    tmp_path, plain, batch, same_state
):
    model = anyprec.convert(plain(), bits=(2, 4), example_input=batch)
    anyprec.save(model, tmp_path / "net")
    loaded = anyprec.load(tmp_path / "net", plain())
    assert same_state(loaded.state_dict(), model.state_dict())
    with pytest.raises(anyprec.NotCalibratedError, match=r"call anyprec.calibrate"):
        loaded.set_bits(4)


@pytest.mark.parametrize("when", ["before conversion", "after conversion"])
def test_number_formats_are_kept(tmp_path, when, same_state):
    network = timm.create_model("test_resnet").eval()
    images = torch.randn(2, 3, 64, 64).bfloat16()
    precisions = (None,)
    if when == "before conversion":
        model = anyprec.convert(network.bfloat16(), bits=(2, 4), example_input=images[:1])
    else:
        model = anyprec.convert(network, bits=(2, 4), example_input=images[:1].float())
        anyprec.calibrate(model, [images.float()])
        model = model.bfloat16()
        precisions = (None, 4)
    anyprec.save(model, tmp_path / "net")
    bare = timm.create_model("test_resnet").eval().bfloat16()
    for loaded in (anyprec.load(tmp_path / "net"), anyprec.load(tmp_path / "net", bare)):
        assert loaded.fc.weight.dtype == torch.bfloat16
        assert same_state(loaded.state_dict(), model.state_dict())
        assert _equal(_outputs(loaded, images, precisions), _outputs(model, images, precisions))


class TiedNet(nn.Module):
    """Encoder and decoder share a weight; one layer stands at two paths."""

    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(6, 6), nn.Linear(6, 6)
        self.twice = nn.ModuleList([nn.Linear(6, 6)])
        self.twice.append(self.twice[0] if tied else nn.Linear(6, 6))
        if tied:
            self.decode.weight = self.encode.weight

    def forward(self, x):
        return self.decode(
            torch.relu(self.twice[1](torch.relu(self.twice[0](torch.relu(self.encode(x))))))
        )


@pytest.fixture
def tied(tmp_path):
    model = anyprec.convert(TiedNet().eval(), bits=(2, 4), example_input=torch.randn(2, 6))
    anyprec.calibrate(model, [torch.randn(8, 6)])
    anyprec.save(model, tmp_path / "tied")
    return tmp_path / "tied", model


def test_tied_parameters_are_stored_once_and_tied_again(tied, same_state):
    path, model = tied
    tensors, _ = read_file(path)
    assert "encode.weight" in tensors
    assert not {"decode.weight", "twice.1.weight", "twice.1.input_quantizer.step"} & tensors.keys()
    loaded = anyprec.load(path, TiedNet().eval())
    assert loaded.decode.weight is loaded.encode.weight
    assert loaded.twice[0] is loaded.twice[1]
    assert same_state(loaded.state_dict(), model.state_dict())
    images = torch.randn(3, 6)
    assert _equal(_outputs(loaded, images, (None, 4)), _outputs(model, images, (None, 4)))


def test_a_file_with_ties_is_refused_by_a_network_without(tied, photograph):
    path, _ = tied
    network = TiedNet(tied=False)
    check = photograph(network)
    with pytest.raises(anyprec.CheckpointError, match=r"does not match the network"):
        anyprec.load(path, network)
    network.twice[1] = network.twice[0]
    check = photograph(network)
    with pytest.raises(
        anyprec.CheckpointError,
        match=r"holds 'decode.weight' apart, the checkpoint as one with 'encode",
    ):
        anyprec.load(path, network)
    check()


def test_a_file_without_ties_is_refused_by_a_network_with(tmp_path, photograph):
    network = TiedNet()
    network.decode.weight = nn.Parameter(network.encode.weight.detach().clone())
    model = anyprec.convert(network.eval(), bits=(2, 4), example_input=torch.randn(2, 6))
    anyprec.save(model, tmp_path / "net")
    tied = TiedNet()
    check = photograph(tied)
    with pytest.raises(
        anyprec.CheckpointError,
        match=r"'decode.weight' as one with 'encode.weight', the checkpoint apart",
    ):
        anyprec.load(tmp_path / "net", tied)
    check()


def test_a_copy_of_a_network_saves_the_same(path, model, tmp_path):
    anyprec.save(copy.deepcopy(model), tmp_path / "copy", configs=model.configs)
    assert (tmp_path / "copy").read_bytes() == path.read_bytes()


def test_a_network_without_its_classifier_is_saved(tmp_path, converted):
    model = converted("test_resnet")
    model.reset_classifier(0)
    images = torch.randn(2, 3, 64, 64)
    anyprec.save(model, tmp_path / "net")
    loaded = anyprec.load(tmp_path / "net")
    assert loaded(images).shape == (2, model.num_features)
    assert _equal(_outputs(loaded, images, (None, 4)), _outputs(model, images, (None, 4)))


def test_a_float_network_is_not_saved(tmp_path, plain):
    with pytest.raises(
        anyprec.ConversionError, match=r"save needs a converted model, got Sequential"
    ):
        anyprec.save(plain(), tmp_path / "net")


def test_a_network_with_a_replaced_layer_is_not_saved(tmp_path, model):
    model[8] = nn.Linear(6 * 8 * 8, 3)
    with pytest.raises(
        anyprec.ConversionError, match=r"layer '8' was replaced by a Linear after conversion"
    ):
        anyprec.save(model, tmp_path / "net")
    assert not list(tmp_path.iterdir())


def test_state_that_is_no_tensor_is_not_saved(tmp_path, model):
    type(model[0]).get_extra_state = lambda self: {"a": 1}
    try:
        with pytest.raises(
            anyprec.CheckpointError, match=r"'0._extra_state' in the network's state is a dict"
        ):
            anyprec.save(model, tmp_path / "net")
    finally:
        del type(model[0]).get_extra_state


def test_a_network_without_values_is_not_saved(tmp_path, model):
    with pytest.raises(
        anyprec.CheckpointError, match=r"'0.weight' in the network's state is on the meta device"
    ):
        anyprec.save(model.to("meta"), tmp_path / "net")


@pytest.mark.parametrize("norm", ["per-pair", "shared-affine", "shared"])
def test_floors_and_statistics_of_configurations_survive(tmp_path, plain, batch, norm, same_state):
    model = anyprec.convert(plain(), bits=(2, 4, 8), norm=norm, example_input=batch[:1])
    anyprec.calibrate(model, [batch])
    model.freeze({"5": (4, 2)})
    mixed = model.resolve_bits({"5": (4, 2), "3": (8, 4)})
    anyprec.update_norms(model, [torch.randn(8, 3, 8, 8)], mixed)
    anyprec.update_norms(model, [torch.randn(8, 3, 8, 8)], 4)
    path = tmp_path / "net.safetensors"
    anyprec.save(model, path)
    loaded = anyprec.load(path, plain())
    assert loaded.frozen == model.frozen
    assert loaded.anyprec_record.statistics.keys() == model.anyprec_record.statistics.keys()
    assert same_state(loaded.state_dict(), model.state_dict())
    precisions = (None, 4, 2, mixed)
    assert _equal(_outputs(loaded, batch, precisions), _outputs(model, batch, precisions))
    model.anyprec_record.statistics.clear()
    assert not _equal(_outputs(loaded, batch, (mixed,)), _outputs(model, batch, (mixed,)))


def test_damaged_statistics_and_floors_are_refused(tmp_path, plain, batch, photograph):
    model = anyprec.convert(plain(), bits=(2, 4, 8), example_input=batch[:1])
    anyprec.calibrate(model, [batch])
    model.freeze({"5": (4, 2)})
    anyprec.update_norms(model, [batch], 4)
    path = tmp_path / "net.safetensors"
    anyprec.save(model, path)
    tensors, text = read_file(path)
    name = "anyprec.statistics.0.1.mean"
    changes = [
        (
            {name: torch.zeros(7)},
            text,
            r"is \(7,\) torch.float32, expected finite numbers of shape \(4,\)",
        ),
        ({name: tensors[name] / 0}, text, "expected finite numbers"),
        ({"anyprec.statistics.1.1.mean": torch.zeros(4)}, text, "not those of 1 configurations"),
        ({}, text.replace('"5": "W4A2"', '"5": "W3A2"'), "frozen candidates do not fit"),
    ]
    for extra, document, message in changes:
        write_file(path, {**tensors, **extra}, document)
        network = plain()
        check = photograph(network)
        with pytest.raises(anyprec.CheckpointError, match=message):
            anyprec.load(path, network)
        check()


def test_an_unknown_sharing_of_norms_is_refused(tmp_path, plain, batch):
    model = anyprec.convert(plain(), bits=(2, 4), norm="shared", example_input=batch[:1])
    path = tmp_path / "net.safetensors"
    anyprec.save(model, path)
    tensors, text = read_file(path)
    write_file(path, tensors, text.replace('"shared"', '"by moon"'))
    with pytest.raises(
        anyprec.CheckpointError, match=r"Invalid enum value 'by moon' - at `\$\.settings\.norm`"
    ):
        anyprec.load(path, plain())

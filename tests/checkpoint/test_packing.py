"""The packed form: every precision survives, no latent weight does, and what needs them says so."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import timm
import torch
from timm.layers import CondConv2d, StdConv2d
from torch import nn
from torch.nn.utils import parametrizations

import anyprec
from anyprec.nn.packed import PackedWeight
from anyprec.nn.weights import PackedCodes
from anyprec.runtime.storage import read_file, write_file

FORMS = ["fixed", "zstd"]


@pytest.fixture
def packed(tmp_path, model):
    anyprec.save(
        model,
        tmp_path / "packed",
        packed=True,
        configs={"small": model.resolve_bits({"*": (2, 4)})},
    )
    return tmp_path / "packed"


@pytest.fixture
def loaded(packed, plain):
    return anyprec.load(packed, plain())


def outputs(model, images, precisions=(2, 4, 8, (2, 8))):
    results = []
    for precision in precisions:
        model.set_bits(precision)
        with torch.no_grad():
            results.append(model(images))
    return results


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("coding", FORMS)
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("norm", ["per-pair", "shared"])
def test_every_code_and_every_output_survive(tmp_path, plain, batch, coding, per_channel, norm):
    network = plain()
    model = anyprec.convert(
        network, bits=(2, 3, 8), per_channel=per_channel, norm=norm, example_input=batch[:1]
    )
    anyprec.calibrate(model, [batch])
    anyprec.save(model, tmp_path / "net", packed=True, coding=coding)
    loaded = anyprec.load(tmp_path / "net", plain())
    for path, layer in loaded.quantized_layers.items():
        for index in range(len(layer.candidates.weight)):
            assert torch.equal(
                layer.weight_codes(index), model.quantized_layers[path].weight_codes(index)
            )
    assert equal(
        outputs(loaded, batch, (2, 3, 8, (2, 8))), outputs(model, batch, (2, 3, 8, (2, 8)))
    )


def test_no_latent_weight_is_stored_or_held(packed, loaded):
    tensors, text = read_file(packed)
    assert not [
        name for name in tensors if name in {"0.weight", "3.weight", "5.weight", "8.weight"}
    ]
    assert json.loads(text)["packing"]["latent"] == {}
    for layer in loaded.quantized_layers.values():
        assert isinstance(layer.weight, PackedWeight)
        bytes_held = sum(
            buffer.numel() * buffer.element_size() for buffer in layer.packed_operand.buffers()
        )
        assert bytes_held <= 2 * layer.weight.numel() + 4 * 3 * layer.weight.shape[0]


def test_it_starts_at_its_highest_precision_and_keeps_its_configurations(loaded, model):
    assert loaded.is_packed
    assert not model.is_packed
    assert loaded.bits == model.resolve_bits(8)
    loaded.set_bits("small")
    assert loaded.bits == model.resolve_bits((2, 4))


def test_a_single_quantized_weight_is_kept_and_computed_anew_after_a_switch(
    loaded, batch, monkeypatch
):
    layer = loaded[3]
    calls = []
    real = layer.packed_operand.weight
    monkeypatch.setattr(
        layer.packed_operand,
        "weight",
        lambda index, *args, **kwargs: calls.append(index) or real(index, *args, **kwargs),
    )
    outputs(loaded, batch, (4, 4, 8, 8, 4))
    assert calls == [0, 1, 0]  # a depthwise layer has no candidate 2


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_compute_the_same(loaded, batch, again):
    assert equal(outputs(again(loaded), batch), outputs(loaded, batch))


def test_its_state_dict_fits_another_of_its_kind(loaded, packed, plain, batch):
    other = anyprec.load(packed, plain())
    other[0].packed_operand.points.zero_()
    assert not equal(outputs(other, batch), outputs(loaded, batch))
    other.load_state_dict(loaded.state_dict())
    assert equal(outputs(other, batch), outputs(loaded, batch))


@pytest.mark.parametrize(
    "use",
    [
        lambda model, images: model.set_bits(None),
        lambda model, images: model.train(),
        lambda model, images: anyprec.calibrate(model, [images]),
        lambda model, images: anyprec.fit(model, [(images, torch.zeros(2).long())], epochs=1),
        lambda model, images: anyprec.OneShot(model, total_steps=1),
        lambda model, images: anyprec.param_groups(model),
        lambda model, images: model.float_state_dict(),
        lambda model, images: model.load_state_dict({"8.bias": torch.zeros(3)}, strict=False),
        lambda model, images: model[0].train() and model(images),
        lambda model, images: model[0].weight.norm(),
        lambda model, images: nn.functional.conv2d(images, model[0].weight),
    ],
)
def test_what_needs_latent_weights_raises_our_error(loaded, batch, use):
    state, bits = (
        {
            name: tensor
            for name, tensor in loaded.state_dict().items()
            if type(tensor) is torch.Tensor
        },
        loaded.bits,
    )
    state = {name: tensor.clone() for name, tensor in state.items()}
    with pytest.raises(
        anyprec.PackedError,
        match=r"this network was loaded from a packed file .* Load the training form",
    ):
        use(loaded, batch)
    assert loaded.bits == bits
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in state.items())


def test_what_needs_no_latent_weights_works(loaded, batch):
    config = loaded.resolve_bits(4)
    anyprec.update_norms(loaded, [batch], config)
    anyprec.update_norms(loaded, [batch])
    assert (
        anyprec.search(
            loaded, [batch], "90%", objective="divergence", max_evaluations=6
        ).utilisation
        <= 1
    )
    assert anyprec.cost_of(loaded, config).size > 0
    images = batch.clone().requires_grad_()
    loaded(images).sum().backward()
    assert images.grad.any()
    assert loaded[0].weight_quantizer.step.grad is None


def test_a_packed_network_is_saved_again_as_the_same_file(tmp_path, loaded, packed):
    anyprec.save(loaded, tmp_path / "again", packed=True)
    assert (tmp_path / "again").read_bytes() == packed.read_bytes()
    with pytest.raises(
        anyprec.PackedError, match=r"save\(..., packed=False\) needs latent weights"
    ):
        anyprec.save(loaded, tmp_path / "training")
    assert not (tmp_path / "training").exists()


def test_a_converted_network_takes_a_packed_file_and_a_packed_network_takes_none(
    packed, path, model, loaded, batch
):
    expected = outputs(model, batch)
    assert anyprec.load(packed, model) is model
    assert model.is_packed
    assert equal(outputs(model, batch), expected)
    for file in (packed, path):
        with pytest.raises(
            anyprec.CheckpointError, match="got a packed one: pass a float network, or none"
        ):
            anyprec.load(file, loaded)


def test_an_uncalibrated_network_is_not_packed(tmp_path, plain, batch):
    model = anyprec.convert(plain(), bits=(2, 4), example_input=batch)
    with pytest.raises(anyprec.NotCalibratedError, match=r"call anyprec.calibrate"):
        anyprec.save(model, tmp_path / "net", packed=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packed": True, "coding": "zip"}, "coding='zip' is not known: use 'zstd' or 'fixed'"),
        (
            {"latents": torch.int8},
            "latents=torch.int8 cannot be: use torch.bfloat16 or torch.float16",
        ),
        (
            {"latents": torch.bfloat16, "packed": True},
            "latents=torch.bfloat16 cannot be: .* with packed=False",
        ),
    ],
)
def test_options_that_mean_nothing_are_refused(tmp_path, model, options, message):
    with pytest.raises(ValueError, match=message):
        anyprec.save(model, tmp_path / "net", **options)
    assert not list(tmp_path.iterdir())


# --- Layers of other kinds ------------------------------------------------------------------------


def reload(tmp_path, make, images, norm="per-pair"):
    """What comes back from a network's packed file, and why layers kept their latent weight."""
    torch.manual_seed(1)
    model = anyprec.convert(
        make().eval(), bits=(2, 4), norm=norm, first_last_bits=None, example_input=images[:1]
    )
    anyprec.calibrate(model, [images])
    anyprec.save(model, tmp_path / "net", packed=True, coding="fixed")
    loaded = anyprec.load(tmp_path / "net", make().eval())
    assert equal(outputs(loaded, images, (2, 4)), outputs(model, images, (2, 4)))
    return loaded, json.loads(read_file(tmp_path / "net")[1])["packing"]["latent"]


def test_a_standardised_weight_is_stored_as_the_codes_of_what_was_standardised(tmp_path):
    def make():
        return nn.Sequential(StdConv2d(3, 4, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(4, 3, 3))

    loaded, latent = reload(tmp_path, make, torch.randn(2, 3, 8, 8))
    assert latent == {}
    assert isinstance(loaded[0].weight_source, PackedCodes)
    assert loaded[2].weight_quantizer.axis == 1
    with pytest.raises(
        anyprec.PackedError, match="convolution.default needs the values of a weight"
    ):
        StdConv2d.forward(loaded[0].switch(None) or loaded[0], torch.randn(1, 3, 8, 8))


class Mixed(nn.Module):
    """A weight that follows the image, one that is computed, and one that is also an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.routing = nn.Linear(8, 3)
        self.mixed = CondConv2d(8, 8, 3, num_experts=3)
        self.normed = parametrizations.weight_norm(nn.Linear(8, 8))
        self.table = nn.Embedding(5, 8)
        self.head = nn.Linear(8, 5, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x):
        x = self.stem(x)
        x = self.mixed(x, torch.sigmoid(self.routing(x.mean(dim=(2, 3))))).mean(dim=(2, 3))
        return self.head(self.normed(x) + self.table(torch.zeros(len(x), dtype=torch.long)))


def test_layers_that_cannot_be_packed_keep_their_weight_and_the_file_says_why(tmp_path):
    loaded, latent = reload(tmp_path, Mixed, torch.randn(2, 3, 8, 8))
    assert latent == {
        "normed": "its weight is no parameter, but computed",
        "head": "its weight is also 'table.weight', which is not packed",
    }
    assert isinstance(loaded.mixed.matrices.weight.weight_source, PackedCodes)
    assert loaded.head.weight is loaded.table.weight
    assert anyprec.inspect(tmp_path / "net").layers["head"].reason == latent["head"]


class Shared(nn.Module):
    """A parameter in two layers of different step sizes, a layer at two paths, rows of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.third = self.fourth = nn.Linear(6, 6)
        self.both = nn.Linear(6, 12)

    def forward(self, x):
        x = self.fourth(torch.relu(self.third(self.second(torch.relu(self.first(x))))))
        return torch.cat(
            [nn.functional.linear(x, rows) for rows in self.both.weight.chunk(2)], dim=1
        )


def test_shared_weights_and_parts_of_weights_are_packed(tmp_path):
    loaded, latent = reload(tmp_path, Shared, torch.randn(8, 6))
    assert latent == {}
    tensors, _ = read_file(tmp_path / "net")
    assert not [name for name in tensors if name.endswith((".weight", "fourth.cells"))]
    assert loaded.third is loaded.fourth


def test_a_weight_that_is_not_finite_is_kept(tmp_path, model, plain):
    with torch.no_grad():
        model[5].weight[0, 0] = torch.inf
    anyprec.save(model, tmp_path / "net", packed=True)
    loaded = anyprec.load(tmp_path / "net", plain())
    assert torch.equal(loaded[5].weight, model[5].weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("per_channel", [True, False])
def test_networks_of_half_precision_are_packed(tmp_path, plain, batch, dtype, per_channel):
    model = anyprec.convert(
        plain(), bits=(2, 4, 8), per_channel=per_channel, example_input=batch[:1]
    )
    anyprec.calibrate(model, [batch])
    model.to(dtype)
    anyprec.save(model, tmp_path / "net", packed=True)
    loaded = anyprec.load(tmp_path / "net", plain().to(dtype))
    assert loaded[0].weight.dtype == dtype
    assert equal(outputs(loaded, batch.to(dtype)), outputs(model, batch.to(dtype)))


# --- One configuration ----------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["training", *FORMS])
@pytest.mark.parametrize("bits", ["mixed", (8, 4)])
@pytest.mark.parametrize("norm", ["per-pair", "shared-affine", "shared"])
def test_a_single_configuration_computes_the_same(tmp_path, plain, batch, form, bits, norm):
    model = anyprec.convert(plain(), bits=(2, 4, 8), norm=norm, example_input=batch[:1])
    anyprec.calibrate(model, [batch])
    mixed = model.resolve_bits({"5": (4, 2), "3": (8, 4)})
    anyprec.update_norms(model, [torch.randn(8, 3, 8, 8)], mixed)
    anyprec.update_norms(model, [torch.randn(8, 3, 8, 8)], 4)
    options = {} if form == "training" else {"packed": True, "coding": form}
    anyprec.save(
        model, tmp_path / "net", configs={"mixed": mixed, "four": model.resolve_bits(4)}, **options
    )
    single = anyprec.load(tmp_path / "net", plain(), bits=bits)
    assert single.bits == model.resolve_bits(bits)
    assert all(len(one.weight) == len(one.activation) == 1 for one in single.candidates.values())
    assert all(
        layer.packed_operand.points.dtype == torch.int8
        for layer in single.quantized_layers.values()
    )
    assert list(single.configs) == (["mixed"] if bits == "mixed" else [])
    with torch.no_grad():
        assert equal([single(batch)], outputs(model, batch, (bits,)))
    anyprec.save(single, tmp_path / "single", packed=True)
    again = anyprec.load(tmp_path / "single", plain())
    with torch.no_grad():
        assert equal([again(batch)], outputs(model, batch, (bits,)))


def test_a_configuration_of_an_uncalibrated_file_is_refused(tmp_path, plain, batch, photograph):
    anyprec.save(anyprec.convert(plain(), bits=(2, 4), example_input=batch), tmp_path / "net")
    network = plain()
    check = photograph(network)
    with pytest.raises(
        anyprec.NotCalibratedError,
        match="4 layers .*: load it without bits, and call anyprec.calibrate",
    ):
        anyprec.load(tmp_path / "net", network, bits=4)
    check()


def test_statistics_of_other_configurations_are_not_read(tmp_path, model, plain, batch):
    for bits in (2, 4):
        anyprec.update_norms(model, [batch], bits)
    anyprec.save(model, tmp_path / "net", packed=True, coding="fixed")
    content = bytearray((tmp_path / "net").read_bytes())
    place = content.index(
        model.anyprec_record.statistics[model.resolve_bits(2)]["1"][0].numpy().tobytes()
    )
    content[place] ^= 1
    (tmp_path / "net").write_bytes(content)
    anyprec.load(tmp_path / "net", plain(), bits=4)
    with pytest.raises(anyprec.CheckpointError, match="does not match its digest"):
        anyprec.load(tmp_path / "net", plain())


def test_a_configuration_that_is_none_is_refused(packed, plain, photograph):
    network = plain()
    check = photograph(network)
    with pytest.raises(anyprec.BitsError, match="the file names 'small'"):
        anyprec.load(packed, network, bits="5MiB")
    check()
    with pytest.raises(anyprec.BitsError, match="a converted one has other candidates"):
        anyprec.load(
            packed,
            anyprec.convert(plain(), bits=(2, 4, 8), example_input=torch.randn(1, 3, 8, 8)),
            bits=4,
        )


# --- Forged files ---------------------------------------------------------------------------------


def _forge(path, change):
    tensors, text = read_file(path)
    document = json.loads(text)
    change(tensors, document["packing"])
    write_file(path, tensors, json.dumps(document))


CELLS = "anyprec.packed.5.cells"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors, packing: tensors.pop(CELLS),
            r"layer '5' cannot be unpacked: its parts are \['low'\]",
        ),
        (
            lambda tensors, packing: tensors.update({CELLS: tensors[CELLS].float()}),
            "its cells are no bytes",
        ),
        (
            lambda tensors, packing: tensors.update({CELLS: torch.full((24,), 255).byte()}),
            "a cell is out of range",
        ),
        (
            lambda tensors, packing: tensors.update({CELLS: tensors[CELLS][:5].clone()}),
            "layer '5' is damaged",
        ),
        (
            lambda tensors, packing: tensors.update(
                {"anyprec.packed.5.low": torch.zeros(9).byte()}
            ),
            "9 bytes of low bits",
        ),
        (
            lambda tensors, packing: tensors.update({"anyprec.packed.5.places": torch.zeros(1)}),
            "its parts are",
        ),
        (
            lambda tensors, packing: tensors.update({"anyprec.packed.9.cells": torch.zeros(1)}),
            "of no packed layer",
        ),
        (lambda tensors, packing: packing.update(coding="fixed"), "its parts are"),
        (lambda tensors, packing: packing["layers"].pop("5"), "of no packed layer"),
        (
            lambda tensors, packing: tensors.update(
                {
                    "anyprec.packed.5.places": torch.tensor([24]),
                    "anyprec.packed.5.codes": torch.zeros(3, 1).char(),
                }
            ),
            "its exceptions are out of range",
        ),
        (
            lambda tensors, packing: tensors.update(
                {
                    "anyprec.packed.5.places": torch.tensor([3]),
                    "anyprec.packed.5.codes": torch.full((3, 1), 5).char(),
                }
            ),
            "its exceptions are out of range",
        ),
        (
            lambda tensors, packing: tensors["5.input_quantizer.step"].fill_(torch.nan),
            "no step sizes for the inputs of 1 layers",
        ),
        (
            lambda tensors, packing: tensors["5.weight_quantizer.step"].fill_(torch.nan),
            "a step size is not finite",
        ),
    ],
)
def test_a_forged_packed_layer_is_refused_and_the_network_left(
    packed, plain, photograph, change, message
):
    _forge(packed, change)
    network = plain()
    check = photograph(network)
    with pytest.raises(anyprec.CheckpointError, match=message):
        anyprec.load(packed, network)
    check()


def test_exceptions_in_a_file_win_over_cells(packed, plain):
    parts = {
        "anyprec.packed.5.places": torch.tensor([3]),
        "anyprec.packed.5.codes": torch.tensor([[-2], [7], [-9]]).char(),
    }
    _forge(packed, lambda tensors, packing: tensors.update(parts))
    layer = anyprec.load(packed, plain())[5]
    assert [int(layer.weight_codes(index).flatten()[3]) for index in range(3)] == [-2, 7, -9]


# --- Training form --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_latent_weights_may_be_stored_rounded(tmp_path, model, plain, batch, dtype):
    anyprec.save(model, tmp_path / "net", latents=dtype)
    tensors, _ = read_file(tmp_path / "net")
    assert {tensors[f"{layer}.weight"].dtype for layer in (0, 3, 5, 8)} == {dtype}
    assert tensors["0.weight_quantizer.step"].dtype == tensors["1.weight"].dtype == torch.float32
    loaded = anyprec.load(tmp_path / "net", plain())
    with torch.no_grad():
        for layer in model.quantized_layers.values():
            layer.weight.copy_(layer.weight.to(dtype).float())
    assert loaded[0].weight.dtype == torch.float32
    assert equal(outputs(loaded, batch, (None, 2, 4, 8)), outputs(model, batch, (None, 2, 4, 8)))


def test_scores_and_costs_of_configurations_are_kept(tmp_path, model, plain, batch):
    result = anyprec.search(model, [batch], "90%", objective="divergence", max_evaluations=6)
    anyprec.save(model, tmp_path / "net", configs={"half": result, "four": model.resolve_bits(4)})
    loaded = anyprec.load(tmp_path / "net", plain())
    assert loaded.configs["half"] == result.config
    note = loaded.anyprec_record.notes["half"]
    assert (note.bitops, note.size, note.score) == (
        result.cost.bitops,
        result.cost.size,
        result.score,
    )
    assert note.found["by"] == "search"
    assert note.found["evaluations"] == result.evaluations
    assert loaded.anyprec_record.notes["four"].score is None
    anyprec.save(loaded, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "net").read_bytes()


def test_a_float_state_dict_goes_in_and_comes_out(converted, tmp_path):
    from safetensors.torch import load_file, save_file  # noqa: PLC0415

    model, network = converted("test_resnet"), timm.create_model("test_resnet")
    save_file(network.state_dict(), tmp_path / "float")
    model.load_state_dict(load_file(tmp_path / "float"))
    found = model.float_state_dict()
    assert found.keys() == network.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in network.state_dict().items())
    timm.create_model("test_resnet").load_state_dict(found)

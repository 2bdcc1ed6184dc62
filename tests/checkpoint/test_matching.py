"""A file that does not fit is refused by name, and the network that was passed stays as it was."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import anyprec
from anyprec.runtime.storage import read_file, write_file


def _other(plain, number, layer):
    network = plain()
    network[number] = layer
    return network.eval()


MISFITS = [
    (
        0,
        nn.Conv2d(3, 4, 5, padding=2, bias=False),
        r"1 are of another shape or type: '0.weight \(4, 3, 3, 3\) torch.float32 "
        r"instead of \(4, 3, 5, 5\)",
    ),
    (0, nn.Conv2d(3, 4, 3, padding=1), "1 tensors are missing: '0.bias'"),
    (
        3,
        nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False),
        "1 are unknown to the network: '3.bias'",
    ),
    (8, nn.Identity(), "2 are unknown to the network: '8.bias', '8.weight'"),
    (
        1,
        nn.GroupNorm(2, 4),
        "3 are unknown to the network: '1.num_batches_tracked', '1.running_mean'",
    ),
    (
        0,
        nn.Conv2d(3, 4, 3, padding=1, bias=False, dtype=torch.float64),
        "torch.float32 instead of .* torch.float64",
    ),
]


@pytest.mark.parametrize(("number", "layer", "message"), MISFITS)
def test_another_float_network_is_refused_and_unchanged(
    path, plain, photograph, number, layer, message, batch
):
    network = _other(plain, number, layer)
    check = photograph(network)
    with pytest.raises(
        anyprec.CheckpointError, match=rf"does not match the network; .*({message})"
    ):
        anyprec.load(path, network)
    check()


class Lookalike(nn.Module):
    """Holds the tensors of a Linear, but is none."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 384)), nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return x @ self.weight.t() + self.bias


def test_tensors_of_the_right_names_in_other_modules_are_refused(path, plain, photograph):
    network = _other(plain, 8, Lookalike())
    check = photograph(network)
    with pytest.raises(anyprec.CheckpointError, match=r"'8.weight_quantizer.step'|no layers '8'"):
        anyprec.load(path, network)
    check()


def test_a_mismatch_found_after_conversion_reverts_it(path, plain, photograph, batch):
    """The file lacks one step size: only the converted network shows that."""
    tensors, text = read_file(path)
    del tensors["5.input_quantizer.step"]
    write_file(path, tensors, text)
    network = plain()
    check = photograph(network)
    with pytest.raises(
        anyprec.CheckpointError, match=r"1 tensors are missing: '5.input_quantizer.step'"
    ):
        anyprec.load(path, network)
    check()
    anyprec.calibrate(anyprec.convert(network, example_input=batch), [batch])


def test_a_configuration_that_does_not_fit_reverts_the_conversion(tamper, plain, photograph):
    path = tamper(lambda raw: raw["configs"].update(bad={"0": "W8A8"}))
    network = plain()
    check = photograph(network)
    with pytest.raises(
        anyprec.CheckpointError,
        match=r"configuration 'bad' does not fit the network: .* leaves 3 layers",
    ):
        anyprec.load(path, network)
    check()


def test_settings_that_fit_nothing_leave_the_network_float(tamper, plain, photograph):
    path = tamper(lambda raw: raw["settings"].update(exclude=["nowhere.*"]))
    network = plain()
    check = photograph(network)
    message = "does not fit the network Sequential: exclude: pattern 'nowhere.*' matches no layer"
    with pytest.raises(anyprec.CheckpointError, match=message):
        anyprec.load(path, network)
    check()


def _break_tensor(path, name, change):
    tensors, text = read_file(path)
    tensors[name] = change(tensors[name])
    write_file(path, tensors, text)


CONVERTED_MISFITS = [
    ({"5.weight": lambda t: t[:2].clone()}, "1 are of another shape or type: '5.weight"),
    (
        {"5.weight": lambda t: t.double()},
        "1 are of another shape or type: '5.weight .*float64 instead",
    ),
    (
        {"5.input_quantizer.zero_point": lambda t: t + 300},
        "gives layer '5' the zero point 30. at 2 bits, expected 0 to 3",
    ),
    ({"5.input_quantizer.zero_point": lambda t: t - 300}, "gives layer '5' the zero point -"),
]


@pytest.mark.parametrize(("changes", "message"), CONVERTED_MISFITS)
@pytest.mark.parametrize("already_converted", [True, False])
def test_nothing_is_copied_before_everything_is_checked(
    path, plain, photograph, batch, changes, message, already_converted
):
    for name, change in changes.items():
        _break_tensor(path, name, change)
    network = plain()
    if already_converted:
        network = anyprec.convert(network, bits=(2, 4, 8), example_input=batch)
        network.configs["mine"] = network.resolve_bits(8)
    check = photograph(network)
    with pytest.raises(anyprec.CheckpointError, match=message):
        anyprec.load(path, network)
    check()
    if already_converted:
        assert list(network.configs) == ["mine"]


def test_a_bad_configuration_is_found_before_a_converted_network_is_filled(
    tamper, plain, photograph, batch
):
    path = tamper(
        lambda raw: raw["configs"].update(bad=dict.fromkeys(("0", "3", "5", "8"), "W3A3"))
    )
    network = anyprec.convert(plain(), bits=(2, 4, 8), example_input=batch)
    check = photograph(network)
    with pytest.raises(
        anyprec.CheckpointError,
        match=r"configuration 'bad' does not fit .* W3A3 is not a candidate",
    ):
        anyprec.load(path, network)
    check()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"bits": (2, 4)},
            r"converted with ConvertSettings\(bits=\(2, 4\).*, the checkpoint with .*\(2, 4, 8\)",
        ),
        ({"bits": (2, 4, 8), "per_channel": False}, "per_channel=False"),
        ({"bits": (2, 4, 8), "exclude": "8"}, r"exclude=\('8',\)"),
    ],
)
def test_a_network_converted_otherwise_is_refused(
    path, plain, photograph, batch, settings, message
):
    network = anyprec.convert(plain(), **settings, example_input=batch)
    check = photograph(network)
    with pytest.raises(
        anyprec.CheckpointError,
        match=rf"{message}.*: pass the float network, or convert with the same",
    ):
        anyprec.load(path, network)
    check()


def test_candidates_of_equal_number_but_other_bits_are_refused(tmp_path, plain, photograph, batch):
    """With one candidate each, no shape shows that the first layer is fixed at 8 bits in one."""
    first = anyprec.convert(plain(), bits=(4,), example_input=batch)
    anyprec.save(first, tmp_path / "net")
    tensors, text = read_file(tmp_path / "net")
    write_file(tmp_path / "net", tensors, text.replace('"first": true', '"first": false'))
    network = anyprec.convert(plain(), bits=(4,), example_input=batch)
    check = photograph(network)
    with pytest.raises(
        anyprec.CheckpointError,
        match=r"layer '0' of the network has .*\(8,\).* in the checkpoint .*\(4,\)",
    ):
        anyprec.load(tmp_path / "net", network)
    check()


FORGED_LAYERS = [
    (
        lambda layer: layer.update(path="9.nothing"),
        "unknown to the network: '0.input_quantizer.step'",
    ),
    (lambda layer: layer.update(owner="9.nothing"), "has no owners of the layers '0'"),
    (lambda layer: layer.update(owner="3"), "has no owners of the layers '0'"),
]


@pytest.mark.parametrize(("change", "message"), FORGED_LAYERS)
def test_forged_layers_are_refused(tamper, plain, photograph, change, message):
    path = tamper(lambda raw: (change(raw["layers"][0]), raw["norms"].update({"1": None})))
    network = plain()
    check = photograph(network)
    with pytest.raises(anyprec.CheckpointError, match=message):
        anyprec.load(path, network)
    check()


@pytest.mark.parametrize("where", ["", "1", "2", "9.nothing"])
def test_a_layer_that_is_no_conv_or_linear_is_refused(tamper, plain, photograph, where):
    path = tamper(lambda raw: raw["layers"].append({**raw["layers"][0], "path": where}))
    network = plain()
    check = photograph(network)
    with pytest.raises(
        anyprec.CheckpointError, match=rf"no layers '{where}'|unknown to the network: '1.bank"
    ):
        anyprec.load(path, network)
    check()


@pytest.mark.parametrize("where", ["", "0", "2", "9.nothing"])
def test_a_norm_that_is_no_batchnorm_is_refused(tamper, plain, photograph, where):
    path = tamper(lambda raw: raw["norms"].update({where: None}))
    network = plain()
    check = photograph(network)
    with pytest.raises(anyprec.CheckpointError, match=rf"no BatchNorms '{where}'"):
        anyprec.load(path, network)
    check()


def test_a_depthwise_layer_without_candidates_is_refused(tamper, plain, photograph):
    path = tamper(lambda raw: raw["settings"].update(bits=[2], activation_bits=[2]))
    network = plain()
    check = photograph(network)
    with pytest.raises(
        anyprec.CheckpointError, match=r"depthwise convolution '3' has no candidate left"
    ):
        anyprec.load(path, network)
    check()


@pytest.mark.parametrize("aliases", [{"8.bias": "nothing"}, {"8.bias": "0.weight"}, {"new": "new"}])
def test_aliases_that_point_nowhere_or_hide_a_tensor_are_refused(tamper, plain, aliases):
    path = tamper(lambda raw: raw.update(aliases=aliases))
    with pytest.raises(anyprec.CheckpointError, match=r"is stored as .*, which is not so"):
        anyprec.load(path, plain())


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        ("9.weight", "0.weight", "unknown to the network: '9.weight'"),
        ("6.bias", "6.weight", "holds '6.bias' apart, the checkpoint as one with '6.weight'"),
        ("8.bias", "0.weight", r"'8.bias \(4, 3, 3, 3\) torch.float32 instead of \(3,\)"),
    ],
)
def test_aliases_that_lie_are_refused(path, plain, photograph, name, target, message):
    tensors, text = read_file(path)
    tensors.pop(name, None)
    write_file(path, tensors, text.replace('"aliases": {}', f'"aliases": {{"{name}": "{target}"}}'))
    network = plain()
    check = photograph(network)
    with pytest.raises(anyprec.CheckpointError, match=message):
        anyprec.load(path, network)
    check()


def test_a_float_checkpoint_is_refused_with_advice(tmp_path, plain):
    save_file(plain().state_dict(), tmp_path / "float")
    with pytest.raises(
        anyprec.CheckpointError,
        match=r"not written by anyprec .* load float weights into the network before",
    ):
        anyprec.load(tmp_path / "float", plain())


def test_only_modules_are_loaded_into(path):
    with pytest.raises(
        anyprec.CheckpointError, match=r"load takes a torch.nn.Module to load into, got dict"
    ):
        anyprec.load(path, {})

"""Files of grouped transposed convolutions, with a step size per output channel and from before."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import anyprec
from anyprec.model.conversion import apply_settings
from anyprec.model.example_inputs import analyze_on_example
from anyprec.model.record import ConvertSettings
from anyprec.network.facts import NetworkFacts
from anyprec.runtime.storage import read_file, write_file

SETTINGS = ConvertSettings(
    bits=(2, 4),
    activation_bits=(2, 4),
    first_last_bits=None,
    depthwise_min_bits=2,
    per_channel=True,
    include=None,
    exclude=(),
    norm="shared",
)


class Kernel(nn.Module):
    """A bare parameter in a grouped transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 2, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv_transpose2d(x, self.kernel, None, 2, 0, 0, 3)


def upsampling_network() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(),
        nn.ConvTranspose2d(6, 6, 2, stride=2, groups=6), nn.BatchNorm2d(6), nn.ReLU(),
        nn.ConvTranspose2d(6, 6, 2, groups=2), nn.ReLU(), Kernel(),
    ).eval()  # fmt: skip


PATHS = {"2": 6, "5": 2, "7.matrices.kernel": 3}
"""Transposed layers and their groups."""


def without_groups(facts: NetworkFacts) -> NetworkFacts:
    """What earlier versions knew of a network."""
    layers = {path: dataclasses.replace(layer, groups=1) for path, layer in facts.layers.items()}
    return dataclasses.replace(facts, layers=layers)


def converted(images: Tensor, *, earlier: bool) -> anyprec.ConvertedModel:
    network = upsampling_network()
    facts = analyze_on_example(network, images[:1])
    assert {path: facts.layers[path].groups for path in PATHS} == PATHS
    model = apply_settings(network, SETTINGS, without_groups(facts) if earlier else facts)
    anyprec.calibrate(model, [images])
    return model


def outputs(model: anyprec.ConvertedModel, images: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [model.set_bits(bits) or model(images) for bits in (2, 4)]


@pytest.fixture
def images() -> Tensor:
    return torch.randn(3, 3, 6, 6)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("earlier", [False, True])
def test_what_is_loaded_says_what_was_saved(
    tmp_path: Path, images: Tensor, packed: bool, earlier: bool
) -> None:
    model = converted(images, earlier=earlier)
    for path, groups in PATHS.items():
        shared = 1 if earlier else groups
        layer = model.quantized_layers[path]
        assert layer.weight_quantizer.step.shape[1] == shared * layer.weight.shape[1]
    anyprec.save(model, tmp_path / "net", packed=packed)
    entries = json.loads(read_file(tmp_path / "net")[1])["layers"]
    assert any("groups" in entry for entry in entries) != earlier
    expected = outputs(model, images)
    loaded = anyprec.load(tmp_path / "net", upsampling_network())
    assert all(map(torch.equal, outputs(loaded, images), expected))
    four = anyprec.load(tmp_path / "net", upsampling_network(), bits=4)
    assert torch.equal(four(images), expected[1])


def test_a_file_from_before_does_not_fit_what_is_converted_now(
    tmp_path: Path, images: Tensor
) -> None:
    anyprec.save(converted(images, earlier=True), tmp_path / "net")
    with pytest.raises(anyprec.CheckpointError, match="2.weight_quantizer.step .2, 1. "):
        anyprec.load(tmp_path / "net", converted(images, earlier=False))


@pytest.mark.parametrize(
    ("path", "groups"), [("2", 3), ("0", 3), ("7.matrices.kernel", 4), ("5", 0), ("5", "2")]
)
def test_groups_that_a_layer_has_not_are_refused(
    tmp_path: Path, images: Tensor, path: str, groups: Any
) -> None:
    anyprec.save(converted(images, earlier=False), tmp_path / "net")

    def forge(change: Callable[[dict[str, Any]], object]) -> None:
        tensors, text = read_file(tmp_path / "net")
        document = json.loads(text)
        for entry in document["layers"]:
            if entry["path"] == path:
                change(entry)
        write_file(tmp_path / "net", tensors, json.dumps(document))

    forge(lambda entry: entry.update(groups=groups))
    with pytest.raises(anyprec.CheckpointError, match="no layers|groups"):
        anyprec.load(tmp_path / "net", upsampling_network())

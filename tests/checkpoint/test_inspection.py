"""What a file says of itself, without its network."""

from __future__ import annotations

import pytest
import torch

import anyprec
from anyprec.checkpoint import rebuilding
from anyprec.runtime.storage import StoredFile


@pytest.mark.parametrize(
    ("options", "form", "storage"),
    [
        ({}, "training", "latent"),
        ({"packed": True, "coding": "fixed"}, "packed (fixed)", "cells"),
        ({"packed": True}, "packed (zstd)", "cells"),
    ],
)
def test_every_form_is_told_without_building_the_network_or_reading_tensors(
    tmp_path, converted, monkeypatch, options, form, storage
):
    model = converted("test_resnet")
    model.freeze({"layer1.0.conv1": (4, 2)})
    config = model.resolve_bits((2, 8))
    anyprec.update_norms(model, [torch.randn(2, 3, 64, 64)], config)
    path = tmp_path / "net"
    anyprec.save(model, path, configs={"small": config}, **options)

    def forbidden(*_args, **_kwargs):
        raise AssertionError

    monkeypatch.setattr(rebuilding, "create", forbidden)
    monkeypatch.setattr(StoredFile, "read", forbidden)
    info = anyprec.inspect(path)
    assert (info.form, info.format_version, info.bytes) == (form, 2, path.stat().st_size)
    assert info.architecture.name == "test_resnet"
    assert {name: layer.candidates for name, layer in info.layers.items()} == model.candidates
    assert {layer.storage for layer in info.layers.values()} == {storage}
    cost = anyprec.cost_of(model, config)
    assert (info.notes["small"].bitops, info.notes["small"].size) == (cost.bitops, cost.size)
    assert info.configs == {"small": config}
    assert info.statistics == (config,)
    assert info.frozen == anyprec.BitConfig({"layer1.0.conv1": (4, 2)})
    assert sum(layer.weights for layer in info.layers.values()) == cost.model.weights
    latent_bytes = sum(4 * layer.weights for layer in info.layers.values())
    stored_bytes = sum(layer.bytes for layer in info.layers.values())
    assert stored_bytes == latent_bytes if storage == "latent" else stored_bytes < latent_bytes / 3


def test_it_prints_what_people_ask_first(path):
    text = str(anyprec.inspect(path))
    for expected in (
        "training form, format 2, written by anyprec",
        "a network that must be passed to load",
        "candidates (2, 4, 8), norm copies 'shared-affine'",
        "3 x 8 x 8",
        "small; ",
    ):
        assert expected in text
    row = next(line for line in text.splitlines() if line.startswith("3 "))
    assert row.split() == ["3", "36", "2,304", "4,8", "4,8", "latent", "144"]


def test_a_single_configuration_is_told(tmp_path, path, plain):
    anyprec.save(anyprec.load(path, plain(), bits=4), tmp_path / "single", packed=True)
    info = anyprec.inspect(tmp_path / "single")
    assert info.settings.only is not None
    assert info.layers["5"].candidates.weight == (4,)
    assert "one precision for each layer" in str(info)


@pytest.mark.parametrize("content", [b"?", b"garbage" * 9])
def test_what_is_no_checkpoint_raises_our_error(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(anyprec.CheckpointError, match="is damaged, or no safetensors file"):
        anyprec.inspect(tmp_path / "x")


def test_settings_that_contradict_the_layers_raise_our_error(tamper):
    path = tamper(lambda raw: raw["settings"].update(bits=[2], activation_bits=[2]))
    with pytest.raises(
        anyprec.CheckpointError,
        match="the checkpoint contradicts itself: depthwise convolution '3'",
    ):
        anyprec.inspect(path)

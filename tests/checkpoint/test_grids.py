"""Files keep the grids of inputs and the target that a network was converted for."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import anyprec
from anyprec.errors import CheckpointError
from anyprec.model.record import ConvertSettings
from anyprec.runtime.storage import read_file, write_file

CONFIG = {"*": (4, 8)}


@pytest.fixture
def powers(plain: Callable[[], nn.Module], batch: Tensor) -> anyprec.ConvertedModel:
    """For the IMX500: symmetric grids and step sizes that are used as powers of two."""
    model = anyprec.convert(plain(), hardware="imx500", example_input=batch)
    anyprec.calibrate(model, [batch])
    with torch.no_grad():
        for layer in model.quantized_layers.values():
            layer.input_quantizer.step.mul_(1.2)  # as training leaves them: no powers of two
    return model


def outputs(model: anyprec.ConvertedModel, batch: Tensor) -> Tensor:
    with model.using_bits("W4A8"), torch.no_grad():
        return model(batch)


def quantized_with(model: anyprec.ConvertedModel) -> list[float]:
    layers = model.quantized_layers.values()
    return [float(layer.input_quantizer.step_in_use(-1)) for layer in layers]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bits", [None, "W4A8"])
def test_loading_keeps_rules_pairs_and_results(
    powers: anyprec.ConvertedModel,
    plain: Callable[[], nn.Module],
    batch: Tensor,
    tmp_path: Path,
    packed: bool,
    bits: str | None,
) -> None:
    anyprec.save(powers, tmp_path / "net", packed=packed)
    loaded = anyprec.load(tmp_path / "net", plain(), bits=bits)
    assert torch.equal(outputs(loaded, batch), outputs(powers, batch))
    settings = loaded.anyprec_record.settings
    assert dataclasses.replace(settings, only=None) == powers.anyprec_record.settings
    assert settings.hardware == "imx500"
    for layer in loaded.quantized_layers.values():
        assert layer.input_quantizer.rule == anyprec.GridRule("symmetric", "power-of-two")
    assert quantized_with(loaded) == quantized_with(powers)
    for step in quantized_with(loaded):
        assert torch.tensor(step).log2().frac() == 0
    assert [row.reason for row in loaded.coverage] == [row.reason for row in powers.coverage]


def test_what_has_its_default_is_not_written(
    plain: Callable[[], nn.Module], batch: Tensor, tmp_path: Path
) -> None:
    # Another string object than the default of the class.
    any_grid, any_scale = "".join(("aff", "ine")), "".join(("a", "ny"))
    model = anyprec.convert(
        plain(), activation_grid=any_grid, activation_scale=any_scale, example_input=batch
    )
    anyprec.save(model, tmp_path / "net")
    _, text = read_file(tmp_path / "net")
    document = json.loads(text)
    assert not {"activation_grid", "activation_scale", "hardware", "pairs"} & set(
        document["settings"]
    )
    assert all("kind" not in layer for layer in document["layers"])
    settings = model.anyprec_record.settings
    earlier = ("bits", "activation_bits", "first_last_bits", "depthwise_min_bits", "per_channel")
    fields = {name: getattr(settings, name) for name in (*earlier, "include", "exclude", "norm")}
    assert ConvertSettings(**fields) == settings


def test_candidates_are_those_of_the_file_and_not_of_a_later_table(
    powers: anyprec.ConvertedModel, plain: Callable[[], nn.Module], tmp_path: Path
) -> None:
    anyprec.save(powers, tmp_path / "net")
    tensors, text = read_file(tmp_path / "net")
    document = json.loads(text)
    assert document["settings"]["pairs"]["convolution"] == ["W2A8", "W4A8", "W8A8"]
    document["settings"]["hardware"] = "retired-chip"
    write_file(tmp_path / "net", tensors, json.dumps(document))
    loaded = anyprec.load(tmp_path / "net", plain())
    assert loaded.candidates == powers.candidates
    seen = anyprec.inspect(tmp_path / "net").layers
    assert {path: layer.candidates for path, layer in seen.items()} == powers.candidates


@pytest.mark.parametrize("value", ["W4", 4, "W9A8"])
def test_pairs_that_are_no_precisions_are_refused(
    powers: anyprec.ConvertedModel, plain: Callable[[], nn.Module], tmp_path: Path, value: object
) -> None:
    anyprec.save(powers, tmp_path / "net")
    tensors, text = read_file(tmp_path / "net")
    document = json.loads(text)
    document["settings"]["pairs"]["linear"] = [value]
    write_file(tmp_path / "net", tensors, json.dumps(document))
    with pytest.raises(CheckpointError, match=r"\$.settings.pairs.linear\[0\]"):
        anyprec.load(tmp_path / "net", plain())


def test_a_zero_point_that_the_settings_do_not_allow_is_refused(
    powers: anyprec.ConvertedModel, plain: Callable[[], nn.Module], tmp_path: Path
) -> None:
    anyprec.save(powers, tmp_path / "net")
    tensors, text = read_file(tmp_path / "net")
    tensors["5.input_quantizer.zero_point"][:] = 3
    write_file(tmp_path / "net", tensors, text)
    with pytest.raises(CheckpointError, match="zero point 3 at 8 bits, expected 0 or 128"):
        anyprec.load(tmp_path / "net", plain())

"""Calibration, which sees the inputs, against what conversion took for never negative."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import anyprec


class Shifting(nn.Module):
    """Its attribute changes what it computes, after conversion too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.shift: float | Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        if self.shift is not None:
            y = y - self.shift
        return self.c(self.b(y).relu())


def shifted() -> tuple[anyprec.ConvertedModel, Tensor]:
    """A network whose claim about `b` is false by now, and data that show it."""
    images = torch.randn(16, 6)
    model = anyprec.convert(Shifting().eval(), bits=(4, 8), example_input=images)
    assert model.b.input_quantizer.nonnegative
    model.shift = 0.5
    return model, images


def test_a_claim_that_the_data_refute_is_dropped_with_a_warning(tmp_path: Path) -> None:
    model, images = shifted()
    expected = model(images)
    with pytest.warns(anyprec.NegativeInputWarning, match=r"layer 'b' is as low as -0\.5, "):
        anyprec.calibrate(model, [images])
    assert not model.b.input_quantizer.nonnegative
    assert model.b.input_quantizer.kind != "unsigned"
    assert model.c.input_quantizer.nonnegative
    assert not model.anyprec_record.facts.layers["b"].nonnegative
    model.set_bits(8)
    assert torch.linalg.norm(model(images) - expected) < 0.02 * torch.linalg.norm(expected)
    anyprec.save(model, tmp_path / "model.safetensors")
    loaded = anyprec.load(tmp_path / "model.safetensors", model=Shifting().eval())
    assert not loaded.b.input_quantizer.nonnegative
    assert loaded.b.input_quantizer.kind == model.b.input_quantizer.kind


def test_a_second_calibration_has_nothing_to_warn_of() -> None:
    model, images = shifted()
    with pytest.warns(anyprec.NegativeInputWarning):
        anyprec.calibrate(model, [images])
    anyprec.calibrate(model, [images])


def test_the_lowest_of_all_values_counts_and_not_that_of_the_sample() -> None:
    model, _ = shifted()
    shift = torch.zeros(20_000, 6)
    shift[777, 3] = 100.0
    model.shift = shift
    with pytest.warns(anyprec.NegativeInputWarning):
        anyprec.calibrate(model, [torch.randn(20_000, 6)])


def test_the_warning_as_an_error_leaves_the_network_as_it_was() -> None:
    model, images = shifted()
    record = model.anyprec_record
    with warnings.catch_warnings():
        warnings.simplefilter("error", anyprec.NegativeInputWarning)
        with pytest.raises(anyprec.NegativeInputWarning):
            anyprec.calibrate(model, [images])
    assert model.b.input_quantizer.nonnegative
    assert not model.b.input_quantizer.calibrated
    assert model.anyprec_record is record

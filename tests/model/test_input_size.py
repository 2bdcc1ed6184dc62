"""MACs are counted at the size of the images in use, exactly as if they had been the example."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import anyprec
from anyprec.errors import BatchError, CalibrationError, InputSizeWarning
from anyprec.model.costing import cost_model
from anyprec.network.facts import NetworkFacts


class Recurrent(nn.Module):
    """LSTM matrices, attention with a packed projection, and a matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 4, batch_first=True, bidirectional=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mixing = nn.Parameter(torch.randn(8, 8))
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.lstm(x)
        x, _ = self.attention(x, x, x)
        return self.fc((x @ self.mixing).mean(dim=1))


class Routed(nn.Module):
    """Each token goes to one of three experts: MACs depend on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(6, 3)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.fc = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.gate(x).argmax(dim=-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            out[chosen == number] = expert(x[chosen == number])
        return self.fc(out.mean(dim=1))


class Unlisted(nn.Module):
    """A convolution whose kernel is no parameter: it costs something, and belongs to no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.register_buffer("kernel", torch.randn(4, 4, 3, 3))
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(nn.functional.conv2d(self.stem(x), self.kernel).mean(dim=(2, 3)))


def vit() -> nn.Module:
    return timm.create_model("test_vit", dynamic_img_size=True, img_size=32)


CASES = {
    "convolutions": (lambda: timm.create_model("test_resnet"), (3, 48, 32), (3, 32, 32)),
    "transformer": (vit, (3, 32, 32), (3, 48, 64)),
    "sequences": (Recurrent, (5, 6), (9, 6)),
    "experts": (Routed, (20, 6), (31, 6)),
    "unlisted": (Unlisted, (3, 16, 16), (3, 12, 9)),
}


def counts(model: anyprec.ConvertedModel) -> NetworkFacts:
    """The facts, without what reads a weight: positions are resized at some sizes, else added."""
    facts = model.anyprec_record.facts
    layers = {path: dataclasses.replace(row, problem=None) for path, row in facts.layers.items()}
    return dataclasses.replace(facts, layers=layers)


@pytest.mark.parametrize("name", CASES)
def test_after_calibration_the_facts_are_those_of_an_example_of_that_size(name: str) -> None:
    make, before, after = CASES[name]
    network = make().eval()
    images = torch.randn(3, *after)
    reference = anyprec.convert(copy.deepcopy(network), example_input=images[:1])
    model = anyprec.convert(network, example_input=torch.randn(1, *before))
    assert cost_model(model).cost(None).bitops != cost_model(reference).cost(None).bitops
    anyprec.calibrate(model, [images])
    assert counts(model) == counts(reference)
    assert cost_model(model).input_shape == after
    assert cost_model(model).cost(None).bitops == cost_model(reference).cost(None).bitops


def test_the_guessed_size_of_a_network_gives_way_to_that_of_the_images() -> None:
    model = anyprec.convert(timm.create_model("test_resnet"), bits=(4, 8))
    anyprec.calibrate(model, [torch.randn(2, 3, 32, 32)], norm_batches=1)
    reference = timm.create_model("test_resnet")
    reference = anyprec.convert(reference, bits=(4, 8), example_input=torch.zeros(1, 3, 32, 32))
    assert anyprec.cost_of(model, 4).bitops == anyprec.cost_of(reference, 4).bitops


def test_images_of_the_known_size_change_no_fact(
    net: anyprec.ConvertedModel, images: Tensor
) -> None:
    record = net.anyprec_record
    anyprec.calibrate(net, [images])
    assert net.anyprec_record is record


def test_of_batches_of_several_sizes_the_first_counts(net: anyprec.ConvertedModel) -> None:
    anyprec.calibrate(net, [torch.randn(2, 3, 24, 24), torch.randn(2, 3, 20, 20)])
    assert cost_model(net).input_shape == (3, 24, 24)


def test_a_calibration_that_fails_leaves_the_size(net: anyprec.ConvertedModel) -> None:
    record = net.anyprec_record
    with pytest.raises(CalibrationError, match="NaN"):
        anyprec.calibrate(net, [torch.full((2, 3, 24, 24), torch.nan)])
    assert net.anyprec_record is record


def test_named_configurations_and_settings_survive_another_size(
    net: anyprec.ConvertedModel, tmp_path: Path
) -> None:
    net.configs["four"] = net.resolve_bits(4)
    anyprec.calibrate(net, [torch.randn(2, 3, 24, 24)])
    assert net.configs == {"four": net.resolve_bits(4)}
    anyprec.save(net, tmp_path / "net", rebuildable=False)
    info = anyprec.inspect(tmp_path / "net")
    assert info.input_shape[1:] == (3, 24, 24)
    assert info.notes["four"].bitops == anyprec.cost_of(net, 4).bitops


@pytest.mark.parametrize("budget", ["0.3 MBitOPs", "W4A4", None])
def test_a_budget_means_the_size_of_the_images_that_are_searched_on(
    budget: str | None, net: anyprec.ConvertedModel, labels: Tensor
) -> None:
    images = torch.randn(8, 3, 8, 8)
    result = anyprec.search(net, [(images, labels)], budget, max_evaluations=12)
    assert result.costs.input_shape == (3, 8, 8)
    assert result.cost.bitops == anyprec.cost_of(net, result.config).bitops
    assert result.cost.bitops <= result.budget.limits["bitops"]
    # At the size of the example nothing would fit.
    if budget == "0.3 MBitOPs":
        assert 4 * result.cost.bitops > 0.9e6


def test_a_packed_network_says_that_its_costs_are_of_another_size(
    net: anyprec.ConvertedModel, float_net: nn.Module, tmp_path: Path
) -> None:
    anyprec.save(net, tmp_path / "net", packed=True, rebuildable=False)
    packed = anyprec.load(tmp_path / "net", copy.deepcopy(float_net))
    bitops = anyprec.cost_of(packed, 4).bitops
    images = torch.randn(4, 3, 24, 24)
    arguments = {"objective": "divergence", "max_evaluations": 4}
    with pytest.warns(
        InputSizeWarning, match=r"shape \(3, 16, 16\), .* have \(3, 24, 24\).*packed"
    ):
        anyprec.search(packed, [images], "W4A4", **arguments)
    assert anyprec.cost_of(packed, 4).bitops == bitops
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        anyprec.search(packed, [torch.randn(4, 3, 16, 16)], "W4A4", **arguments)


def test_a_size_that_the_network_does_not_run_at_is_named(images: Tensor) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(256, 2))
    model = anyprec.convert(network, bits=(4, 8), example_input=torch.zeros(1, 3, 8, 8))
    text = r"shape \(8, 3, 16, 16\).*input of shape \(1, 3, 8, 8\)"
    with pytest.raises(BatchError, match=text):
        anyprec.calibrate(model, [images])


def test_a_converted_network_is_counted_like_the_float_one_in_every_form_of_norm(
    small_net: Callable[..., nn.Module],
) -> None:
    images = torch.randn(2, 3, 24, 24)
    for norm in ("shared", "per-pair", "shared-affine"):
        network = small_net().eval()
        reference = anyprec.convert(copy.deepcopy(network), norm=norm, example_input=images[:1])
        model = anyprec.convert(network, norm=norm, example_input=torch.zeros(1, 3, 16, 16))
        anyprec.calibrate(model, [images])
        assert model.anyprec_record.facts == reference.anyprec_record.facts

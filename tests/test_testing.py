"""The checks of `anyprec.testing` notice what they are there for: each sabotage is reported."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import anyprec
from anyprec import testing
from anyprec.model.record import Coverage
from anyprec.model.switchboard import Switchboard
from anyprec.nn.layers import QuantizedLayer
from anyprec.testing import structure

BITS = (2, 4, 8)
GRADIENTS = {"gradients at 2 bits", "gradients at 8 bits"}


class Classifier(nn.Module):
    """Small, with the methods of a timm network."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.body = nn.Conv2d(8, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 5)

    def forward_features(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.body(torch.relu(self.stem(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.forward_features(x).mean(dim=(2, 3)))

    def reset_classifier(self, classes: int) -> None:
        self.fc = nn.Linear(8, classes)


def make_images() -> Tensor:
    return torch.randn(4, 3, 16, 16)


class Multiplying(nn.Linear):
    """Multiplies by its weight in a way that is not quantized in a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t() + self.bias


class Positioned(Classifier):
    """With a parameter that is added to the image, and one in a product that hides its operator."""

    def __init__(self, *, hides: bool) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1, 3, 16, 16))
        self.mixing = nn.Parameter(torch.randn(3, 3) * 0.3)
        self.hides = hides

    def forward(self, x: Tensor) -> Tensor:
        if self.hides:
            x = torch.vmap(lambda sample: torch.tensordot(self.mixing, sample, dims=1))(x)
        return super().forward(x + self.positions)


def test_a_parameter_that_is_only_added_is_no_skipped_layer() -> None:
    report = testing.check_structure(Positioned(hides=False), make_images())
    assert report.broken == {}
    assert report.coverage == {"quantized": 3, "only read": 1}
    report = testing.check_structure(Positioned(hides=True), make_images())
    assert report.coverage == {"quantized": 3, "only read": 1, "skipped": 1}
    assert "matrices.mixing: read by" in report.broken["nothing is skipped"]
    network = Positioned(hides=False)
    network.fc = Multiplying(8, 5)
    report = testing.check_structure(network, make_images())
    assert report.coverage == {"quantized": 2, "only read": 1, "skipped": 1}
    assert report.broken["nothing is skipped"] == "skipped: fc: read by matmul"


def change_a_weight_while_converting(monkeypatch: pytest.MonkeyPatch) -> None:
    def convert(*args: Any, **kwargs: Any) -> anyprec.ConvertedModel:
        model = anyprec.convert(*args, **kwargs)
        with torch.no_grad():
            model.get_parameter("fc.bias").add_(1)
        return model

    monkeypatch.setattr(structure, "convert", convert)


def drift_with_each_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    set_bits = anyprec.ConvertedModel.set_bits

    @torch.no_grad()
    def drifting(self: anyprec.ConvertedModel, request: Any) -> None:
        set_bits(self, request)
        if request is not None:
            self.get_parameter("fc.bias").add_(1)

    monkeypatch.setattr(anyprec.ConvertedModel, "set_bits", drifting)


def switch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Switchboard, "switch", lambda self, bits, statistics: {})


def bypass_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        QuantizedLayer,
        "quantized_operands",
        lambda self, values, weight: (self.input_quantizer(values, self.input_index), weight),
    )


def load_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anyprec.ConvertedModel, "load_state_dict", lambda self, state: None)


def forget_what_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        anyprec.ConvertedModel, "__deepcopy__", lambda self, memo: Classifier(), raising=False
    )


def give_a_float_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    adopt = "anyprec.model.classifier._adopt_replacements"
    monkeypatch.setattr(adopt, lambda model, before: None)


SABOTAGES: list[tuple[Callable[[pytest.MonkeyPatch], None], set[str]]] = [
    (
        change_a_weight_while_converting,
        {"float output, eval mode", "float output, train mode", "float state dict"},
    ),
    (drift_with_each_switch, {"switching there and back", "float state dict"}),
    # Norms are not switched either, so training moves those of the float network.
    (
        switch_nothing,
        {"finite at the lowest and highest bits, and different", "float state dict", *GRADIENTS},
    ),
    (bypass_weights, GRADIENTS),
    (load_nothing, {"state dict into a fresh network", "float state dict"}),
    (forget_what_is_copied, {"deepcopy"}),
    (give_a_float_classifier, {"reset_classifier"}),
]


def test_a_sound_network_breaks_nothing() -> None:
    report = testing.assert_promises(Classifier(), make_images, bits=BITS)
    assert report.broken == {}
    assert len(report.held) == 13
    assert report.coverage == {"quantized": 3}
    assert report.convert_seconds > 0


@pytest.mark.parametrize(
    ("sabotage", "broken"), SABOTAGES, ids=[sabotage.__name__ for sabotage, _ in SABOTAGES]
)
def test_a_promise_that_is_broken_on_purpose_is_reported(
    sabotage: Callable[[pytest.MonkeyPatch], None],
    broken: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = Classifier()
    sabotage(monkeypatch)
    report = testing.check_promises(network, make_images, bits=BITS)
    assert report.broken.keys() == broken


def test_the_error_lists_every_broken_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Classifier()
    bypass_weights(monkeypatch)
    with pytest.raises(testing.BrokenPromiseError) as caught:
        testing.assert_promises(network, make_images, bits=BITS)
    missing = "3 layers have none: body, fc, stem"
    assert str(caught.value).splitlines() == [
        "Classifier breaks 2 of 13 promises:",
        f"- gradients at 2 bits: {missing}",
        f"- gradients at 8 bits: {missing}",
    ]


def test_a_network_that_cannot_be_converted_is_reported_with_the_reason() -> None:
    class Empty(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(dim=(2, 3))

    report = testing.check_promises(Empty(), make_images, bits=BITS)
    assert report.broken.keys() == {"convert"}
    assert "ConversionError: nothing to quantize in Empty" in report.broken["convert"]
    assert report.held == []


def test_fewer_than_two_bit_widths_are_refused() -> None:
    with pytest.raises(anyprec.BitsError, match=r"bits=\(4,\).*two bit-widths or more"):
        testing.check_promises(Classifier(), make_images, bits=(4,))


def test_the_order_of_bit_widths_does_not_matter() -> None:
    assert testing.check_promises(Classifier(), make_images, bits=(8, 2)).broken == {}


def test_the_random_generator_is_restored() -> None:
    network = Classifier()
    state = torch.get_rng_state()
    testing.check_promises(network, make_images, bits=BITS)
    assert torch.equal(torch.get_rng_state(), state)


def test_layers_that_are_blocked_by_zeros_have_gradients_after_all() -> None:
    network = Classifier()
    nn.init.zeros_(network.norm.weight)
    nn.init.zeros_(network.fc.weight)
    assert testing.check_promises(network, make_images, bits=BITS).broken == {}


def test_structure_needs_no_values() -> None:
    with torch.device("meta"):
        network = Classifier()
    report = testing.check_structure(network, make_images().to("meta"))
    assert report.broken == {}
    assert report.held == ["convert", "nothing is skipped", "MACs equal those of torch's counter"]
    macs = 7 * 7 * 8 * 3 * 9 + 5 * 5 * 8 * 8 * 9 + 8 * 5
    assert report.macs == (macs, macs)


def test_a_skipped_layer_and_a_wrong_number_of_macs_are_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    skipped = Coverage("body", "Conv2d", "skipped", "of no known class")
    monkeypatch.setattr(anyprec.ConvertedModel, "coverage", (skipped,))
    original = structure.cost_model
    monkeypatch.setattr(
        structure,
        "cost_model",
        lambda model: dataclasses.replace(
            original(model), layers={"fc": original(model).layers["fc"]}
        ),
    )
    report = testing.check_structure(Classifier(), make_images())
    assert report.broken == {
        "nothing is skipped": "skipped: body: of no known class",
        "MACs equal those of torch's counter": "14,440 against 25,024",
    }
    assert report.coverage == {"skipped": 1}
    assert report.reasons == {"of no known class": 1}

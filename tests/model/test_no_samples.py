"""A batch of no samples, of the whole network or of a part that is given none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import anyprec


class Routed(nn.Module):
    """Samples whose first feature is large go through an expert."""

    def __init__(self, *, threshold: float) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.up = nn.ConvTranspose2d(6, 6, 2, stride=2, groups=3)
        self.expert = nn.Linear(6, 6)
        self.expert_norm = nn.BatchNorm1d(6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.head = nn.Linear(6, 4)
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(torch.relu(self.norm(self.stem(x)))).mean((2, 3))
        chosen = x[:, 0] > self.threshold
        routed = self.expert(x[chosen])
        if len(routed) or not self.training:  # torch refuses to train a norm on nothing
            routed = self.expert_norm(routed)
        x = torch.index_put(x, (chosen,), torch.relu(routed))
        tokens = x[:, None].expand(-1, 3, -1)
        return self.head(self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1))


def routed_model(norm: str, images: Tensor, **settings: Any) -> anyprec.ConvertedModel:
    net = Routed(threshold=-1e9).eval()
    model = anyprec.convert(
        net, bits=(2, 4, 8), norm=norm, first_last_bits=None, example_input=images, **settings
    )
    anyprec.calibrate(model, [images])
    return model


@pytest.fixture
def images() -> Tensor:
    return torch.randn(6, 3, 8, 8)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("norm", ["shared-affine", "shared", "per-pair"])
def test_an_empty_batch_gives_an_empty_result_at_every_precision(
    norm: str, per_channel: bool, images: Tensor
) -> None:
    model = routed_model(norm, images, per_channel=per_channel)
    for bits in (None, 2, 8, (2, 8)):
        model.set_bits(bits)
        assert model(images[:0]).shape == (0, 4)
        with torch.inference_mode():
            assert model(images[:0]).shape == (0, 4)


@pytest.mark.parametrize("norm", ["shared-affine", "shared", "per-pair"])
def test_a_layer_without_samples_has_gradients_of_zero_and_others_their_own(
    norm: str, images: Tensor
) -> None:
    model = routed_model(norm, images)
    model.threshold = 1e9
    model.train()
    model.set_bits(4)
    model(images).square().sum().backward()
    expert, stem = model.quantized_layers["expert"], model.quantized_layers["stem"]
    for layer, is_used in ((expert, False), (stem, True)):
        for tensor in (layer.weight, layer.weight_quantizer.step, layer.input_quantizer.step):
            assert torch.isfinite(tensor.grad).all()
            assert bool(tensor.grad.any()) == is_used


def test_training_on_no_samples_at_all_gives_gradients_of_zero(images: Tensor) -> None:
    model = routed_model("shared-affine", images)
    model.set_bits(2)
    model(images[:0]).sum().backward()  # in eval mode, in which norms take any batch
    for parameter in model.parameters():
        if parameter.grad is not None:
            assert not parameter.grad.any()


@pytest.mark.parametrize("norm", ["shared-affine", "per-pair"])
def test_calibration_batches_in_which_a_layer_gets_nothing_count_nothing_for_it(
    norm: str, images: Tensor
) -> None:
    """Rows of zeros, and none at all, in the order that is harder: nothing first."""
    states = []
    for batches in ([images], [images[:0], images], [images, images[:0]]):
        torch.manual_seed(5)
        model = anyprec.convert(
            Routed(threshold=-1e9).eval(), bits=(2, 8), norm=norm, example_input=images
        )
        anyprec.calibrate(model, batches)
        states.append(model.state_dict())
    for state in states[1:]:
        for name, value in state.items():
            torch.testing.assert_close(value, states[0][name], equal_nan=True)


def test_a_layer_that_never_gets_a_sample_was_not_reached(images: Tensor) -> None:
    model = anyprec.convert(Routed(threshold=-1e9).eval(), bits=(2, 8), example_input=images)
    model.threshold = 1e9
    with pytest.raises(anyprec.CalibrationError, match="'expert' was not reached"):
        anyprec.calibrate(model, [images])


def test_norm_statistics_of_a_part_that_gets_no_sample_stay_as_they_are(images: Tensor) -> None:
    model = routed_model("shared-affine", images)
    model.threshold = 1e9
    before = {name: value.clone() for name, value in model.expert_norm.state_dict().items()}
    anyprec.update_norms(model, [images])
    after = model.expert_norm.state_dict()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, equal_nan=True)
    assert torch.isfinite(model.norm.bank.running_mean).all()

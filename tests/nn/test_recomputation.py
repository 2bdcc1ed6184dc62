"""Quantized weights are computed again for backward: same gradients, less memory, none stale."""

from __future__ import annotations

import contextlib

import pytest
import timm
import torch
from torch import Tensor, nn

import anyprec
from anyprec.nn import layers
from benchmarks.speed.step_cost import saved_bytes


def gradients(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(images).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "name",
    [
        "test_resnet",
        "test_vit",
        "test_nfnet",
        "resnetv2_18",
        "swinv2_cr_tiny_ns_224",
        "sequencer2d_s",
    ],
)
def test_gradients_are_those_of_kept_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {
        "swinv2_cr_tiny_ns_224": {
            "img_size": 64,
            "window_size": 2,
            "depths": (1, 1, 1, 1),
            "embed_dim": 24,
        }
    }
    size = 160 if name == "test_vit" else 64
    if name == "sequencer2d_s":
        small[name] = {
            "layers": (1, 1, 1, 1),
            "embed_dims": (24, 24, 24, 24),
            "hidden_sizes": (8, 8, 8, 8),
        }
    images = torch.randn(2, 3, size, size)
    network = timm.create_model(
        name, **small.get(name, {})
    ).eval()  # no drop path, which would differ
    model = anyprec.convert(network, bits=(2, 8), example_input=images[:1])
    anyprec.calibrate(model, [images])
    model.set_bits(8)
    found = gradients(model, images)
    monkeypatch.setattr(layers, "recomputing", lambda *_: contextlib.nullcontext())
    kept = gradients(model, images)
    assert found.keys() == kept.keys()
    assert all(torch.equal(value, kept[path]) for path, value in found.items())


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100"])
def test_the_backward_pass_needs_little_more_memory_than_that_of_the_float_network(
    name: str,
) -> None:
    images = torch.randn(2, 3, 64, 64)
    network = timm.create_model(name, num_classes=10).train()
    labels = torch.zeros(len(images), dtype=torch.int64)
    plain = saved_bytes(network, images, labels)
    model = anyprec.convert(network, bits=(4,), example_input=images[:1])
    anyprec.calibrate(model, [images])
    model.train()
    model.set_bits(4)
    assert saved_bytes(model, images, labels) < 1.6 * plain


def test_a_weight_that_changed_before_the_backward_pass_is_noticed(
    net: anyprec.ConvertedModel, images: Tensor
) -> None:
    net.set_bits(4)
    output = net(images).sum()
    with torch.no_grad():
        net.head.weight.mul_(2)
    with pytest.raises(
        RuntimeError, match="a weight or step size was changed in place between the forward pass"
    ):
        output.backward()


def test_the_bits_of_the_forward_pass_count_not_those_of_the_moment(
    net: anyprec.ConvertedModel, images: Tensor
) -> None:
    net.set_bits(4)
    expected = gradients(net, images)
    net.zero_grad()
    loss = net(images).square().mean()
    net.set_bits(2)
    loss.backward()
    assert all(torch.equal(net.get_parameter(name).grad, value) for name, value in expected.items())

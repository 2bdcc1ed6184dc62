"""Quantized weights are computed again for backward: same gradients, less memory, none stale."""

from __future__ import annotations

import contextlib
import copy

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
    found = {}
    for when in ("always", "auto", "never"):
        anyprec.recompute_weights(model, when)
        found[when] = gradients(model, images)
    monkeypatch.setattr(layers, "recomputing", lambda *_: contextlib.nullcontext())
    kept = gradients(model, images)
    for computed in found.values():
        assert computed.keys() == kept.keys()
        assert all(torch.equal(value, kept[path]) for path, value in computed.items())


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
    messages = {
        "always": "a weight or step size was changed in place between the forward pass",
        "never": "modified by an inplace operation",  # torch's own
    }
    for when, message in messages.items():
        anyprec.recompute_weights(net, when)
        output = net(images).sum()
        with torch.no_grad():
            net.head.weight.mul_(2)
        with pytest.raises(RuntimeError, match=message):
            output.backward()


def test_the_bits_of_the_forward_pass_count_not_those_of_the_moment(
    net: anyprec.ConvertedModel, images: Tensor
) -> None:
    anyprec.recompute_weights(net, "always")
    net.set_bits(4)
    expected = gradients(net, images)
    net.zero_grad()
    loss = net(images).square().mean()
    net.set_bits(2)
    loss.backward()
    assert all(torch.equal(net.get_parameter(name).grad, value) for name, value in expected.items())


def recomputed(model: nn.Module, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Elements of the weights that the backward pass would compute again."""
    sizes: set[int] = set()

    def note(tensor: Tensor, *_: object) -> contextlib.AbstractContextManager[None]:
        sizes.add(tensor.numel())
        return contextlib.nullcontext()

    with monkeypatch.context() as patched:
        patched.setattr(layers, "recomputing", note)
        model(images)
    return sizes


def test_large_weights_beside_small_inputs_are_computed_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = nn.Sequential(nn.Linear(200, 100), nn.Linear(100, 10))
    images = torch.randn(2, 200)
    model = anyprec.convert(network, bits=(4, 8), first_last_bits=None, example_input=images[:1])
    anyprec.calibrate(model, [images])
    model.set_bits(8)
    large, small = 200 * 100, 100 * 10
    # The input has 4 times the elements of the large weight, or fewer.
    assert recomputed(model, torch.randn(399, 200), monkeypatch) == {large}
    assert recomputed(model, torch.randn(400, 200), monkeypatch) == set()
    # The small weight is larger than its input, and small all the same.
    assert recomputed(model, images, monkeypatch) == {large}
    anyprec.recompute_weights(model, "always")
    assert recomputed(copy.deepcopy(model), images, monkeypatch) == {large, small}
    assert recomputed(model.view(4), torch.randn(400, 200), monkeypatch) == {large, small}
    anyprec.recompute_weights(model, "never")
    assert recomputed(model, images, monkeypatch) == set()


def test_an_unknown_choice_is_refused(net: anyprec.ConvertedModel) -> None:
    for unknown in ("sometimes", None):
        with pytest.raises(ValueError, match="use one of"):
            anyprec.recompute_weights(net, unknown)
    with pytest.raises(anyprec.ConversionError, match="recompute_weights"):
        anyprec.recompute_weights(nn.Linear(2, 2), "auto")

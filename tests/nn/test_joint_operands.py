"""Input and weight of a layer that learn: quantized by one node of autograd's graph."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import anyprec
from anyprec.kernels import kernels_off
from anyprec.nn.joint_operands import Operands
from anyprec.nn.quantizers import InputQuantizer


def test_operands_as_one_node_have_the_numbers_and_gradients_of_two(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    images = torch.randn(3, 4, 6, 6, requires_grad=True)
    net = nn.Sequential(nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3))
    model = anyprec.convert(net, bits=(2, 4, 8), example_input=images[:1].detach())
    anyprec.calibrate(model, [images.detach()])
    model.set_bits({"0": (8, 8), "2": (8, 8)})

    def run() -> list[Tensor]:
        images.grad = None
        model.zero_grad()
        output = model(images)
        output.square().sum().backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        return [output, images.grad, *gradients]

    nodes: list[str] = []
    apply = Operands.apply
    monkeypatch.setattr(Operands, "apply", lambda *args: nodes.append("both") or apply(*args))
    together = run()
    assert len(nodes) == 2
    monkeypatch.setattr("anyprec.nn.layers.quantize_operands", lambda *_: None)
    apart = run()
    assert len(nodes) == 2
    assert len(together) == len(apart) == 10
    for found, expected in zip(together, apart, strict=True):
        assert torch.equal(found, expected)


def test_operands_that_learn_nothing_are_quantized_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randn(2, 4)
    model = anyprec.convert(
        nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), bits=(4, 8), example_input=images
    )
    anyprec.calibrate(model, [images])
    model.set_bits(8)
    monkeypatch.setattr(Operands, "apply", None)
    with torch.no_grad():
        model(images)
    layer = model.quantized_layers["0"]
    for parameter in (layer.weight, layer.weight_quantizer.step):
        parameter.requires_grad_(requires_grad=False)
    layer(images).sum().backward()
    assert layer.input_quantizer.step.grad is not None
    assert layer.weight_quantizer.step.grad is None


def test_hooks_and_other_forwards_of_quantizers_are_called() -> None:
    images = torch.randn(2, 4)
    model = anyprec.convert(nn.Sequential(nn.Linear(4, 4)), bits=(4, 8), example_input=images)
    anyprec.calibrate(model, [images])
    model.set_bits(8)
    layer, called = model.quantized_layers["0"], []
    for quantizer in (layer.weight_quantizer, layer.input_quantizer):
        hook = quantizer.register_forward_hook(lambda *_: called.append("hook"))
        model(images)
        hook.remove()
        real = quantizer.forward
        quantizer.forward = lambda *args, real=real: called.append("forward") or real(*args)
        model(images)
        del quantizer.forward
    assert called == ["hook", "forward"] * 2

    class Doubling(InputQuantizer):
        def forward(self, values: Tensor, index: int) -> Tensor:
            return 2 * super().forward(values, index)

    expected = model(images)
    layer.input_quantizer.__class__ = Doubling
    bias = layer.bias
    assert torch.allclose(model(images) - bias, 2 * (expected - bias), atol=1e-6)


class Residual(nn.Module):
    """A value that two layers and a sum read."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.left, self.right = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1)
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        return self.head((self.left(x) + self.right(x)).relu())


@pytest.mark.parametrize(
    "settings",
    [
        {"norm": "shared"},
        {"activation_scale": "power-of-two"},
        {"placement": "integer"},
        {"per_channel": False},
        {"activation_grid": "signed"},
    ],
    ids=str,
)
@pytest.mark.parametrize("bits", [4, 8])
def test_outputs_with_gradients_are_those_without(settings: dict[str, Any], bits: int) -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 8, 8)
    model = anyprec.convert(Residual().eval(), bits=(4, 8), example_input=images, **settings)
    anyprec.calibrate(model, [images])
    model.set_bits(bits)
    with torch.no_grad():
        for layer in model.quantized_layers.values():
            layer.input_quantizer.step.mul_(1.3)  # no power of two any more
        expected = model(images)
    output = model(images)
    assert torch.equal(output, expected)
    output.square().sum().backward()
    assert all(layer.weight.grad.any() for layer in model.quantized_layers.values())


@pytest.mark.parametrize("frozen", ["weight_quantizer", "input_quantizer"])
def test_a_step_size_learns_though_the_other_one_is_frozen(frozen: str) -> None:
    images = torch.randn(8, 4)
    model = anyprec.convert(nn.Sequential(nn.Linear(4, 4)), bits=8, example_input=images)
    anyprec.calibrate(model, [images])
    model.set_bits(8)
    layer = model.quantized_layers["0"]
    getattr(layer, frozen).step.requires_grad_(requires_grad=False)
    images.requires_grad_()
    with kernels_off():
        model(images).square().sum().backward()
    for name in ("weight_quantizer", "input_quantizer"):
        gradient = getattr(layer, name).step.grad
        assert gradient is None if name == frozen else gradient.any()


@pytest.fixture
def layer() -> Any:
    images = torch.randn(8, 4)
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model = anyprec.convert(net, bits=(4, 8), example_input=images)
    anyprec.calibrate(model, [images])
    model.set_bits({"1": (4, 4)})
    return model.quantized_layers["1"]


def kernel_of(layer: Any) -> Any:
    """The class of the kernel that served a layer; skips where there is none."""
    for prepared in layer.weight_source.prepared.values():
        return type(prepared.kernel)
    return pytest.skip("no kernel here")


def gradients_of(layer: Any, images: Tensor) -> list[Tensor]:
    layer.zero_grad()
    images = images.clone().requires_grad_()
    result = layer(images)
    result.square().sum().backward()
    return [result, images.grad, *(parameter.grad for parameter in layer.parameters())]


def other_weight(layer: Any) -> None:
    layer.weight.data = torch.randn_like(layer.weight)


def other_layout(layer: Any) -> None:
    layer.weight.data = layer.weight.data.t()


def other_dtype(layer: Any) -> None:
    layer.weight.data = layer.weight.data.bfloat16()
    layer.bias.data = layer.bias.data.bfloat16()


def other_steps(layer: Any) -> None:
    for quantizer in (layer.weight_quantizer, layer.input_quantizer):
        quantizer.step.data = 1.5 * quantizer.step.data


def other_values_in_place(layer: Any) -> None:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1.25)


def other_parameter(layer: Any) -> None:
    layer.weight = nn.Parameter(torch.randn_like(layer.weight))


def fewer_channels(layer: Any) -> None:
    for parameter in (layer.weight, layer.bias):
        parameter.data = parameter.data[:2]
    layer.weight_quantizer.step.data = layer.weight_quantizer.step.data[:, :2]


def fewer_inputs(layer: Any) -> None:
    layer.weight.data = layer.weight.data[:, :2]


@pytest.mark.parametrize(
    "change",
    [
        other_weight,
        other_layout,
        other_dtype,
        other_steps,
        other_values_in_place,
        other_parameter,
        fewer_channels,
        fewer_inputs,
    ],
)
def test_what_was_prepared_is_not_used_for_others(
    layer: Any, change: Callable[[Any], None]
) -> None:
    images = torch.randn(8, 4)
    gradients_of(layer, images)
    change(layer)
    images = images[:, : layer.weight.shape[1]].to(layer.weight.dtype)
    found = gradients_of(layer, images)
    layer.weight_source.prepared.clear()
    with kernels_off():
        expected = gradients_of(layer, images)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("quantizer", ["weight_quantizer", "input_quantizer"])
def test_a_step_size_that_is_gone_is_never_read(layer: Any, quantizer: str) -> None:
    layer.switch(anyprec.Bits(8, 8))
    images = torch.randn(8, 4)
    gradients_of(layer, images)
    step = getattr(layer, quantizer).step
    step.data = step.data[:1]
    with pytest.raises(IndexError):
        layer(images)


class Watched(nn.Parameter):
    """A parameter of another class, which may do anything."""


def test_a_parameter_of_another_class_in_the_same_memory_does_not_reach_a_kernel(
    layer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.randn(8, 4)
    expected = gradients_of(layer, images)
    monkeypatch.setattr(kernel_of(layer), "quantize_pair", None)
    layer.weight = Watched(layer.weight.data)
    for one, other in zip(gradients_of(layer, images), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_weights_exchanged_before_the_backward_pass_are_never_read_beyond_their_end(
    layer: Any,
) -> None:
    images = torch.randn(8, 4, requires_grad=True)
    layer(images)
    result = layer(images)
    layer.weight.data = torch.zeros(0)
    with pytest.raises(RuntimeError):
        result.sum().backward()


def test_copies_and_pickles_prepare_anew(layer: Any) -> None:
    images = torch.randn(8, 4)
    gradients_of(layer, images)
    assert layer.weight_source.prepared
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert not other.weight_source.prepared
        for one, expected in zip(
            gradients_of(other, images), gradients_of(layer, images), strict=True
        ):
            assert torch.equal(one, expected)


def test_turned_off_after_a_pass_kernels_run_in_neither_direction(
    layer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = torch.randn(8, 4)
    expected = gradients_of(layer, images)
    kernel = kernel_of(layer)
    for name in ("quantize_pair", "quantize_pair_backward"):
        monkeypatch.setattr(kernel, name, None)
    with kernels_off():
        found = gradients_of(layer, images)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)

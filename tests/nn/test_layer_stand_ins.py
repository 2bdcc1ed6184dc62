"""Layers that run on a stand-in: nobody but the operator sees the quantized weight."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize, prune
from torch.overrides import TorchFunctionMode

import anyprec
from anyprec.bits import Bits, LayerCandidates
from anyprec.nn import layers
from anyprec.nn.layers import QuantizedModule, quantize_layer

CANDIDATES = LayerCandidates((2, 4, 8), (3, 8))


class Calls(TorchFunctionMode):
    """Counts operators, and keeps their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in (F.conv2d, F.linear):
            self.weights.append(args[1])
        return func(*args, **(kwargs or {}))


class Shifting(nn.Conv2d):
    """A forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 1)


class Masked(nn.Conv2d):
    """Its weight is a property."""

    @property
    def weight(self) -> Tensor:
        return self._parameters["weight"] * 2

    @weight.setter
    def weight(self, value: Tensor) -> None:
        self._parameters["weight"] = value


class Doubling(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def make(layer: nn.Module) -> Any:
    quantize_layer(layer, CANDIDATES, nonnegative=False, axis=0)
    quantized: Any = layer
    quantized.input_quantizer.set_grid(torch.tensor([0.4, 0.02]), torch.tensor([3, 100]))
    quantized.switch(Bits(4, 3))
    return quantized


def conv(**options: Any) -> Any:
    return make(nn.Conv2d(3, 4, 3, padding=1, **options))


@pytest.fixture
def interceptions(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The layers whose operator was intercepted, in the order of their calls."""
    noted: list[nn.Module] = []

    class Noting(layers._LayerInterceptor):
        def __init__(self, layer: Any) -> None:
            super().__init__(layer)
            noted.append(layer)

    monkeypatch.setattr(layers, "_LayerInterceptor", Noting)
    return noted


def intercepted(layer: Any, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """What the layer puts out when its operator is intercepted."""
    with monkeypatch.context() as patched:
        patched.setattr(layers, "input_of_stand_in", lambda *_: None)
        return layer(x)


X = torch.randn(2, 3, 6, 5)

KNOWN: list[tuple[Callable[[], nn.Module], Tensor]] = [
    (lambda: nn.Linear(5, 4), X),
    (lambda: nn.Linear(5, 4, bias=False), X),
    (lambda: nn.Conv1d(3, 4, 3, dilation=2), X[..., 0]),
    (lambda: nn.Conv2d(3, 3, 3, stride=2, padding="valid", groups=3), X),
    (lambda: nn.Conv3d(2, 4, 2, padding=1), torch.randn(1, 2, 3, 4, 5)),
]


@pytest.mark.parametrize(("factory", "x"), KNOWN)
def test_outputs_and_gradients_are_those_of_an_intercepted_operator(
    factory: Callable[[], nn.Module],
    x: Tensor,
    interceptions: list[nn.Module],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = make(factory())
    results = [run(layer, x, call) for call in (layer, lambda x: layer(input=x))]
    assert not interceptions
    results.append(run(layer, x, lambda x: intercepted(layer, x, monkeypatch)))
    assert interceptions == [layer]
    for result in results[:2]:
        assert all(map(torch.equal, result, results[2]))


def run(layer: Any, x: Tensor, call: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Output, and the gradients of input and parameters."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    output = call(x)
    (output * torch.linspace(-1, 1, output.numel()).reshape(output.shape)).sum().backward()
    return [output, x.grad, *(p.grad.clone() for p in layer.parameters())]


def test_hooks_see_the_latent_weight() -> None:
    layer, seen = conv(), []
    latent = layer.weight

    def look(module: Any, *_: Any) -> None:
        seen.append(module.weight)

    layer.register_forward_pre_hook(look)
    layer.register_forward_hook(look)
    # Inside the call, too, while the quantized weight is in use.
    layer.output_observers._active.append(lambda _: look(layer))
    layer(X)
    assert len(seen) == 3
    assert all(weight is latent for weight in seen)


def test_a_call_inside_the_call_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, inner = conv(), []
    expected = layer(X)
    lower = copy.deepcopy(layer)
    lower.switch(Bits(2, 8))
    expected_inside = lower(X)
    original = F.conv2d

    def conv2d(*args: Any, **kwargs: Any) -> Tensor:
        if not inner:
            inner.append(None)
            layer.switch(Bits(2, 8))
            inner[0] = layer(X)
            layer.switch(Bits(4, 3))
        return original(*args, **kwargs)

    monkeypatch.setattr(F, "conv2d", conv2d)
    assert torch.equal(layer(X), expected)
    assert torch.equal(inner[0], expected_inside)


def test_two_threads_use_one_layer_at_two_precisions(
    net: anyprec.ConvertedModel, images: Tensor
) -> None:
    net.eval()
    views = {bits: net.view(bits) for bits in (2, 8)}
    expected = {bits: view(images) for bits, view in views.items()}
    right: list[bool] = []

    def serve(bits: int) -> None:
        right.extend(torch.equal(views[bits](images), expected[bits]) for _ in range(10))

    threads = [threading.Thread(target=serve, args=(bits,)) for bits in views]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == 20 * [True]


def test_an_outer_mode_sees_the_operator_once_with_the_quantized_weight() -> None:
    layer = conv()
    with Calls() as calls:
        layer(X)
    assert len(calls.weights) == 1
    codes = calls.weights[0] / layer.weight_quantizer.step[1].reshape(-1, 1, 1, 1)
    torch.testing.assert_close(codes, codes.round())


def test_observers_see_operands_and_outputs() -> None:
    layer, operands, outputs = conv(), [], []
    with (
        layer.operand_observers.including(lambda *pair: operands.append(pair)),
        layer.output_observers.including(outputs.append),
    ):
        output = layer(X)
    assert operands[0][0] is X
    assert operands[0][1] is layer.weight
    assert outputs == [output]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
        Shifting(3, 4, 3),
        nn.ConvTranspose2d(3, 4, 3),
    ],
)
def test_other_forwards_are_intercepted(layer: nn.Module, interceptions: list[nn.Module]) -> None:
    quantized = make(copy.deepcopy(layer))
    quantized(X)
    assert interceptions == [quantized]


def test_a_weight_that_is_a_property_is_intercepted(interceptions: list[nn.Module]) -> None:
    layer = conv()
    expected = layer(X)
    assert not interceptions
    # As if its class had been this one: what multiplies the input is twice the parameter.
    layer.__class__ = type("QuantizedMasked", (type(layer), Masked), {"weight": Masked.weight})
    layer(X)
    assert interceptions == [layer]
    assert not torch.equal(layer(X), expected)


def test_a_weight_parametrized_after_conversion_is_intercepted(
    interceptions: list[nn.Module],
) -> None:
    layer = conv()
    doubled = copy.deepcopy(layer)
    with torch.no_grad():
        doubled.weight.mul_(2)
    parametrize.register_parametrization(layer, "weight", Doubling())
    assert torch.equal(layer(X), doubled(X))
    assert interceptions == [layer]


def test_a_pruned_weight_is_intercepted(interceptions: list[nn.Module]) -> None:
    layer = conv()
    prune.random_unstructured(layer, "weight", amount=0.5)
    layer(X)
    assert interceptions == [layer]


def test_a_bias_parametrized_after_conversion_is_used() -> None:
    layer = conv()
    doubled = copy.deepcopy(layer)
    with torch.no_grad():
        doubled.bias.mul_(2)
    parametrize.register_parametrization(layer, "bias", Doubling())
    assert torch.equal(layer(X), doubled(X))


def test_a_forward_of_the_object_itself_is_called() -> None:
    layer = conv()
    expected, original = layer(X), layer.forward
    layer.forward = lambda x: 2 * original(x)
    assert torch.equal(layer(X), 2 * expected)


def test_an_inner_forward_of_the_object_itself_is_called(interceptions: list[nn.Module]) -> None:
    layer = conv()
    layer._conv_forward = lambda x, weight, bias: F.conv2d(x + 1, weight, bias)
    layer(X)
    assert interceptions == [layer]


def test_a_patched_forward_of_torchs_class_is_intercepted(
    interceptions: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = conv()
    original = nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: original(self, x) + self.bias.sum())
    layer(X)
    assert interceptions == [layer]


@pytest.mark.parametrize(
    "call",
    [
        lambda layer: layer(X[:, :2]),
        lambda layer: layer(X, X),
        lambda layer: layer(),
        lambda layer: layer(x=X),
        lambda layer: layer("image"),
        lambda layer: layer(X.to(torch.uint8)),
        lambda layer: layer(X[0, 0, 0]),
    ],
)
def test_a_wrong_call_raises_what_the_float_layer_raises(call: Callable[[Any], Any]) -> None:
    with pytest.raises((TypeError, RuntimeError)) as expected:
        call(nn.Conv2d(3, 4, 3, padding=1))
    with pytest.raises(expected.type) as raised:
        call(conv())
    # The message may show values.
    assert str(raised.value)[:60] == str(expected.value)[:60]


def test_a_tensor_of_another_class_is_intercepted(interceptions: list[nn.Module]) -> None:
    class Special(Tensor):
        pass

    layer = conv()
    output = layer(X.as_subclass(Special))
    assert type(output) is Special
    assert interceptions == [layer]


def test_a_weight_of_another_class_is_intercepted(interceptions: list[nn.Module]) -> None:
    class Special(Tensor):
        pass

    layer = conv()
    expected = layer(X)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Special))
    assert torch.equal(layer(X).as_subclass(Tensor), expected)
    assert interceptions == [layer]


def test_a_replica_of_data_parallel_is_intercepted(interceptions: list[nn.Module]) -> None:
    layer = conv()
    replica = layer._replicate_for_data_parallel()
    replica.weight, replica.bias = layer.weight.detach(), layer.bias.detach()
    assert torch.equal(replica(X), layer(X))
    assert interceptions == [replica]


def test_weights_swapped_for_a_functional_call_are_used() -> None:
    layer = conv()
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight.mul_(2)
    values = {"weight": other.weight.detach()}
    assert torch.equal(torch.func.functional_call(layer, values, (X,)), other(X))


def test_autocast_is_that_of_an_intercepted_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = conv()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(X)
        assert output.dtype == torch.bfloat16
        assert torch.equal(output, intercepted(layer, X, monkeypatch))


def test_a_bias_of_another_dtype_is_refused_as_before() -> None:
    layer = conv()
    layer.bias.data = layer.bias.data.double()
    with pytest.raises(RuntimeError, match="type"):
        layer(X)


def test_float_mode_needs_no_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = conv()
    layer.switch(None)
    monkeypatch.setattr(layers, "stand_in_for", None)
    assert torch.equal(layer(X), F.conv2d(X, layer.weight, layer.bias, padding=1))
    assert isinstance(layer, QuantizedModule)

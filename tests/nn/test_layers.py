"""Quantized layers against the operator called by hand on fake-quantized operands."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from timm.layers import Conv2dSame, ScaledStdConv2d, StdConv2d
from torch import Tensor, nn
from torch.nn import functional as F

from anyprec.bits import Bits, LayerCandidates
from anyprec.nn.functional import fake_quantize
from anyprec.nn.layers import QuantizedLayer, quantize_layer, restore_layer
from anyprec.nn.operators import channel_axis

CANDIDATES = LayerCandidates((2, 4, 8), (3, 8))

LAYERS: list[tuple[Any, tuple[int, ...]]] = [
    (lambda: nn.Linear(6, 5), (4, 6)),
    (lambda: nn.Linear(6, 5, bias=False), (4, 3, 6)),
    (lambda: nn.Conv1d(4, 6, 3, dilation=2), (2, 4, 12)),
    (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9, 7)),
    (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 9, 7)),
    (lambda: nn.Conv3d(2, 3, 2), (2, 2, 4, 4, 4)),
    (lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 8)),
    (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, output_padding=1), (2, 4, 5, 5)),
    (lambda: nn.ConvTranspose3d(2, 3, 2), (2, 2, 3, 3, 3)),
    (lambda: Conv2dSame(4, 6, 3, stride=2), (2, 4, 9, 9)),
    (lambda: StdConv2d(4, 6, 3, padding=1), (2, 4, 9, 9)),
    (lambda: ScaledStdConv2d(4, 6, 3, padding=1), (2, 4, 9, 9)),
]


def make(
    factory: Any, shape: tuple[int, ...], *, per_channel: bool = True
) -> tuple[QuantizedLayer, nn.Module, Tensor]:
    layer = factory()
    original = copy.deepcopy(layer)
    quantize_layer(
        layer, CANDIDATES, nonnegative=False, axis=channel_axis(layer) if per_channel else None
    )
    layer.input_quantizer.set_grid(torch.tensor([0.4, 0.02]), torch.tensor([3, 100]))
    return layer, original, torch.randn(shape)


@pytest.mark.parametrize(("factory", "shape"), LAYERS)
def test_float_mode_is_the_original_layer_bit_for_bit(factory: Any, shape: tuple[int, ...]) -> None:
    layer, original, x = make(factory, shape)
    assert torch.equal(layer(x), original(x))
    assert isinstance(layer, type(original))
    assert list(dict(layer.named_parameters(recurse=False))) == list(
        dict(original.named_parameters())
    )


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(("factory", "shape"), LAYERS)
def test_output_is_the_float_layer_with_quantized_operands(
    factory: Any, shape: tuple[int, ...], per_channel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, original, x = make(factory, shape, per_channel=per_channel)
    layer.switch(Bits(4, 3))
    found = layer(x)

    def by_hand(operator: Any) -> Any:
        def run(input_: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            axis = (
                (1 if isinstance(original, nn.modules.conv._ConvTransposeNd) else 0)
                if per_channel
                else None
            )
            step = layer.weight_quantizer.step[1]
            quantized = fake_quantize(weight, step, qmin=-8, qmax=7, axis=axis)
            return operator(
                fake_quantize(input_, torch.tensor(0.4), qmin=-3, qmax=4),
                quantized,
                *args,
                **kwargs,
            )

        return run

    names = (
        "linear",
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
    )
    for name in names:
        monkeypatch.setattr(F, name, by_hand(getattr(F, name)))
    expected = original(x)
    monkeypatch.undo()
    assert torch.equal(found, expected)
    assert not torch.equal(found, original(x))


def test_a_standardised_weight_is_quantized_after_it_was_standardised() -> None:
    layer, _, x = make(lambda: StdConv2d(4, 6, 3, padding=1), (2, 4, 9, 9))
    layer.weight_quantizer.step.data.fill_(0.5)
    layer.switch(Bits(2, 8))
    seen: list[Tensor] = []
    real = layer.weight_quantizer.forward
    layer.weight_quantizer.forward = lambda weight, index: (
        seen.append(weight) or real(weight, index)
    )
    layer(x)
    torch.testing.assert_close(seen[0].mean(dim=(1, 2, 3)), torch.zeros(6), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("factory", "shape"), LAYERS)
def test_a_backward_pass_reaches_weight_input_and_both_steps(
    factory: Any, shape: tuple[int, ...]
) -> None:
    layer, _, x = make(factory, shape)
    layer.switch(CANDIDATES.lowest)
    x.requires_grad_()
    layer(x).square().sum().backward()
    for tensor in (x, layer.weight, layer.weight_quantizer.step, layer.input_quantizer.step):
        assert tensor.grad.any()
    assert layer.weight_quantizer.step.grad[1:].count_nonzero() == 0


def test_quantized_weights_are_computed_once_in_eval_mode_until_the_weight_changes() -> None:
    layer, _, x = make(lambda: nn.Linear(6, 5), (4, 6))
    layer.eval()
    layer.switch(Bits(4, 8))
    calls: list[int] = []
    real = layer.weight_quantizer.forward
    layer.weight_quantizer.forward = lambda weight, index: (
        calls.append(index) or real(weight, index)
    )
    with torch.no_grad():
        first = layer(x)
        assert torch.equal(layer(x), first)
        layer.switch(Bits(8, 8))
        layer(x)
        layer.switch(Bits(4, 8))
        assert torch.equal(layer(x), first)
        assert calls == [1, 2]
        layer.weight.mul_(1.5)
        assert not torch.equal(layer(x), first)
        layer.weight_quantizer.step.mul_(1.1)
        layer(x)
        assert calls == [1, 2, 1, 1]
    layer(x)  # with gradients nothing is reused
    assert calls == [1, 2, 1, 1, 1]
    layer.train()
    layer.eval()
    with torch.no_grad():
        layer(x)
    assert calls == [1, 2, 1, 1, 1, 1]


def test_a_weight_kept_under_inference_mode_still_takes_gradients_later() -> None:
    layer, _, x = make(lambda: nn.Linear(6, 5), (4, 6))
    layer.eval().requires_grad_(False)
    layer.switch(Bits(4, 8))
    with torch.inference_mode():
        layer(x)
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad.any()


def test_switching_there_and_back_gives_the_first_output_exactly() -> None:
    layer, _, x = make(lambda: nn.Linear(6, 5), (4, 6))
    layer.switch(Bits(4, 8))
    first = layer(x)
    layer.switch(Bits(2, 3))
    assert not torch.equal(layer(x), first)
    layer.switch(Bits(4, 8))
    assert torch.equal(layer(x), first)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_behave_alike_and_are_independent(again: Any) -> None:
    layer, _, x = make(lambda: Conv2dSame(4, 6, 3), (2, 4, 9, 9))
    layer.eval()
    layer.switch(Bits(4, 3))
    with torch.no_grad():
        expected = layer(x)
        other = again(layer)
        assert type(other) is type(layer)
        assert torch.equal(other(x), expected)
        other.weight.zero_()
        other.switch(Bits(2, 3))
        assert torch.equal(layer(x), expected)


def test_restoring_gives_the_float_layer_back() -> None:
    layer, original, x = make(lambda: nn.Linear(6, 5), (4, 6))
    layer.switch(Bits(2, 3))
    restore_layer(layer)
    assert type(layer) is nn.Linear
    assert list(layer.state_dict()) == list(original.state_dict())
    assert torch.equal(layer(x), original(x))


@pytest.mark.parametrize("per_channel", [True, False])
def test_a_view_of_the_weight_is_quantized_as_part_of_the_whole(per_channel: bool) -> None:
    layer, _, _ = make(lambda: nn.Linear(6, 5), (4, 6), per_channel=per_channel)
    layer.switch(Bits(2, 8))
    whole = layer.quantized_operand(layer.weight)
    assert torch.equal(layer.quantized_operand(layer.weight[3:]), whole[3:])
    assert torch.equal(layer.quantized_operand(layer.weight[1:4].t()), whole[1:4].t())
    layer.quantized_operand(layer.weight[3:]).sum().backward()
    assert layer.weight_quantizer.step.grad[0].any()

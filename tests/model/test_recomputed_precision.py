"""Layers that run again in a backward pass: at the precision of their forward pass."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import anyprec
from anyprec.errors import PrecisionError
from anyprec.nn import backward

Gradients = dict[str, Tensor]


class Checkpointed(nn.Module):
    """A network whose middle runs again in the backward pass, if wanted, nested or not.

    Attributes:
        reentrant: The kind of checkpointing; None is none.
        nested: A part of the middle is a checkpoint of its own.
    """

    reentrant: bool | None = None
    nested = False

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.first = nn.Sequential(
            nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 1)
        )
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.last = nn.Linear(6, 4)

    def run(self, part: Callable[..., Tensor], x: Tensor) -> Tensor:
        if self.reentrant is None:
            return part(x)
        return checkpoint(part, x, use_reentrant=self.reentrant)

    def attend(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0].tanh()

    def middle(self, x: Tensor) -> Tensor:
        x = (self.run(self.first, x) if self.nested else self.first(x)).sigmoid()
        return self.attend(x.flatten(2).transpose(1, 2))

    def features(self, x: Tensor) -> Tensor:
        return self.run(self.middle, torch.relu(self.stem(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.features(x).mean(1))


@pytest.fixture
def make(images: Tensor) -> Callable[..., anyprec.ConvertedModel]:
    def build(
        reentrant: bool | None, network: type[nn.Module] = Checkpointed, norm: str = "shared-affine"
    ) -> anyprec.ConvertedModel:
        torch.manual_seed(0)
        net = network()
        model = anyprec.convert(net, bits=(2, 4, 8), example_input=images[:1], norm=norm)
        anyprec.calibrate(model, [images])
        # Not before, since the graph hides what is inside of a checkpoint.
        model.reentrant = reentrant
        return model.train()

    return build


def gradients(model: nn.Module) -> Gradients:
    named = model.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def assert_same(actual: Gradients, expected: Gradients) -> None:
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        # Sums of the same gradients, perhaps in another order.
        torch.testing.assert_close(actual[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def one_by_one(model: anyprec.ConvertedModel, images: Tensor, widths: tuple[int, ...]) -> Gradients:
    model.zero_grad()
    for bits in widths:
        model.set_bits(bits)
        model(images).square().sum().backward()
    return gradients(model)


def together(model: anyprec.ConvertedModel, images: Tensor, widths: tuple[int, ...]) -> Gradients:
    model.zero_grad()
    losses = []
    for bits in widths:
        model.set_bits(bits)
        losses.append(model(images).square().sum())
    torch.stack(losses).sum().backward()
    return gradients(model)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("norm", ["shared-affine", "per-pair", "shared"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_are_those_without_checkpointing(
    reentrant: bool, norm: str, nested: bool, make: Callable[..., Any], images: Tensor
) -> None:
    expected = one_by_one(make(None, norm=norm), images, (8, 2, 4))
    model = make(reentrant, norm=norm)
    model.nested = nested
    assert_same(one_by_one(model, images, (8, 2, 4)), expected)
    assert_same(together(model, images, (8, 2, 4)), expected)
    assert model.bits == model.resolve_bits(4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_floating_point_and_mixed_configurations_are_followed_too(
    reentrant: bool, make: Callable[..., Any], images: Tensor
) -> None:
    paths = (None, {"first.0": 2, "first.3": (4, 2)}, (4, 8))
    expected = one_by_one(make(None), images, paths)
    assert_same(together(make(reentrant), images, paths), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_precision_of_a_left_block_is_followed(
    reentrant: bool, make: Callable[..., Any], images: Tensor
) -> None:
    expected = one_by_one(make(None), images, (2,))
    model = make(reentrant)
    model.set_bits(8)
    with model.using_bits(2):
        loss = model(images).square().sum()
    loss.backward()
    assert_same(gradients(model), expected)
    assert model.bits == model.resolve_bits(8)


@pytest.mark.parametrize("reentrant", [False, True])
def test_parts_that_are_called_without_the_network_are_followed(
    reentrant: bool, make: Callable[..., Any], images: Tensor
) -> None:
    def run(model: anyprec.ConvertedModel) -> Gradients:
        losses = []
        for bits in (2, 8):
            model.set_bits(bits)
            losses.append(model.features(images).square().sum())
        torch.stack(losses).sum().backward()
        return gradients(model)

    assert_same(run(make(reentrant)), run(make(None)))


def test_a_loss_on_features_alone_beside_one_on_the_output(
    make: Callable[..., Any], images: Tensor
) -> None:
    def run(model: anyprec.ConvertedModel) -> Gradients:
        seen: list[Tensor] = []
        model.attention.register_forward_hook(lambda _module, _args, out: seen.append(out[0]))
        model.set_bits(2)
        model(images)
        model.set_bits(8)
        output = model(images)
        (seen[0].square().sum() + output.square().sum()).backward()
        return gradients(model)

    assert_same(run(make(False)), run(make(None)))


def test_two_backward_passes_of_one_graph_and_selected_inputs(
    make: Callable[..., Any], images: Tensor
) -> None:
    def run(model: anyprec.ConvertedModel) -> Gradients:
        model.set_bits(2)
        first = model(images).square().sum()
        model.set_bits(8)
        second = model(images).square().sum()
        model.set_bits(4)
        first.backward(retain_graph=True)
        (first + second).backward()
        weight = model.first[0].weight
        model.set_bits(2)
        third = model(images).square().sum()
        model.set_bits(8)
        (selected,) = torch.autograd.grad(third, [weight])
        return {**gradients(model), "selected": selected}

    assert_same(run(make(False)), run(make(None)))


@pytest.mark.parametrize("kind", ["dict", "tuple", "dataclass"])
def test_any_kind_of_output(kind: str, make: Callable[..., Any], images: Tensor) -> None:
    @dataclass
    class Output:
        first: Tensor
        rest: tuple[Tensor, ...]

    class Several(Checkpointed):
        def forward(self, x: Tensor) -> Any:
            features = self.features(x)
            logits = self.last(features.mean(1))
            if kind == "dict":
                return {"first": logits, "rest": [features]}
            return (logits, [features]) if kind == "tuple" else Output(logits, (features,))

    def run(model: anyprec.ConvertedModel) -> Gradients:
        total = torch.zeros(())
        for bits in (8, 2):
            model.set_bits(bits)
            output = model(images)
            if isinstance(output, Output):
                output = output.first, output.rest
            first, rest = output.values() if isinstance(output, dict) else output
            total = total + first.square().sum() + rest[0].sum()
        total.backward()
        return gradients(model)

    assert_same(run(make(False, Several)), run(make(None, Several)))


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_whole_network_as_one_checkpoint(
    reentrant: bool, make: Callable[..., Any], images: Tensor
) -> None:
    expected = one_by_one(make(None), images, (8, 2))
    model, total = make(None), torch.zeros(())
    for bits in (8, 2):
        model.set_bits(bits)
        x = images.clone().requires_grad_()
        total = total + checkpoint(model, x, use_reentrant=reentrant).square().sum()
    total.backward()
    assert_same(gradients(model), expected)


def test_a_frozen_stem_and_evaluation_mode(make: Callable[..., Any], images: Tensor) -> None:
    def run(model: anyprec.ConvertedModel) -> Gradients:
        model.eval().stem.requires_grad_(False)
        return together(model, images, (2, 8))

    assert_same(run(make(False)), run(make(None)))


def test_norm_statistics_go_into_the_copy_of_the_forward_pass(
    make: Callable[..., Any], images: Tensor
) -> None:
    model = make(False)
    bank = model.first[1].bank
    model.set_bits(2)
    before = bank.running_mean.clone()
    row = model.first[1].row
    loss = model(images).sum()
    model.set_bits(8)
    loss.backward()
    moved = (bank.running_mean != before).any(dim=1).nonzero().flatten()
    assert moved.tolist() == [row]


def test_norms_alone_in_a_checkpoint(images: Tensor) -> None:
    class NormAgain(nn.Module):
        again = False

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            x = checkpoint(self.norm, x, use_reentrant=True) if self.again else self.norm(x)
            return self.fc(x.relu().mean((2, 3)))

    def run(*, again: bool) -> Gradients:
        torch.manual_seed(0)
        model = anyprec.convert(
            NormAgain(), bits=(2, 8), first_last_bits=None, norm="per-pair", example_input=images
        )
        anyprec.calibrate(model, [images])
        model.train().again = again
        return together(model, images, (2, 8))

    assert_same(run(again=True), run(again=False))


def test_after_an_error_in_the_backward_pass_the_precision_is_back(
    make: Callable[..., Any], images: Tensor
) -> None:
    def fail(_gradient: Tensor) -> None:
        raise RuntimeError("on the way")

    model = make(False)
    model.set_bits(2)
    x = images.clone().requires_grad_()
    x.register_hook(fail)
    loss = model(x).sum()
    model.set_bits(8)
    with pytest.raises(RuntimeError, match="on the way"):
        loss.backward()
    assert model.bits == model.resolve_bits(8)
    model.set_bits(4)
    assert_same(
        one_by_one(model, images, (2,)),
        one_by_one(copy.deepcopy(model), images, (2,)),
    )


def test_without_switching_a_backward_pass_switches_nothing(
    make: Callable[..., Any], images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(True)
    model.set_bits(2)
    loss = model(images).sum()

    def refuse(*_arguments: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("anyprec.model.precision.switch", refuse)
    loss.backward()


def test_set_bits_inside_a_backward_pass_is_refused_but_a_block_is_not(
    make: Callable[..., Any], images: Tensor
) -> None:
    model = make(None)
    model.set_bits(2)
    outputs = []

    def in_a_block(_gradient: Tensor) -> None:
        with torch.no_grad(), model.using_bits(8):
            outputs.append(model(images))

    # A node of this precision, which a layer would follow without the block.
    x = images.clone().requires_grad_() * 1
    x.register_hook(in_a_block)
    model.eval()(x).sum().backward()
    model.set_bits(8)
    assert torch.equal(outputs[0], model(images))
    x = images.clone().requires_grad_() * 1
    x.register_hook(lambda _gradient: model.set_bits(4))
    with pytest.raises(PrecisionError, match=r"set_bits inside a backward pass.*using_bits"):
        model(x).sum().backward()
    assert model.bits == model.resolve_bits(8)


def test_forgotten_precisions_are_refused(make: Callable[..., Any], images: Tensor) -> None:
    model = make(False)
    model.set_bits(2)
    loss = model(images).sum()
    for number in range(200):
        model.set_bits((4, 8)[number % 2])
        model.stem.weight.sum()  # a node of the graph for each
    with pytest.raises(PrecisionError, match="more than 128 switches ago"):
        loss.backward()


def test_forward_passes_of_threads_at_other_precisions_are_refused_and_in_one_thread_right(
    make: Callable[..., Any], images: Tensor
) -> None:
    expected = one_by_one(make(None), images, (2, 8))
    model = make(False)
    model.set_bits(4)
    # Nodes of this thread, so that numbers of both threads overlap.
    [model.stem.weight.sum() for _ in range(1000)]

    def in_thread(work: Callable[[], Any]) -> Any:
        results: list[Any] = []
        thread = threading.Thread(target=lambda: results.append(work()))
        thread.start()
        thread.join()
        return results[0]

    assert_same(in_thread(lambda: together(model, images, (2, 8))), expected)

    def forward() -> Tensor:
        model.set_bits(2)
        return model(images).sum()

    losses = [in_thread(forward)]
    model.set_bits(8)
    losses.append(model(images).sum())
    with pytest.raises(PrecisionError, match="forward passes of several threads"):
        torch.stack(losses).sum().backward()


def test_layers_that_run_again_on_several_devices_at_several_precisions_are_refused(
    make: Callable[..., Any], images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(False)
    total = torch.zeros(())
    for bits in (2, 8):
        model.set_bits(bits)
        total = total + model(images).sum()
    # A second device has a second thread, which a CPU cannot show.
    threads = iter(range(1000))
    monkeypatch.setattr("anyprec.model.precision.threading.get_ident", lambda: next(threads))
    with pytest.raises(PrecisionError, match="on several devices"):
        total.backward()


def test_torch_has_the_names_that_are_private() -> None:
    assert not backward.in_backward()
    before = backward.next_node_number()
    inside = []

    def note(_gradient: Tensor) -> None:
        inside.append((backward.in_backward(), backward.running_node_number()))

    x = torch.ones(1, requires_grad=True)
    y = x * 2
    y.register_hook(note)
    y.sum().backward()
    assert inside == [(True, before)]

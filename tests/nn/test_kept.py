"""Quantized weights that are kept in eval mode follow their weight, however that is written."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import anyprec
from anyprec.nn.kept import Values, is_comparable
from anyprec.nn.layers import QuantizedLayer


def make_model() -> anyprec.ConvertedModel:
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 6, 3, groups=6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4),
    ).eval()  # fmt: skip
    images = torch.randn(4, 3, 8, 8)
    model = anyprec.convert(net, bits=(2, 4, 8), first_last_bits=None, example_input=images[:1])
    anyprec.calibrate(model, [images])
    model.set_bits((4, 8))
    return model


@pytest.fixture
def model() -> anyprec.ConvertedModel:
    return make_model()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 8, 8)


def replace_data(weight: Tensor) -> None:
    weight.data = weight.data * 1.5


def replace_data_twice(weight: Tensor) -> None:
    """The second tensor may lie where the first one did."""
    weight.data = weight.data * 1.5
    weight.data = weight.data * 1.1


def exchange_two(weight: Tensor) -> None:
    flat = weight.data.view(-1)
    flat[:2] = flat[:2].flip(0)


def reverse_rows(weight: Tensor) -> None:
    weight.data.copy_(weight.data.flip(0))


def write_a_row_in_numpy(weight: Tensor) -> None:
    weight.detach().numpy()[-1] *= -1


def zero_by_dlpack(weight: Tensor) -> None:
    torch.from_dlpack(weight.detach()).data.mul_(0.5)


def foreach(weight: Tensor) -> None:
    torch._foreach_mul_([weight.data], 1.3)


def by_storage(weight: Tensor) -> None:
    torch.empty(0).set_(weight.untyped_storage(), 0, weight.shape).mul_(1.3)


WAYS: list[Callable[[Tensor], Any]] = [
    lambda weight: weight.data.mul_(1.5),
    lambda weight: weight.data.neg_(),
    lambda weight: weight.data.view(-1)[3].fill_(2.0),
    replace_data,
    replace_data_twice,
    exchange_two,
    reverse_rows,
    write_a_row_in_numpy,
    zero_by_dlpack,
    foreach,
    by_storage,
]


@pytest.mark.parametrize("path", ["0", "3", "6"])
@pytest.mark.parametrize("write", WAYS)
def test_a_weight_written_behind_torchs_back_is_quantized_anew(
    model: anyprec.ConvertedModel, images: Tensor, path: str, write: Callable[[Tensor], Any]
) -> None:
    with torch.no_grad():
        before = model(images)
        write(model.quantized_layers[path].weight)
        after = model(images)
        assert torch.equal(after, copy.deepcopy(model)(images))
    assert not torch.equal(after, before)


@pytest.mark.parametrize("of_input", [True, False])
def test_a_step_size_written_behind_torchs_back_counts(
    model: anyprec.ConvertedModel, images: Tensor, of_input: bool
) -> None:
    layer = model.quantized_layers["3"]
    step = layer.input_quantizer.step if of_input else layer.weight_quantizer.step
    with torch.inference_mode():
        before = model(images)
        step.data.mul_(1.7)
        after = model(images)
        assert torch.equal(after, copy.deepcopy(model)(images))
    assert not torch.equal(after, before)


def test_a_moving_average_by_hand_is_evaluated_with_its_present_weights(
    model: anyprec.ConvertedModel, images: Tensor
) -> None:
    average = copy.deepcopy(model)
    for _ in range(3):
        moved = parameters_to_vector(model.parameters()) * 1.01
        vector_to_parameters(moved.detach(), model.parameters())
        for ours, theirs in zip(average.parameters(), model.parameters(), strict=True):
            ours.data.mul_(0.5).add_(theirs.data, alpha=0.5)
        with torch.no_grad():
            assert torch.equal(average(images), copy.deepcopy(average)(images))


def test_what_is_kept_does_not_depend_on_autocast(
    model: anyprec.ConvertedModel, images: Tensor
) -> None:
    """Compared in bfloat16, a change of this size would not be seen."""
    weight = model.quantized_layers["6"].weight
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(images)
        kept = model.quantized_layers["6"].weight_source._cache
        values = kept[next(iter(kept))].values
        weight.data.view(-1)[0] += 1e-4
        assert not values.are_of(weight)


@pytest.mark.parametrize(
    "weight",
    [
        torch.randn(5, 4, 3, 3).to(memory_format=torch.channels_last),
        torch.randn(4, 6).t(),
        torch.randn(8, 6)[::2],
        torch.randn(7),
        torch.randn(3, 4, dtype=torch.float64),
    ],
)
def test_every_element_of_every_layout_counts(weight: Tensor) -> None:
    step = torch.ones(1)
    values = Values.of(weight, step)
    assert values.are_of(weight)
    for index in range(weight.numel()):
        changed = weight.clone(memory_format=torch.preserve_format)
        changed[torch.unravel_index(torch.tensor(index), weight.shape)] += 1e-3
        assert not values.are_of(changed)
    with torch.no_grad():
        weight.data[-1] += 1e-3
    assert not values.are_of(weight)
    weight.data[-1] -= 1e-3
    step += 1
    assert not values.are_of(weight)


def test_weights_whose_values_are_dear_to_compare_are_not_kept(images: Tensor) -> None:
    assert is_comparable(torch.ones(2, 2))
    for weight in (torch.ones(2, 2).half(), torch.ones(2, 2, device="meta"), torch.ones(0, 2)):
        assert not is_comparable(weight)
    model = make_model().to(torch.bfloat16)
    layer = model.quantized_layers["3"]
    layer.weight_source.forget()
    with torch.no_grad():
        model(images.bfloat16())
        assert not layer.weight_source._cache
        anyprec.trust_weights(model)
        model(images.bfloat16())
        assert layer.weight_source._cache


def counted(layer: QuantizedLayer) -> list[int]:
    """Indices of the candidates that a layer's weight is quantized at, from now on."""
    calls: list[int] = []
    real = layer.weight_quantizer.forward
    layer.weight_quantizer.forward = lambda weight, index: (
        calls.append(index) or real(weight, index)
    )
    return calls


def test_trust_compares_nothing_and_ends_with_it(
    model: anyprec.ConvertedModel, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = model.quantized_layers["3"]
    anyprec.trust_weights(model)
    calls = counted(layer)
    with torch.no_grad():
        first = model(images)
        with monkeypatch.context() as patched:
            patched.setattr(Values, "are_of", None)
            assert torch.equal(model(images), first)
        layer.weight.data.mul_(1.5)
        assert torch.equal(model(images), first)
        assert len(calls) == 1
        layer.weight.mul_(1.1)  # on torch's record
        assert not torch.equal(model(images), first)
        for trusted in (True, False):
            layer.weight.data.mul_(1.3)
            anyprec.trust_weights(model, trusted=trusted)
            assert torch.equal(model(images), copy.deepcopy(model)(images))


def test_a_copy_of_a_trusted_network_is_not_trusted(
    model: anyprec.ConvertedModel, images: Tensor
) -> None:
    anyprec.trust_weights(model)
    average = copy.deepcopy(model)
    with torch.no_grad():
        average(images)
        average.quantized_layers["3"].weight.data.mul_(1.5)
        assert torch.equal(average(images), copy.deepcopy(average)(images))


def test_trust_takes_a_converted_network() -> None:
    with pytest.raises(anyprec.ConversionError, match="trust_weights"):
        anyprec.trust_weights(nn.Linear(2, 2))


@pytest.mark.parametrize("trusted", [False, True])
def test_threads_that_share_what_is_kept_get_their_own_candidates(trusted: bool) -> None:
    layer = make_model().quantized_layers["6"]
    source, quantizer, weight = layer.weight_source, layer.weight_quantizer, layer.weight.detach()
    expected = [source.compute(quantizer, weight, index).detach() for index in range(3)]
    source.trusted = trusted
    wrong: list[int] = []

    class View:
        """What the source needs of a layer, with a candidate of its own."""

        def __init__(self, index: int) -> None:
            self.training = False
            self._parameters = {"weight": weight}
            self.weight_quantizer = quantizer
            self.weight_index = index

        def weight_tensors(self) -> list[Tensor]:
            return [weight]

    def serve(index: int) -> None:
        view: Any = View(index)
        with torch.no_grad():
            for turn in range(60):
                together.wait(timeout=60)
                if turn % 20 == index:
                    source.forget()
                if not torch.equal(source.quantized(view, weight), expected[index]):
                    wrong.append(index)

    together = threading.Barrier(3)
    threads = [threading.Thread(target=serve, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong

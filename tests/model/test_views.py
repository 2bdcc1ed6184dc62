"""Views: one set of weights in several model objects, each at its own precision."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import anyprec
from anyprec.errors import BitsError, ConversionError, NotCalibratedError, PackedError
from anyprec.nn.layers import QuantizedLayer

Make = Callable[..., anyprec.ConvertedModel]


class Recurrent(nn.Module):
    """An LSTM, which keeps a list of its parameters besides."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 8, batch_first=True)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.lstm(x)[0][:, -1])


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def recurrent() -> tuple[anyprec.ConvertedModel, Tensor]:
    x = torch.randn(4, 5, 6)
    model = anyprec.convert(Recurrent().eval(), bits=(2, 4, 8), example_input=x)
    anyprec.calibrate(model, [x])
    return model, x


def transformer(converted: Make) -> tuple[anyprec.ConvertedModel, Tensor]:
    model = converted("test_vit", size=160)
    return model, torch.randn(2, 3, 160, 160)


def encoder() -> tuple[anyprec.ConvertedModel, Tensor]:
    x = torch.randn(2, 4, 8)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    network = nn.Sequential(layer, nn.Linear(8, 3)).eval()
    model = anyprec.convert(network, bits=(2, 4, 8), example_input=x)
    anyprec.calibrate(model, [x])
    return model, x


@pytest.mark.parametrize("kind", ["net", "shared norms", "vit", "lstm", "encoder", "packed"])
def test_a_view_answers_as_the_network_does_at_that_precision(
    kind: str,
    net: anyprec.ConvertedModel,
    converted: Make,
    small_net: Callable[..., nn.Module],
    images: Tensor,
    tmp_path: Path,
) -> None:
    model, x = net, images
    if kind == "shared norms":
        network = small_net().eval()
        model = anyprec.convert(network, bits=(2, 4, 8), norm="shared", example_input=x)
        anyprec.calibrate(model, [x])
    elif kind == "vit":
        model, x = transformer(converted)
    elif kind == "lstm":
        model, x = recurrent()
    elif kind == "encoder":
        model, x = encoder()
    elif kind == "packed":
        anyprec.save(net, tmp_path / "net.safetensors", packed=True, rebuildable=False)
        model = anyprec.load(tmp_path / "net.safetensors", small_net().eval())
    expected = {}
    for bits in (2, 4, 8):
        model.set_bits(bits)
        expected[bits] = outputs(model, x)
    views = {bits: model.view(bits) for bits in (2, 4, 8)}
    model.set_bits(4)
    for bits, view in (*views.items(), *views.items()):
        assert torch.equal(outputs(view, x), expected[bits])
        assert torch.equal(outputs(model, x), expected[4])
    assert type(view) is type(model)
    assert model.bits == model.resolve_bits(4)


def test_a_view_shares_every_tensor_and_has_nothing_else_of_its_size(converted: Make) -> None:
    model = converted("test_resnet")
    view = model.view(2)
    for shared in ("named_parameters", "state_dict"):
        first, second = dict(getattr(model, shared)()), dict(getattr(view, shared)())
        assert first.keys() == second.keys()
        assert all(first[name].data_ptr() == second[name].data_ptr() for name in first)
    assert all(a is b for a, b in zip(model.parameters(), view.parameters(), strict=True))
    outputs(view, torch.randn(1, 3, 64, 64))
    known = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    model.set_bits(2)
    outputs(model, torch.randn(1, 3, 64, 64))
    for layer in model.quantized_layers.values():
        for kept in layer.weight_source._cache.values():
            known.add(kept.quantized.untyped_storage().data_ptr())
    gc.collect()
    own = 0
    for module in view.modules():
        held = [*module.buffers(recurse=False), *module.parameters(recurse=False)]
        if isinstance(module, QuantizedLayer):
            held += [kept.quantized for kept in module.weight_source._cache.values()]
        for tensor in held:
            if tensor.untyped_storage().data_ptr() not in known:
                own += tensor.numel()
    assert own < 0.01 * sum(parameter.numel() for parameter in model.parameters())


def test_views_run_in_threads_at_a_time(net: anyprec.ConvertedModel, images: Tensor) -> None:
    views = {bits: net.view(bits) for bits in (2, 4, 8, None)}
    expected = {bits: outputs(view, images) for bits, view in views.items()}

    def work(bits: int | None) -> bool:
        answers = [outputs(views[bits], images) for _ in range(30)]
        return all(torch.equal(answer, expected[bits]) for answer in answers)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, views))


def test_the_default_is_the_present_precision_and_none_is_floating_point(
    net: anyprec.ConvertedModel,
) -> None:
    net.set_bits((4, 8))
    assert net.view().bits == net.bits
    assert net.view(None).bits is None
    assert net.view("W2A8").view().bits == net.resolve_bits((2, 8))
    net.configs["mine"] = net.resolve_bits(3)
    assert net.view("mine").bits == net.configs["mine"]


def test_what_set_bits_refuses_view_refuses(
    net: anyprec.ConvertedModel, small_net: Callable[..., nn.Module], images: Tensor, tmp_path: Path
) -> None:
    with pytest.raises(BitsError, match="5 is not a candidate"):
        net.view(5)
    fresh = anyprec.convert(small_net(), example_input=images[:1])
    with pytest.raises(NotCalibratedError):
        fresh.view(4)
    anyprec.save(net, tmp_path / "net.safetensors", packed=True, rebuildable=False)
    packed = anyprec.load(tmp_path / "net.safetensors", small_net().eval())
    with pytest.raises(PackedError):
        packed.view(None)


def test_calibration_after_the_view_is_calibration_of_the_view(
    small_net: Callable[..., nn.Module], images: Tensor
) -> None:
    model = anyprec.convert(small_net().eval(), bits=(2, 4, 8), example_input=images[:1])
    first, second = model.view(), model.view()
    anyprec.calibrate(first, [images])
    for member in (first, second, model):
        member.set_bits(2)
    assert torch.equal(outputs(second, images), outputs(first, images))
    assert torch.equal(outputs(model, images), outputs(first, images))
    assert second.head.input_quantizer.kind == model.head.input_quantizer.kind == "affine"


def test_norm_statistics_of_either_serve_both(net: anyprec.ConvertedModel, images: Tensor) -> None:
    config = net.resolve_bits({"head": 2, "pointwise": (2, 4)})
    views = {request: net.view(request) for request in (2, config)}
    before = {request: outputs(view, images) for request, view in views.items()}
    for bits in (None, "all", config):
        if bits is not None:
            anyprec.update_norms(net, [images * 2], bits=bits)
        for request, view in views.items():
            with net.using_bits(request):
                assert torch.equal(outputs(view, images), outputs(net, images))
    assert not any(
        torch.equal(before[request], outputs(views[request], images)) for request in views
    )
    # Estimated through a view, which selects statistics of its own meanwhile.
    anyprec.update_norms(views[2], [images * 3], bits="all")
    with net.using_bits(2):
        assert torch.equal(outputs(views[2], images), outputs(net, images))
    fresh = copy.deepcopy(net)
    anyprec.update_norms(fresh, [images * 3], bits="all")
    with net.using_bits(2), fresh.using_bits(2):
        assert torch.equal(outputs(fresh, images), outputs(net, images))


def test_statistics_of_uniform_precisions_come_and_go_in_every_view(
    net: anyprec.ConvertedModel, images: Tensor
) -> None:
    view = net.view(2)
    net.set_bits(2)

    def answer() -> Tensor:
        # What the network chooses when its precision is set, which the view must have by itself.
        net.set_bits(2)
        expected = outputs(net, images)
        assert torch.equal(outputs(view, images), expected)
        return expected

    answers = [answer()]
    net.train()(images)
    net.eval()
    answers.append(answer())
    view.set_bits(2)  # while there are none
    anyprec.update_norms(net, [images], bits="all")
    answers.append(answer())
    assert len({answer.sum().item() for answer in answers}) == 3


def test_training_loading_and_replaced_tensors_reach_every_view(
    net: anyprec.ConvertedModel, small_net: Callable[..., nn.Module], images: Tensor
) -> None:
    view = net.view(4)
    net.set_bits(4)

    def agree() -> bool:
        return torch.equal(outputs(view, images), outputs(net, images))

    before = outputs(view, images)
    optimizer = torch.optim.SGD(view.parameters(), lr=0.1)
    view(images).sum().backward()
    assert net.fc.weight.grad is not None
    optimizer.step()
    assert agree()
    assert not torch.equal(outputs(view, images), before)
    state = copy.deepcopy(net.state_dict())
    for name in ("fc.weight", "stem_norm.running_mean", "head.weight_quantizer.step"):
        state[name] = state[name] * 1.5
    net.load_state_dict(state)
    assert agree()
    for name in state:
        state[name] = state[name].clone()
    state["fc.bias"] += 1
    before = outputs(view, images)
    net.load_state_dict(state, assign=True)
    assert agree()
    assert not torch.equal(outputs(net, images), before)
    net.double()
    assert torch.equal(outputs(view, images.double()), outputs(net, images.double()))
    net.head.weight = nn.Parameter(net.head.weight * 2)
    assert view.head.weight is net.head.weight


def test_parameters_that_an_lstm_lists_besides_are_replaced_in_views_too() -> None:
    model, x = recurrent()
    view = model.view(4)
    model.set_bits(4)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["lstm.weight_hh_l0"] *= 1.5
    before = outputs(view, x)
    model.load_state_dict(state, assign=True)
    assert torch.equal(outputs(view, x), outputs(model, x))
    assert not torch.equal(outputs(view, x), before)


def test_float_weights_loaded_into_the_network_make_views_ask_for_calibration(
    net: anyprec.ConvertedModel, small_net: Callable[..., nn.Module], images: Tensor
) -> None:
    view = net.view(4)
    net.load_state_dict(small_net().state_dict())
    with pytest.raises(NotCalibratedError, match=r"call anyprec\.calibrate"):
        view(images)
    anyprec.calibrate(net, [images])
    net.set_bits(4)
    assert torch.equal(outputs(view, images), outputs(net, images))


def test_mode_hooks_and_attributes_are_each_its_own(
    net: anyprec.ConvertedModel, images: Tensor
) -> None:
    calls: list[str] = []
    net.register_forward_hook(lambda *_: calls.append("before"))
    view = net.view(2).train()
    assert not net.training
    net.register_forward_hook(lambda *_: calls.append("after"))
    outputs(view.eval(), images)
    assert calls == ["before"]
    view.note = 3
    assert not hasattr(net, "note")


def test_copies_pickles_and_files_of_a_view_are_networks_of_their_own(
    net: anyprec.ConvertedModel,
    small_net: Callable[..., nn.Module],
    images: Tensor,
    tmp_path: Path,
) -> None:
    view = net.view(2)
    expected = outputs(view, images)
    anyprec.save(view, tmp_path / "view.safetensors", rebuildable=False)
    loaded = anyprec.load(tmp_path / "view.safetensors", small_net().eval(), bits=2)
    for copied in (copy.deepcopy(view), pickle.loads(pickle.dumps(view)), loaded):
        assert torch.equal(outputs(copied, images), expected)
        with torch.no_grad():
            copied.fc.bias.zero_()
        assert torch.equal(outputs(view, images), expected)


def test_a_view_of_a_view_stays_when_the_others_are_gone(
    net: anyprec.ConvertedModel, images: Tensor
) -> None:
    model = copy.deepcopy(net)
    second = model.view(4).view(2)
    expected = outputs(second, images)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert torch.equal(outputs(second, images), expected)


def test_another_classifier_needs_that_there_are_no_views(converted: Make) -> None:
    model, x = converted("test_resnet", num_classes=5), torch.randn(2, 3, 64, 64)
    model.set_bits(4)
    view = model.view(4)
    for member in (model, view):
        with pytest.raises(ConversionError, match="other views of the network"):
            member.reset_classifier(3)
    assert torch.equal(outputs(view, x), outputs(model, x))
    del view, member
    model.reset_classifier(3)
    assert model.view().fc is not model.fc
    assert outputs(model.view(4) if model.fc.input_quantizer.calibrated else model, x).shape[1] == 3


def test_a_compiled_view_has_choices_of_its_own(
    net: anyprec.ConvertedModel, images: Tensor
) -> None:
    views = [net.view(2), net.view(8)]
    expected = [outputs(view, images) for view in views]
    compiled = [torch.compile(view, backend="eager") for view in views]
    for _ in range(2):
        for run, output in zip(compiled, expected, strict=True):
            # Compiled programs compute step sizes in another order of operations.
            torch.testing.assert_close(outputs(run, images), output, rtol=1e-4, atol=1e-4)
        net.set_bits(4)


def test_what_the_network_was_compiled_to_is_not_the_views(
    net: anyprec.ConvertedModel, images: Tensor
) -> None:
    net.set_bits(8)
    expected = {bits: outputs(net.view(bits), images) for bits in (2, 8)}
    net.compile(backend="eager")
    outputs(net, images)
    for made in (net.view(2), copy.deepcopy(net)):
        made.set_bits(2)
        assert torch.equal(outputs(made, images), expected[2])


def test_bound_methods_and_partial_functions_of_layers_become_the_views(images: Tensor) -> None:
    class Indirect(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
            self.steps = [self.run, functools.partial(self.finish, scale=2.0)]

        def run(self, x: Tensor) -> Tensor:
            return self.conv(x).relu().mean((2, 3))

        def finish(self, x: Tensor, scale: float) -> Tensor:
            return self.fc(x) * scale

        def forward(self, x: Tensor) -> Tensor:
            for step in self.steps:
                x = step(x)
            return x

    settings: dict[str, Any] = {"bits": (2, 8), "first_last_bits": None}
    model = anyprec.convert(Indirect().eval(), example_input=images, **settings)
    anyprec.calibrate(model, [images])
    model.set_bits(2)
    expected = outputs(model, images)
    model.set_bits(8)
    assert torch.equal(outputs(model.view(2), images), expected)
    layer = model.conv
    model.extra = {"later": [lambda x: layer(x) + 1]}
    with pytest.raises(ConversionError, match=r"'extra' of the network.*holds on to a layer"):
        model.view(2)
    model.extra = threading.Lock()
    with pytest.raises(ConversionError, match="cannot be copied for a view.*lock"):
        model.view(2)
    del model.extra
    model.conv.register_forward_hook(lambda *_, used=layer: used.weight)
    with pytest.raises(ConversionError, match="'_forward_hooks' of 'conv'"):
        model.view(2)


def test_plain_tensors_in_attributes_are_shared(images: Tensor) -> None:
    class WithTables(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
            self.table = torch.randn(4)
            self.tables = {"more": [torch.randn(4)]}
            self.from_graph = self.fc.weight.sum()  # no leaf of a graph, which deepcopy refuses

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x).relu().mean((2, 3)) * self.table + self.tables["more"][0]
            return self.fc(x)

    model = anyprec.convert(WithTables().eval(), bits=(2, 8), example_input=images)
    anyprec.calibrate(model, [images])
    view = model.view(8)
    assert view.table is model.table
    assert view.tables is not model.tables
    assert view.tables["more"][0] is model.tables["more"][0]

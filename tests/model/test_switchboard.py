"""What `set_bits` remembers is what it would find out anew."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import anyprec
from anyprec.bits import BitConfig, Bits
from anyprec.model.intact import switchable_norms
from anyprec.model.norm_copies import norm_row
from anyprec.model.switchboard import switchboard_of
from anyprec.nn.quantizers import WeightQuantizer


class Operations(TorchDispatchMode):
    """Notes the names of operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def random_config(net: anyprec.ConvertedModel, generator: random.Random) -> BitConfig:
    chosen = {}
    for path, candidates in net.candidates.items():
        weight = generator.choice(candidates.weight)
        chosen[path] = Bits(weight, generator.choice(candidates.activation))
    return BitConfig(chosen)


def require_precision(net: anyprec.ConvertedModel, config: BitConfig) -> None:
    """Require that layers and norms are as `config` has them, in Python and as data."""
    layers = net.quantized_layers
    for path, layer in layers.items():
        assert layer.bits == config[path]
        assert layer.candidates.weight[layer.weight_index] == config[path].weight
        assert layer.candidates.activation[layer.input_index] == config[path].activation
        assert int(layer.chosen.weight) == layer.weight_index
        assert int(layer.chosen.input) == layer.input_index
    for path, norm in switchable_norms(net):
        row = norm_row(layers.get(net.anyprec_record.norms[path] or ""), "per-pair")
        assert norm.row == row
        assert int(norm.chosen.row) == row
        uniform = row if norm.uniform is None else norm.bank.rows + norm.uniform
        assert int(norm.chosen.statistics) == uniform


def test_a_switch_is_one_operation_whatever_the_bits(net: anyprec.ConvertedModel) -> None:
    generator = random.Random(0)
    net.set_bits(8)
    requests = [2, (4, 8), None, "W8A2", *(random_config(net, generator) for _ in range(3))]
    for request in requests:
        with Operations() as operations:
            net.set_bits(request)
        assert operations.names == ([] if request is None else ["copy_.default"])


def test_switching_on_the_meta_device_waits_for_nothing(net: anyprec.ConvertedModel) -> None:
    meta = copy.deepcopy(net).to("meta")
    meta.set_bits(2)
    with Operations() as operations:
        meta.set_bits(8)
    assert operations.names == ["copy_.default"]


@pytest.mark.parametrize("norm", ["per-pair", "shared-affine"])
def test_layers_and_norms_are_as_the_configuration_says(
    float_net: Any, images: Tensor, norm: Any
) -> None:
    net = anyprec.convert(float_net, bits=(2, 4, 8), norm=norm, example_input=images[:1])
    anyprec.calibrate(net, [images])
    anyprec.update_norms(net, [images])
    generator = random.Random(1)
    for _ in range(4):
        for request in (2, 8, random_config(net, generator), (4, 2), random_config(net, generator)):
            net.set_bits(request)
            config = request if isinstance(request, BitConfig) else net.resolve_bits(request)
            require_precision(net, config)
        net = copy.deepcopy(net)


def test_uniform_precisions_use_their_own_statistics_and_mixed_ones_do_not(
    net: anyprec.ConvertedModel, images: Tensor
) -> None:
    anyprec.update_norms(net, [images])
    norms = [norm for _, norm in switchable_norms(net) if norm.bank.widths]
    assert norms
    net.set_bits(2)
    for norm in norms:
        assert norm.uniform == (norm.bank.widths.index(2) if 2 in norm.bank.widths else None)
    net.set_bits((2, 8))
    assert all(norm.uniform is None for norm in norms)


def test_a_request_is_remembered_with_its_type(net: anyprec.ConvertedModel) -> None:
    for request in (8, (8, 8)):
        net.set_bits(request)
    for request in (8.0, (8, 8.0), (8.0, 8), True):
        with pytest.raises(anyprec.BitsError):
            net.set_bits(request)


def test_names_and_mappings_are_read_anew(net: anyprec.ConvertedModel) -> None:
    low, high = net.resolve_bits(2), net.resolve_bits(8)
    net.configs["mine"] = low
    net.set_bits("mine")
    net.configs["mine"] = high
    net.set_bits("mine")
    assert net.bits == high
    # A name may be one that stood for a precision before.
    net.set_bits("W8A8")
    net.configs["W8A8"] = low
    net.set_bits("W8A8")
    assert net.bits == low
    del net.configs["W8A8"]
    net.set_bits("W8A8")
    assert net.bits == high
    patterns = {"*": 2}
    net.set_bits(patterns)
    patterns["*"] = 8
    net.set_bits(patterns)
    assert net.bits == high


def test_a_refused_request_is_not_remembered(net: anyprec.ConvertedModel) -> None:
    for _ in range(2):
        with pytest.raises(anyprec.BitsError):
            net.set_bits(7)
    assert net.bits is None


def test_other_quantizers_have_other_candidates(net: anyprec.ConvertedModel) -> None:
    net.set_bits(2)
    path, layer = list(net.quantized_layers.items())[1]
    before = layer.weight_quantizer
    narrow = WeightQuantizer((8,), channels=before.step.shape[1], axis=before.axis)
    narrow.initialize(layer.weight)
    layer.weight_quantizer = narrow
    assert net.candidates[path].weight == (8,)
    net.set_bits(2)
    assert net.bits[path].weight == 8
    assert layer.weight_index == 0


def test_step_sizes_that_were_dropped_are_missed(net: anyprec.ConvertedModel) -> None:
    net.set_bits(2)
    next(iter(net.quantized_layers.values())).input_quantizer.forget()
    with pytest.raises(anyprec.NotCalibratedError):
        net.set_bits(8)
    assert net.bits == net.resolve_bits(2)


def test_the_number_of_requests_that_are_remembered_is_limited(
    net: anyprec.ConvertedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("anyprec.model.switchboard._REMEMBERED", 2)
    for request in (2, 8, (2, 8), (8, 2), 2):
        net.set_bits(request)
        assert net.bits == net.resolve_bits(request)
    assert len(switchboard_of(net)._resolved) <= 2


def test_candidates_are_not_those_that_the_network_remembers(net: anyprec.ConvertedModel) -> None:
    candidates = net.candidates
    candidates.clear()
    assert net.candidates


def test_a_layer_in_floating_point_stays_so_when_a_block_ends(
    net: anyprec.ConvertedModel,
) -> None:
    net.set_bits(2)
    path, layer = list(net.quantized_layers.items())[1]
    layer.switch(None)
    with net.using_bits(8):
        assert layer.bits == Bits(8, 8)
    assert layer.bits is None
    assert set(net.bits) == net.quantized_layers.keys() - {path}


def test_a_configuration_in_another_order_is_put_in_network_order(
    net: anyprec.ConvertedModel, images: Tensor
) -> None:
    config = net.resolve_bits(2)
    net.set_bits(config)
    expected = net.eval()(images)
    net.set_bits(8)
    other_order = BitConfig(dict(reversed(config.items())))
    assert list(net.resolve_bits(other_order)) == list(net.candidates)
    net.set_bits(other_order)
    assert torch.equal(net(images), expected)
    assert list(net.bits) == list(net.candidates)

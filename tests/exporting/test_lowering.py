from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import anyprec
from anyprec.errors import BitsError, ExportError, NotCalibratedError
from anyprec.exporting.graphs import is_call
from anyprec.exporting.lowering import lower
from anyprec.exporting.operators import DEQUANTIZE, FAKE_QUANTIZE, FAKE_QUANTIZE_WEIGHT
from anyprec.nn.norm_bank import NormBank
from tests.conftest import SmallNet
from tests.exporting.networks import converted
from tests.test_networks import NETWORKS


def mixed(model: anyprec.ConvertedModel, seed: int = 0) -> anyprec.BitConfig:
    """A random candidate for each layer."""
    generator = random.Random(seed)
    chosen = {}
    for path, candidates in model.candidates.items():
        chosen[path] = (
            generator.choice(candidates.weight),
            generator.choice(candidates.activation),
        )
    config = model.resolve_bits(chosen)
    assert config is not None
    return config


def outputs(network: nn.Module, images: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return tree_leaves(network(images))


def require_equal(model: anyprec.ConvertedModel, bits: Any, images: Tensor) -> None:
    lowered = lower(model, bits, example_input=images[:2])
    with model.using_bits(bits):
        expected = outputs(model, images)
    found = outputs(lowered.graph, images)
    assert len(found) == len(expected)
    for value, promised in zip(found, expected, strict=True):
        assert torch.equal(value, promised)


@pytest.mark.parametrize(
    "name",
    [
        "scaled weight standardisation",
        "F.linear in the owner, table of positions",
        "SAME padding",
        "mixture of experts",
        "bare parameter in a product",
        "attention and fused layers of torch",
        "tied weights and rows of weights",
        "norms after a concatenation",
    ],
)
def test_the_graph_computes_what_the_network_computes(name: str) -> None:
    create, size = NETWORKS[name]
    images = torch.randn(3, 3, size, size)
    network = create()
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():  # branches that start at zero would hide what they compute
                parameter.uniform_(0.1, 0.5)
    model = converted(network, images)
    require_equal(model, mixed(model), images)


@pytest.mark.parametrize("bits", [2, (8, 4), (2, 8)])
def test_uniform_precisions_have_the_statistics_of_their_own(
    bits: Any, images: Tensor, labels: Tensor
) -> None:
    model = converted(SmallNet(), images)
    anyprec.fit(model, [(images, labels)], epochs=1)
    model.eval()
    require_equal(model, bits, images)


def test_norms_have_the_scale_and_shift_of_the_precision(images: Tensor) -> None:
    model = converted(SmallNet(), images, norm="per-pair")
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, NormBank):
                module.weight.uniform_(-2, 2)
                module.bias.uniform_(-1, 1)
    require_equal(model, mixed(model), images)


class Upsampling(nn.Module):
    """Transposed convolutions of several groups, a Conv1d, a weight without own channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 12, 2, stride=2, groups=2)
        self.norm = nn.BatchNorm2d(12)
        self.along = nn.Conv1d(12, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.up(torch.relu(self.stem(x)))))
        return self.along(x.flatten(2))


@pytest.mark.parametrize("per_channel", [True, False])
def test_transposed_and_grouped_convolutions(per_channel: bool, images: Tensor) -> None:
    model = converted(Upsampling(), images, per_channel=per_channel)
    require_equal(model, 4, images)


def test_a_packed_network_lowers_to_the_same(images: Tensor, tmp_path: Any) -> None:
    model = converted(SmallNet(), images)
    anyprec.save(model, tmp_path / "packed.safetensors", packed=True, rebuildable=False)
    packed = anyprec.load(tmp_path / "packed.safetensors", model=SmallNet()).eval()
    require_equal(packed, mixed(model), images)


def test_weights_are_codes_and_no_latent_weight_is_left(images: Tensor) -> None:
    model = converted(SmallNet(), images)
    lowered = lower(model, (4, 8))
    nodes = list(lowered.graph.graph.nodes)
    assert not any(is_call(node, FAKE_QUANTIZE_WEIGHT) for node in nodes)
    weights = [node for node in nodes if is_call(node, DEQUANTIZE)]
    assert sorted(node.args[3] for node in weights) == sorted(model.quantized_layers)
    held = dict(lowered.graph.named_buffers())
    for node in weights:
        codes = held[node.args[0].target]
        layer = model.quantized_layers[node.args[3]]
        index = layer.weight_quantizer.candidates.index(node.args[2])
        assert codes.dtype == torch.int8
        assert torch.equal(codes.int(), layer.weight_codes(index))
    floats = [p for p in lowered.graph.parameters() if p.ndim > 1]
    assert floats == []


def test_every_input_is_quantized_on_the_grid_of_its_layer(images: Tensor) -> None:
    model = converted(SmallNet(), images)
    lowered = lower(model, {"pointwise": (4, 2), "*": (8, 4)})
    grids = {
        node.args[6]: node.args[1:6]
        for node in lowered.graph.graph.nodes
        if is_call(node, FAKE_QUANTIZE)
    }
    quantizer = model.quantized_layers["pointwise"].input_quantizer
    step = quantizer.step[quantizer.candidates.index(2)].item()
    assert grids["pointwise"] == (step, 0, 0, 3, 2)
    assert grids.keys() == model.quantized_layers.keys()


def test_batches_of_any_size(images: Tensor) -> None:
    model = converted(SmallNet(), images)
    lowered = lower(model, 4)
    fixed = lower(model, 4, dynamic_batch=False)
    with model.using_bits(4), torch.no_grad():
        for count in (1, 5):
            assert torch.equal(lowered.graph(images[:count]), model(images[:count]))
        assert torch.equal(fixed.graph(images[:1]), model(images[:1]))


def test_the_model_stays_as_it_was(images: Tensor) -> None:
    model = converted(SmallNet(), images)
    model.set_bits(2)
    model.train()
    model.stem.eval()
    before = copy.deepcopy(model.state_dict())
    lower(model, 4)
    assert model.training
    assert not model.stem.training
    assert model.bits == model.resolve_bits(2)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_layers_in_floating_point_are_named_with_the_reason(images: Tensor) -> None:
    model = converted(SmallNet(), images, exclude="head")
    assert lower(model, 4).floating == {"head": "excluded by 'head'"}


def test_refusals(images: Tensor) -> None:
    model = converted(SmallNet(), images)
    with pytest.raises(ExportError, match="pass bits=..., or call set_bits first"):
        lower(model)
    with pytest.raises(BitsError):
        lower(model, 7)
    with pytest.raises(ExportError, match="example_input is a list"):
        lower(model, 4, example_input=[images])  # type: ignore[arg-type]
    half = copy.deepcopy(model).half()
    with pytest.raises(ExportError, match=r"torch.float16.*call model.float\(\) before"):
        lower(half, 4)
    uncalibrated = anyprec.convert(SmallNet().eval(), example_input=images)
    with pytest.raises(NotCalibratedError):
        lower(uncalibrated, 4)
    shared = converted(SmallNet(), images, norm="shared")
    with pytest.raises(ExportError, match="layer 'stem' corrects its quantized weight"):
        lower(shared, 4)


class Branching(nn.Module):
    """Its program depends on the values of the images."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else self.layer(-x)


def test_a_network_that_cannot_be_traced_is_refused_with_the_cause(images: Tensor) -> None:
    model = converted(Branching(), images)
    with pytest.raises(ExportError, match=r"torch.export cannot trace Branching \(.*pass dynamic_"):
        lower(model, 8)

"""Integer placement: which values are quantized, and that they are, and nothing else changes."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import anyprec
from anyprec.model.intact import output_quantizers, parts_of
from anyprec.nn.outputs import OutputOwner
from anyprec.nn.shared import SharedInputQuantizer
from anyprec.searching.measuring.grouping import tied_groups
from anyprec.training.feature_sources import feature_sources


class Block(nn.Module):
    """A residual block in which one ReLU runs twice, and a sum is made in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += x
        return self.relu(y)


class Net(nn.Module):
    """Two blocks, a branch without a norm, max pooling, zero padding, average pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.block1 = Block()
        self.block2 = Block()
        self.left = nn.Conv2d(8, 8, 1)
        self.right = nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu6(self.stem(x)))
        x = self.block2(self.block1(x))
        x = self.left(x) + F.hardtanh(self.right(F.pad(x, (1, 1, 1, 1))), -2.0, 2.0)
        return self.fc(x.mean((2, 3)))


EXPECTED = {
    # path: (what makes it, owner, function, index, never negative)
    "block1.norm2.output_quantizers.0": ("block1.conv2", "block1.norm2", "batch_norm", 0, False),
    "block1.relu.output_quantizers.1": ("add", "block1", "relu", 1, True),
    "block2.norm2.output_quantizers.0": ("block2.conv2", "block2.norm2", "batch_norm", 0, False),
    "block2.relu.output_quantizers.1": ("add", "block2", "relu", 1, True),
    "left.output_quantizers.0": ("left", "left", "conv2d", 0, False),
    "output_quantizers.0": ("stem", "", "relu6", 0, True),
    "output_quantizers.1": ("right", "", "hardtanh", 0, False),
    "output_quantizers.2": ("add", "", "add", 0, False),
}

TRUNK_OF = {
    "block1.conv1": "output_quantizers.0",
    "block2.conv1": "block1.relu.output_quantizers.1",
    "left": "block2.relu.output_quantizers.1",
    "right": "block2.relu.output_quantizers.1",
}


@pytest.fixture
def float_net() -> nn.Module:
    net = Net()
    with torch.no_grad():
        for _ in range(3):
            net(torch.randn(16, 3, 16, 16))
    return net.eval()


def _convert(float_net: nn.Module, images: Tensor, **settings: object) -> anyprec.ConvertedModel:
    settings = {"bits": (2, 4, 8), "example_input": images[:1], "placement": "integer", **settings}
    net = anyprec.convert(copy.deepcopy(float_net), **settings)
    anyprec.calibrate(net, [images])
    return net


@pytest.fixture
def net(float_net: nn.Module, images: Tensor) -> anyprec.ConvertedModel:
    return _convert(float_net, images)


def _error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def test_exactly_these_values_have_a_quantizer(net: anyprec.ConvertedModel) -> None:
    facts = {output.path: output for output in net.anyprec_record.facts.outputs}
    found = {}
    for path, output in facts.items():
        found[path] = (
            output.source, output.owner, output.function, output.index, output.nonnegative
        )  # fmt: skip
    assert found == EXPECTED
    assert output_quantizers(net).keys() == EXPECTED.keys()
    # One ReLU of a block runs twice; the first result is read by a single layer.
    assert facts["block1.relu.output_quantizers.1"].counts == (2,)


def test_a_layer_knows_the_output_that_it_reads(net: anyprec.ConvertedModel) -> None:
    quantizers = output_quantizers(net)
    trunks = {}
    for path, layer in net.quantized_layers.items():
        if isinstance(layer.input_quantizer, SharedInputQuantizer):
            trunks[path] = layer.input_quantizer.trunk
    assert trunks.keys() == TRUNK_OF.keys()
    for path, trunk in TRUNK_OF.items():
        assert trunks[path] is quantizers[trunk]


def test_bits_none_is_the_float_network(float_net: nn.Module, images: Tensor) -> None:
    net = _convert(float_net, images)
    with torch.no_grad():
        assert torch.equal(net(images), float_net(images))
    net.train()
    float_net.train()
    assert torch.equal(net(images), float_net(images))


def test_layers_placement_is_the_default_and_adds_nothing(
    float_net: nn.Module, images: Tensor
) -> None:
    nets = [_convert(float_net, images, placement="layers")]
    plain = anyprec.convert(float_net, bits=(2, 4, 8), example_input=images[:1])
    anyprec.calibrate(plain, [images])
    nets.append(plain)
    for model in nets:
        model.set_bits(4)
        assert not any(isinstance(module, OutputOwner) for module in model.modules())
    assert nets[0].state_dict().keys() == nets[1].state_dict().keys()
    assert torch.equal(nets[0](images), nets[1](images))


def test_8_bits_stay_close_to_the_float_network(
    float_net: nn.Module, net: anyprec.ConvertedModel, images: Tensor
) -> None:
    net.set_bits(8)
    with torch.no_grad():
        # Weights, inputs and outputs on 8 bits: about 1 % each, and a dozen of them in a row.
        assert 0 < _error(net(images), float_net(images)) < 0.05


def test_switching_back_is_exact(net: anyprec.ConvertedModel, images: Tensor) -> None:
    with torch.no_grad():
        net.set_bits(8)
        first = net(images)
        net.set_bits(2)
        low = net(images)
        net.set_bits(None)
        net(images)
        net.set_bits(8)
        assert torch.equal(net(images), first)
    assert not torch.equal(low, first)


class _Recorder:
    """Sees what the modules of a network get and return, and nothing of how it is quantized."""

    def __init__(self, net: nn.Module, *paths: str) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        for path in paths:
            net.get_submodule(path).register_forward_hook(self._noting(path))

    def _noting(self, path: str) -> Callable[..., None]:
        def note(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            # Copies, since a later function may work in place.
            self.inputs[path] = args[0].clone()
            self.outputs[path] = output.clone()

        return note


def _assert_on_grid(values: Tensor, step: Tensor, zero_point: int) -> None:
    codes = values.double() / step.double() + zero_point
    # A product of a code and a float32 step size is rounded once.
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
    assert codes.round().min() >= 0
    assert codes.round().max() <= 255
    assert len(codes.round().unique()) > 10


@pytest.mark.parametrize("bits", [2, 8])
def test_values_lie_on_the_grids_of_8_bits(
    net: anyprec.ConvertedModel, images: Tensor, bits: int
) -> None:
    recorder = _Recorder(net, "block1", "block1.norm2", "block2", "left", "right", "pool", "fc")
    net.set_bits(bits)
    with torch.no_grad():
        net(images)
    seen = {
        "output_quantizers.0": recorder.inputs["pool"],
        "block1.norm2.output_quantizers.0": recorder.outputs["block1.norm2"],
        "block1.relu.output_quantizers.1": recorder.outputs["block1"],
        "block2.relu.output_quantizers.1": recorder.outputs["block2"],
        "left.output_quantizers.0": recorder.outputs["left"],
    }
    quantizers = output_quantizers(net)
    for path, values in seen.items():
        step, zero_point = quantizers[path].grid(0)
        _assert_on_grid(values, step.detach(), zero_point)
    # What the layers read has only been moved since.
    for path, values in {
        "output_quantizers.0": recorder.inputs["block1"],
        "block2.relu.output_quantizers.1": recorder.inputs["right"],
    }.items():
        step, zero_point = quantizers[path].grid(0)
        _assert_on_grid(values, step.detach(), zero_point)


def test_8_bit_readers_have_the_grid_of_what_they_read(net: anyprec.ConvertedModel) -> None:
    quantizers = output_quantizers(net)
    values = torch.randn(2, 8, 4, 4)
    for path, trunk in TRUNK_OF.items():
        reader: anyprec.InputQuantizer = net.quantized_layers[path].input_quantizer
        step, zero_point = reader.grid(2)
        assert step is not None
        assert torch.equal(step, quantizers[trunk].step[0])
        assert zero_point == int(quantizers[trunk].zero_point[0])
        assert reader.limits(2) == quantizers[trunk].limits(0)
        on_grid = quantizers[trunk](values)
        assert torch.equal(reader(on_grid, 2), on_grid)
        # Below 8 bits they have step sizes of their own.
        assert reader.step.shape == (2,)
        assert len(reader(on_grid, 0).unique()) <= 4


def test_step_sizes_of_outputs_get_gradients(
    net: anyprec.ConvertedModel, images: Tensor, labels: Tensor
) -> None:
    for bits in (2, 8):
        net.train().set_bits(bits)
        net.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        for path, output in output_quantizers(net).items():
            assert output.step.grad is not None, path
            assert output.step.grad.abs() > 0, path


def test_excluded_layers_read_and_make_values_in_floating_point(
    float_net: nn.Module, images: Tensor
) -> None:
    net = _convert(float_net, images, exclude=("block1.conv2", "left"))
    paths = output_quantizers(net).keys()
    # What the float layer makes has none; what only it reads has one, since nothing else would.
    assert paths == EXPECTED.keys() - {
        "block1.norm2.output_quantizers.0", "left.output_quantizers.0"
    } | {"block1.relu.output_quantizers.0"}  # fmt: skip


def test_copies_pickles_and_views_compute_the_same(
    net: anyprec.ConvertedModel, images: Tensor
) -> None:
    net.set_bits(4)
    with torch.no_grad():
        expected = net(images)
        for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net)), net.view()):
            assert torch.equal(other(images), expected)
        view = net.view(8)
        net.set_bits(None)
        assert not torch.equal(view(images), net(images))
        copied = copy.deepcopy(net)
    reader = copied.quantized_layers["left"].input_quantizer
    assert reader.trunk is output_quantizers(copied)["block2.relu.output_quantizers.1"]
    assert reader.trunk is not net.quantized_layers["left"].input_quantizer.trunk


class Repeating(nn.Module):
    """Its forward depends on an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.conv = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(8, 5)
        self.repeats = 1
        self.low = 0.0

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).clamp(min=self.low)
        for _ in range(self.repeats):
            x = F.relu6(self.conv(x)) + x
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize(("repeats", "times"), [(2, "2"), (0, "0")])
def test_a_forward_that_makes_other_calls_is_refused(
    images: Tensor, repeats: int, times: str
) -> None:
    net = _convert(Repeating().eval(), images)
    net.set_bits(8)
    net(images)
    net.repeats = repeats
    message = f"Repeating calls '(relu6|add)' {times} times or more.*but 1 times when"
    with pytest.raises(anyprec.ConversionError, match=message):
        net(images)
    net.set_bits(None)
    net(images)


def test_a_result_in_place_that_is_not_used_is_refused(images: Tensor) -> None:
    class Statement(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            F.relu(x, inplace=True)
            return self.fc((self.left(x) + x).mean((2, 3)))

    with pytest.raises(anyprec.ConversionError, match="use what the function returns"):
        anyprec.convert(
            Statement().eval(), bits=(4, 8), example_input=images[:1], placement="integer"
        )


def test_children_are_not_added_to_sequential_networks(images: Tensor) -> None:
    relu = nn.ReLU()
    float_net = nn.Sequential(
        nn.Conv2d(3, 8, 3), relu, nn.Conv2d(8, 8, 3), relu, nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(8 * 36, 5),
    ).eval()  # fmt: skip
    net = _convert(float_net, images)
    # The second ReLU is read by the pooling; all else by a single layer.
    assert output_quantizers(net).keys() == {"1.output_quantizers.1"}
    with torch.no_grad():
        expected = float_net(images)
        assert torch.equal(net(images), expected)
        net.set_bits(8)
        assert 0 < _error(net(images), expected) < 0.05


def test_recomputed_blocks_quantize_the_same(images: Tensor, labels: Tensor) -> None:
    class Recomputing(Net):
        recompute = False

        def forward(self, x: Tensor) -> Tensor:
            x = self.pool(F.relu6(self.stem(x)))
            for block in (self.block1, self.block2):
                x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
            return self.fc(x.mean((2, 3)))

    net = _convert(Recomputing().eval(), images)
    gradients = []
    for recompute in (False, True):
        net.recompute = recompute
        net.set_bits(4)
        net.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        found = {name: parameter.grad for name, parameter in net.named_parameters()}
        gradients.append({name: grad for name, grad in found.items() if grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_calls_of_owners_inside_are_not_counted_for_owners_around_them(images: Tensor) -> None:
    class Outer(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.stem(x))
            x = self.block2(self.block1(x))
            x = F.relu(self.left(x) + x)
            return self.fc(x.mean((2, 3)))

    net = _convert(Outer().eval(), images)
    facts = {output.path: output for output in net.anyprec_record.facts.outputs}
    assert facts["output_quantizers.1"].index == 1
    assert facts["output_quantizers.1"].counts == (2,)
    net.set_bits(8)
    net(images)


def test_calls_of_owners_without_outputs_are_not_counted_either(images: Tensor) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3)
            # Read by one layer: nothing of it is quantized but that layer's input.
            self.act = nn.ReLU()
            self.conv = nn.Conv2d(8, 8, 1)
            self.fc = nn.Linear(8, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.conv(self.act(self.stem(x))))
            return self.fc((x + x.square()).mean((2, 3)))

    net = _convert(Outer().eval(), images)
    record = net.anyprec_record.facts
    assert record.apart == ("act", "fc")
    relu = next(output for output in record.outputs if output.function == "relu")
    assert (relu.owner, relu.index, relu.counts) == ("", 0, (1,))
    net.set_bits(8)
    net(images)


def test_float_weights_start_outputs_anew(
    float_net: nn.Module, net: anyprec.ConvertedModel, images: Tensor
) -> None:
    net.load_state_dict(float_net.state_dict())
    with pytest.raises(anyprec.NotCalibratedError, match="layers and outputs"):
        net.set_bits(8)
    assert net.float_state_dict().keys() == float_net.state_dict().keys()


def test_refuted_signs_are_dropped(images: Tensor) -> None:
    net = anyprec.convert(
        Repeating().eval(), bits=(4, 8), example_input=images[:1], placement="integer"
    )
    output = output_quantizers(net)["output_quantizers.0"]
    assert output.nonnegative
    net.low = -0.5
    with warnings.catch_warnings(record=True, action="always") as caught:
        anyprec.calibrate(net, [images])
    # Those of the layers that read it come with it.
    messages = [str(warning.message) for warning in caught]
    assert any(text.startswith("what 'output_quantizers.0' quantizes is") for text in messages)
    assert not output.nonnegative
    assert output.zero_point > 0
    facts = {output.path: output for output in net.anyprec_record.facts.outputs}
    assert not facts["output_quantizers.0"].nonnegative


def test_an_unknown_placement_is_refused(float_net: nn.Module) -> None:
    with pytest.raises(ValueError, match="placement='everywhere'"):
        anyprec.convert(float_net, placement="everywhere")


def test_taken_names_are_refused(float_net: nn.Module, images: Tensor) -> None:
    float_net.block1.relu.output_quantizers = 3
    with pytest.raises(anyprec.ConversionError, match="output_quantizers"):
        anyprec.convert(float_net, example_input=images[:1], placement="integer")
    assert type(float_net) is Net
    assert not any(isinstance(module, OutputOwner) for module in float_net.modules())


def test_hooks_of_our_own_do_not_count(net: anyprec.ConvertedModel, images: Tensor) -> None:
    net.set_bits(4)
    with torch.no_grad():
        expected = net(images)
    # This watches the inputs of all norms, with sums and means.
    anyprec.update_norms(net, [images], net.bits)
    with torch.no_grad():
        assert net(images).shape == expected.shape


def test_features_behind_activations_are_those_of_layers_placement(
    float_net: nn.Module, net: anyprec.ConvertedModel, images: Tensor
) -> None:
    plain = _convert(float_net, images, placement="layers")
    net.set_bits(8)
    sources = feature_sources(net, "after-activation")
    assert sources == feature_sources(plain, "after-activation")
    assert any(source.side != "observed" for source in sources.values())
    assert all(owner.quantizes_outputs for owner in parts_of(net).owners.values())


@pytest.mark.parametrize("rule", ["inputs", "residual"])
def test_tied_layers_are_those_of_layers_placement(
    float_net: nn.Module, net: anyprec.ConvertedModel, images: Tensor, rule: str
) -> None:
    plain = _convert(float_net, images, placement="layers")
    net.set_bits(8)
    assert tied_groups(net, rule) == tied_groups(plain, rule)
    assert (rule == "inputs") or tied_groups(net, rule)


def test_replaced_owners_are_noticed(net: anyprec.ConvertedModel, images: Tensor) -> None:
    net.set_bits(8)
    net.block1.norm2 = nn.BatchNorm2d(8)
    with pytest.raises(anyprec.ConversionError, match="block1.norm2"):
        net(images)


def test_costs_count_a_step_size_for_each_output(float_net: nn.Module, images: Tensor) -> None:
    plain = anyprec.cost_of(_convert(float_net, images, placement="layers"), 8)
    placed = anyprec.cost_of(_convert(float_net, images), 8)
    assert (placed.bitops, placed.size) == (plain.bitops, plain.size)


@pytest.mark.parametrize(
    ("name", "size", "outputs", "shared"),
    [
        ("test_resnet", 64, 12, 4),
        ("test_efficientnet", 64, None, None),
        ("mobilenetv2_100", 32, None, None),
        ("tf_efficientnet_lite0", 32, None, None),
        ("test_vit", 160, None, None),
    ],
)
def test_networks_of_timm(name: str, size: int, outputs: int | None, shared: int | None) -> None:
    images = torch.randn(2, 3, size, size)
    float_net = timm.create_model(name).eval()
    net = _convert(float_net, images)
    if outputs is not None:
        assert len(output_quantizers(net)) == outputs
        reads = [layer.reads for layer in net.anyprec_record.facts.layers.values()]
        assert sum(path is not None for path in reads) == shared
    assert output_quantizers(net)
    with torch.no_grad():
        assert torch.equal(net(images), float_net(images))
        net.set_bits(8)
        first = net(images)
        net.set_bits(4)
        net(images)
        net.set_bits(8)
        assert torch.equal(net(images), first)
        assert torch.isfinite(first).all()


def test_the_summary_lists_values_between_layers() -> None:
    images = torch.rand(2, 8, 8, 8)
    model = anyprec.convert(
        nn.Sequential(Block(), Block()).eval(),
        bits=(4, 8),
        example_input=images[:1],
        placement="integer",
    )
    anyprec.calibrate(model, [images])
    summary = model.summary()
    assert [row.path for row in summary.outputs] == list(output_quantizers(model))
    line = next(line for line in str(summary).splitlines() if line.startswith("0.relu."))
    assert line.split()[1:] == ["add", "0", "8", "unsigned", "float"]
    model.set_bits(4)
    assert all(row.active for row in model.summary().outputs)
    assert "A8" in str(model.summary())


@pytest.mark.parametrize("arguments", [(7, "max"), (0, "")])
def test_a_classifier_without_its_quantized_values_is_refused(arguments: tuple[Any, ...]) -> None:
    images = torch.rand(2, 3, 32, 32)
    for name in ("test_convnext", "test_mambaout"):
        network = timm.create_model(name, num_classes=5).eval()
        model = anyprec.convert(network, bits=(4, 8), example_input=images[:1], placement="integer")
        anyprec.calibrate(model, [images])
        model.configs["small"] = model.resolve_bits(4)
        model.set_bits(4)
        expected = model(images)
        with pytest.raises(anyprec.ConversionError, match="reset_classifier changes values"):
            model.reset_classifier(*arguments)
        assert model.bits == model.configs["small"]
        assert torch.equal(model(images), expected)
        model.reset_classifier(7)
        model.set_bits(4)
        assert model(images).shape == (2, 7)

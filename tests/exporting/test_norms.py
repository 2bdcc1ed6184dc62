from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from anyprec.exporting.graphs import is_call
from anyprec.exporting.lowering import lower
from anyprec.exporting.norms import fold_norms
from anyprec.exporting.operators import DEQUANTIZE
from tests.exporting.networks import converted, operators


class Normed(nn.Module):
    """A norm behind each kind of layer that can take it, and two that cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.conv_norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.up, self.up_norm = nn.ConvTranspose2d(8, 6, 2, groups=2), nn.BatchNorm2d(6)
        self.plain, self.plain_norm = nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4, affine=False)
        self.read_twice, self.other_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.fc, self.fc_norm = nn.Linear(4, 5), nn.BatchNorm1d(5, eps=0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv_norm(self.conv(x)))
        x = torch.relu(self.up_norm(self.up(x)))
        x = self.plain_norm(self.plain(x))
        y = self.read_twice(x)
        x = y + self.other_norm(y)
        return self.fc_norm(self.fc(x.mean(dim=(2, 3))))


@pytest.fixture
def network() -> nn.Module:
    network = Normed()
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, -2, 2)  # negative scales, too
                nn.init.uniform_(module.bias, -1, 1)
    return network


def test_norms_go_into_scales_and_the_codes_stay(network: nn.Module, images: Tensor) -> None:
    model = converted(network, images)
    graph = lower(model, (4, 8)).graph
    before = copy.deepcopy(graph)
    assert sorted(fold_norms(graph)) == ["conv", "fc", "plain", "up"]
    # The one that reads a value that others read, too.
    assert operators(graph)["_native_batch_norm_legit_no_training"] == 1
    codes = {node.args[3]: node for node in graph.graph.nodes if is_call(node, DEQUANTIZE)}
    for node in before.graph.nodes:
        if is_call(node, DEQUANTIZE):
            unchanged = before.get_buffer(node.args[0].target)
            assert torch.equal(graph.get_buffer(codes[node.args[3]].args[0].target), unchanged)
    scale = graph.get_buffer(codes["conv"].args[1].target)
    assert (scale < 0).any()
    with torch.no_grad():
        # In float64 the two are equal to its rounding, so that no code is another one.
        folded = _in_double(graph)(images.double())
        expected = _in_double(before)(images.double())
    assert torch.allclose(folded, expected, rtol=1e-6, atol=1e-6)


def _in_double(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    doubled = copy.deepcopy(graph)
    for name, tensor in [*doubled.named_buffers(), *doubled.named_parameters()]:
        holder, _, attribute = name.rpartition(".")
        if tensor.is_floating_point():
            module = doubled.get_submodule(holder)
            delattr(module, attribute)
            module.register_buffer(attribute, tensor.detach().double())
    return doubled


def test_a_norm_of_sequences_behind_a_linear_layer_stays() -> None:
    class Sequences(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.fc(x))

    images = torch.randn(4, 6, 6)
    model = converted(Sequences(), images)
    graph = lower(model, 8).graph
    expected = graph(images)
    assert fold_norms(graph) == []
    assert torch.equal(graph(images), expected)

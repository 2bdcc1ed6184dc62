"""Networks with integer placement in training and in a search."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import anyprec
from anyprec.model.intact import output_quantizers
from anyprec.nn.shared import SharedInputQuantizer
from anyprec.searching.measuring.execution import PartialExecution
from anyprec.training import training_path


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)) + x)


@pytest.fixture
def net(loader: list[tuple[Tensor, Tensor]]) -> anyprec.ConvertedModel:
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    network = nn.Sequential(stem, Block(), Block(), head)
    images = loader[0][0]
    model = anyprec.convert(network, bits=(2, 4, 8), example_input=images[:1], placement="integer")
    anyprec.calibrate(model, [images])
    return model


def test_fit_trains_step_sizes_of_outputs(
    net: anyprec.ConvertedModel, loader: list[tuple[Tensor, Tensor]]
) -> None:
    outputs = output_quantizers(net)
    before = {path: output.step.detach().clone() for path, output in outputs.items()}
    history = anyprec.fit(net, loader, epochs=3, lr=0.1)
    assert sum(history[-1].losses) < sum(history[0].losses)
    for path, output in outputs.items():
        assert not torch.equal(output.step, before[path]), path


def test_step_sizes_of_outputs_have_no_weight_decay(net: anyprec.ConvertedModel) -> None:
    groups = {group["name"]: group for group in anyprec.param_groups(net, weight_decay=0.1)}
    ids = set(map(id, groups["step sizes"]["params"]))
    assert {id(output.step) for output in output_quantizers(net).values()} <= ids
    assert groups["step sizes"]["weight_decay"] == 0


def test_every_path_gives_every_parameter_a_gradient_where_processes_wait_for_it(
    net: anyprec.ConvertedModel,
    loader: list[tuple[Tensor, Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(training_path, "process_count", lambda: 2)
    readers = [layer.input_quantizer for layer in net.quantized_layers.values()]
    assert any(isinstance(reader, SharedInputQuantizer) for reader in readers)
    images, labels = loader[0]
    for path in anyprec.OneShot(net, total_steps=1).paths():
        net.zero_grad()
        path.loss(net(images), labels, F.cross_entropy).backward()
        missing = [name for name, parameter in net.named_parameters() if parameter.grad is None]
        assert missing == []


def test_a_search_finds_a_configuration(
    net: anyprec.ConvertedModel, loader: list[tuple[Tensor, Tensor]]
) -> None:
    result = anyprec.search(net, loader[:1], "W4A4")
    assert anyprec.cost_of(net, result.config).bitops <= anyprec.cost_of(net, 4).bitops
    net.set_bits(result.config)
    images, labels = loader[0]
    with torch.no_grad():
        loss = F.cross_entropy(net.eval()(images), labels)
    assert float(loss) == pytest.approx(result.score, rel=1e-5)


def test_parts_of_the_network_run_again_with_outputs_quantized(
    net: anyprec.ConvertedModel, loader: list[tuple[Tensor, Tensor]]
) -> None:
    net.eval()
    images = loader[0][0]
    # `of` compares whole passes with those in parts, bit for bit.
    execution, reason = PartialExecution.of(net, [images])
    assert reason is None
    assert execution is not None
    with torch.no_grad():
        net.set_bits({"1.conv": 2})
        assert torch.equal(execution.run(0, images), net(images))

"""Norms that compute with their own attributes use those of the active copy."""

from __future__ import annotations

import copy
import inspect
import textwrap
from typing import Any
from unittest import mock

import pytest
import torch
from timm.layers import SyncBatchNormAct
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.modules import batchnorm
from torch.nn.utils import prune
from torch.optim.swa_utils import update_bn

import anyprec
from anyprec.errors import ConversionError, TrainingError
from anyprec.nn.norm_stand_ins import passes_values_on
from anyprec.nn.norms import switch_norm


class ByHand(nn.BatchNorm2d):
    """The formula, with statistics moved in place."""

    def forward(self, x: Tensor) -> Tensor:
        mean, variance = self.running_mean, self.running_var
        if self.training:
            mean = x.mean((0, 2, 3))
            variance = x.var((0, 2, 3), unbiased=False)
            count = x.numel() / x.shape[1]
            with torch.no_grad():
                self.num_batches_tracked += 1
                self.keep(mean, variance * count / (count - 1))
        shape = (1, -1, 1, 1)
        normal = (x - mean.view(shape)) * torch.rsqrt(variance.view(shape) + self.eps)
        return normal * self.weight.view(shape) + self.bias.view(shape)

    def keep(self, mean: Tensor, variance: Tensor) -> None:
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)


class Rebinding(ByHand):
    """The same, with new tensors for the statistics, and a count of its own."""

    calls = 0

    def keep(self, mean: Tensor, variance: Tensor) -> None:
        self.running_mean = (1 - self.momentum) * self.running_mean + self.momentum * mean
        self.running_var = (1 - self.momentum) * self.running_var + self.momentum * variance
        self.calls += 1


class Renaming(ByHand):
    """The same, with the scale under another name."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.gamma = self.weight

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (self.gamma / self.weight).view(1, -1, 1, 1)


class ZeroCentred(nn.BatchNorm2d):
    """Its scale is one plus the weight, which no interception of `F.batch_norm` can know."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            1 + self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
        )


KINDS = [nn.BatchNorm2d, nn.SyncBatchNorm, ByHand, Rebinding, Renaming, ZeroCentred]


def _of_copy(norm: nn.Module, row: int) -> nn.Module:
    """A float norm with the values of a copy."""
    single = type(norm).original_class(norm.num_features)
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(single, name).copy_(getattr(norm.bank, name)[row])
    return single.train(norm.training)


@pytest.fixture(params=KINDS)
def norm(request: pytest.FixtureRequest) -> nn.Module:
    norm = request.param(4)
    switch_norm(norm, 3)
    with torch.no_grad():
        for parameter in norm.bank.parameters():
            parameter.uniform_(0.5, 1.5)
        norm.bank.running_mean.uniform_(-1, 1)
        norm.bank.running_var.uniform_(0.5, 2)
    norm.switch(1)
    return norm


def test_training_uses_and_moves_the_active_copy_alone(norm: nn.Module) -> None:
    before, single, x = copy.deepcopy(norm), _of_copy(norm, 1), torch.randn(6, 4, 5, 5)
    output = norm(x)
    expected = single(x)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)
    output.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(norm.bank.running_mean[1], single.running_mean)
    torch.testing.assert_close(norm.bank.running_var[1], single.running_var)
    torch.testing.assert_close(norm.bank.weight.grad[1], single.weight.grad)
    torch.testing.assert_close(norm.bank.bias.grad[1], single.bias.grad)
    for row in (0, 2):
        assert torch.equal(norm.bank.running_mean[row], before.bank.running_mean[row])
        assert norm.bank.weight.grad[row].count_nonzero() == 0
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(getattr(norm, name), getattr(before, name))
    assert norm.weight.grad is None
    assert isinstance(norm.weight, nn.Parameter)


def test_evaluation_uses_the_active_copy_and_an_override(norm: nn.Module) -> None:
    norm.eval()
    x = torch.randn(6, 4, 5, 5)
    single = _of_copy(norm, 1)
    torch.testing.assert_close(norm(x), single(x))
    override = torch.full((4,), 0.3), torch.full((4,), 1.7)
    norm.override_with(override)
    single.running_mean.copy_(override[0])
    single.running_var.copy_(override[1])
    torch.testing.assert_close(norm(x), single(x))


def test_in_floating_point_nothing_stands_in(norm: nn.Module) -> None:
    norm.switch(None)
    original = type(norm).original_class(4)
    x = torch.randn(6, 4, 5, 5)
    assert torch.equal(norm(x), original(x))
    assert torch.equal(norm.running_mean, original.running_mean)


def test_output_observers_see_every_output_once(norm: nn.Module) -> None:
    values: list[Tensor] = []
    with norm.output_observers.including(values.append):
        output = norm(torch.randn(6, 4, 5, 5))
    assert len(values) == 1
    assert values[0].shape == output.shape


def test_what_a_forward_pass_sets_on_the_norm_stays_there() -> None:
    norm = Rebinding(4)
    switch_norm(norm, 2)
    norm.switch(0)
    for _ in range(3):
        norm(torch.randn(6, 4, 5, 5))
    assert norm.calls == int(norm.num_batches_tracked) == 3


def test_a_failed_forward_pass_leaves_the_norm_as_it_was() -> None:
    norm = ByHand(4)
    switch_norm(norm, 2)
    norm.switch(0)
    parameters, buffers = dict(norm._parameters), dict(norm._buffers)
    with pytest.raises(RuntimeError):
        norm(torch.randn(6, 5, 5, 5))
    assert all(norm._parameters[name] is value for name, value in parameters.items())
    assert all(norm._buffers[name] is value for name, value in buffers.items())


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm])
def test_norms_of_torch_need_no_stand_in(kind: type[nn.Module]) -> None:
    assert passes_values_on(kind)
    assert passes_values_on(type("Sub", (kind,), {}))
    assert not passes_values_on(type("Own", (kind,), {"forward": lambda self, x: x}))


@pytest.mark.parametrize("kind", [nn.SyncBatchNorm, SyncBatchNormAct])
def test_a_synchronised_norm_hands_the_copys_values_to_all_processes(
    kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between processes torch's own function gets them, which only a GPU can run."""
    received: dict[str, Tensor] = {}

    class Spy:
        @staticmethod
        def apply(x: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> Tensor:
            mean, variance, _, momentum = rest[:4]
            received.update(weight=weight, bias=bias)
            mean.lerp_(x.mean((0, 2, 3)), momentum)
            variance.lerp_(x.var((0, 2, 3)), momentum)
            return x * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)

    source = textwrap.dedent(inspect.getsource(nn.SyncBatchNorm.forward))
    assert "input.device.type not in" in source
    scope: dict[str, Any] = {**vars(batchnorm), "sync_batch_norm": Spy}
    exec(source.replace("input.device.type not in", "() and input.device.type not in"), scope)
    norm = kind(4)
    switch_norm(norm, 3)
    norm.switch(2)
    before = copy.deepcopy(norm)
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda *_: 2)
    monkeypatch.setattr(distributed, "group", mock.Mock())
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", scope["forward"])
    norm(torch.randn(6, 4, 5, 5) + 2).square().sum().backward()
    assert received["weight"]._base is norm.bank.weight
    assert received["bias"]._base is norm.bank.bias
    assert norm.bank.weight.grad[2].all()
    assert norm.weight.grad is None
    moved = (norm.bank.running_mean != before.bank.running_mean).all(dim=1)
    assert moved.tolist() == [False, False, True]
    assert torch.equal(norm.running_mean, before.running_mean)


def test_a_network_with_norms_by_hand_compiles_to_what_it_is(images: Tensor) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), ByHand(4), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    model = anyprec.convert(network, bits=(2, 8), first_last_bits=None, example_input=images)
    anyprec.calibrate(model, [images])
    compiled = torch.compile(model, backend="eager")
    outputs = []
    for bits in (2, 8):
        model.set_bits(bits)
        with torch.no_grad():
            outputs.append(compiled(images))
            assert torch.equal(outputs[-1], model(images))
    assert not torch.equal(*outputs)


def test_update_bn_is_refused_at_a_precision_before_anything_changes(
    net: anyprec.ConvertedModel, images: Tensor
) -> None:
    net.set_bits(2)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(TrainingError, match="use anyprec.update_norms.*or call set_bits.None"):
        update_bn([images], net)
    assert not net.training
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]) or value.isnan().all(), name


def test_update_bn_works_in_floating_point(
    net: anyprec.ConvertedModel, float_net: nn.Module, images: Tensor
) -> None:
    reference = copy.deepcopy(net)
    anyprec.model.conversion.revert(reference)
    net.set_bits(None)
    update_bn([images, images + 1], net)
    update_bn([images, images + 1], reference)
    for name, value in reference.state_dict().items():
        assert torch.equal(net.state_dict()[name], value), name


def test_a_copy_takes_no_cumulative_average(net: anyprec.ConvertedModel, images: Tensor) -> None:
    net.set_bits(2)
    net.stem_norm.momentum = None
    net(images)  # in eval mode nothing is averaged
    net.train()
    with pytest.raises(TrainingError, match="momentum=None averages over all its batches"):
        net(images)
    net.set_bits(None)
    net(images)


def test_a_norm_pruned_after_conversion_is_refused_at_a_precision(
    net: anyprec.ConvertedModel, images: Tensor
) -> None:
    prune.l1_unstructured(net.stem_norm, "weight", 0.5)
    net(images)
    net.set_bits(2)
    with pytest.raises(ConversionError, match="pruned or parametrized after conversion.*undo"):
        net(images)

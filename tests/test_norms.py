"""Switchable BatchNorm: a copy per precision, and the float network's own untouched."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from anyprec.norms import SwitchableNorm, restore_norm, switch_norm


@pytest.fixture(params=[nn.BatchNorm2d, BatchNormAct2d])
def norm(request: pytest.FixtureRequest) -> nn.Module:
    norm = request.param(4)
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    return norm


def test_float_mode_is_the_original_in_eval_and_train_mode(norm: nn.Module) -> None:
    original, x = copy.deepcopy(norm), torch.randn(6, 4, 5, 5)
    switch_norm(norm, 3)
    for training in (False, True):
        assert torch.equal(norm.train(training)(x), original.train(training)(x))
    assert torch.equal(norm.running_mean, original.running_mean)


def test_a_copy_starts_as_the_float_norm(norm: nn.Module) -> None:
    original, x = copy.deepcopy(norm).eval(), torch.randn(6, 4, 5, 5)
    switch_norm(norm, 3)
    norm.eval()
    norm.row = 2
    assert torch.equal(norm(x), original(x))


def test_training_at_one_precision_moves_only_its_own_copy(norm: nn.Module) -> None:
    before = copy.deepcopy(norm)
    switch_norm(norm, 3)
    norm.row = 1
    norm.train()
    norm(torch.randn(6, 4, 5, 5) + 3).square().sum().backward()
    moved = (norm.bank.running_mean != before.running_mean).all(dim=1)
    assert moved.tolist() == [False, True, False]
    assert norm.bank.weight.grad[1].all()
    assert norm.bank.weight.grad[[0, 2]].count_nonzero() == 0
    assert torch.equal(norm.running_mean, before.running_mean)
    assert norm.weight.grad is None


def test_statistics_of_the_active_copy_are_those_of_torch(norm: nn.Module) -> None:
    reference = copy.deepcopy(norm).train()
    switch_norm(norm, 2)
    norm.row = 1
    norm.train()
    for _ in range(3):
        x = torch.randn(6, 4, 5, 5)
        assert torch.equal(norm(x), reference(x))
    assert torch.equal(norm.bank.running_mean[1], reference.running_mean)
    assert torch.equal(norm.bank.running_var[1], reference.running_var)


def test_a_norm_without_affine_parameters_switches_its_statistics() -> None:
    norm = nn.BatchNorm1d(3, affine=False)
    switch_norm(norm, 2)
    norm.eval()
    norm.bank.running_mean[1] = 5.0
    norm.row = 1
    torch.testing.assert_close(norm(torch.full((2, 3), 5.0)), torch.zeros(2, 3))


def test_restoring_gives_the_float_norm_back() -> None:
    norm = nn.BatchNorm2d(4)
    keys = list(norm.state_dict())
    switch_norm(norm, 2)
    assert isinstance(norm, SwitchableNorm)
    restore_norm(norm)
    assert type(norm) is nn.BatchNorm2d
    assert list(norm.state_dict()) == keys

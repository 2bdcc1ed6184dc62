"""Switchable BatchNorm: a copy per precision, and the float network's own untouched."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

import anyprec
from anyprec.nn.norm_bank import NormBank
from anyprec.nn.norms import SwitchableNorm, restore_norm, switch_norm


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
    norm.switch(2)
    assert torch.equal(norm(x), original(x))


def test_training_at_one_precision_moves_only_its_own_copy(norm: nn.Module) -> None:
    before = copy.deepcopy(norm)
    switch_norm(norm, 3)
    norm.switch(1)
    norm.train()
    norm(torch.randn(6, 4, 5, 5) + 3).square().sum().backward()
    moved = (norm.bank.running_mean != before.running_mean).all(dim=1)
    assert moved.tolist() == [False, True, False]
    assert norm.bank.weight.grad[1].all()
    assert norm.bank.weight.grad[[0, 2]].count_nonzero() == 0
    assert torch.equal(norm.running_mean, before.running_mean)
    assert norm.weight.grad is None


def nodes_of(result: Tensor) -> list[str]:
    """Names of the nodes of a result's graph."""
    waiting, names = [result.grad_fn], []
    while waiting:
        node = waiting.pop()
        if node is not None:
            names.append(node.name())
            waiting += [following for following, _ in node.next_functions]
    return names


def test_what_was_computed_for_one_call_is_not_kept(norm: nn.Module) -> None:
    switch_norm(norm, 3, shared_affine=True)
    norm.train()
    norm.switch(0)
    computed = norm.bank.weight.exp()
    alive = weakref.ref(computed)
    values = {"bank.weight": computed}
    torch.func.functional_call(norm, values, torch.randn(6, 4, 5, 5)).sum().backward()
    del computed, values
    assert alive() is None


def freeze(bank: NormBank) -> None:
    bank.weight.requires_grad_(requires_grad=False)


def learn(bank: NormBank) -> None:
    bank.weight.requires_grad_()


def change_in_place(bank: NormBank) -> None:
    with torch.no_grad():
        bank.weight.mul_(1.5)


def exchange(bank: NormBank) -> None:
    bank.weight.data = 1.5 * bank.weight.data


@pytest.mark.parametrize("shared_affine", [False, True])
@pytest.mark.parametrize(
    "changes", [[], [freeze], [freeze, learn], [change_in_place], [exchange], [change_in_place] * 2]
)
def test_a_copy_learns_as_a_norm_does_whatever_changed_between_two_passes(
    norm: nn.Module, changes: list[Callable[[NormBank], None]], shared_affine: bool
) -> None:
    alone = copy.deepcopy(norm).train()
    switch_norm(norm, 3, shared_affine=shared_affine)
    norm.train()
    norm.switch(0)
    x = torch.randn(6, 4, 5, 5)
    for change in (*changes, lambda _: None):
        change(norm.bank)
        change(alone)
        norm.bank.weight.grad = alone.weight.grad = None
        found, expected = norm(x), alone(x)
        assert torch.equal(found, expected)
        # Torch's way back from a view of what was changed in place since takes kernels.
        assert "AsStridedBackward0" not in nodes_of(found)
        # Twice, since a graph may end with its first backward pass.
        for result in (found, expected, norm(x), alone(x)):
            result.square().sum().backward()
        if alone.weight.grad is None:
            assert norm.bank.weight.grad is None
        else:
            assert torch.equal(norm.bank.weight.grad[0], alone.weight.grad)


def test_copies_can_share_their_affine_parameters(norm: nn.Module) -> None:
    before = copy.deepcopy(norm)
    switch_norm(norm, 3, shared_affine=True)
    norm.train()
    for row in (0, 2):
        norm.switch(row)
        norm(torch.randn(6, 4, 5, 5) + row).square().sum().backward()
    assert norm.bank.weight.shape == norm.bank.bias.shape == (1, 4)
    moved = (norm.bank.running_mean != before.running_mean).all(dim=1)
    assert moved.tolist() == [True, False, True]
    assert norm.weight.grad is None
    # It is what a copy of its own would do with the same values.
    with torch.no_grad():
        norm.bank.weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    x = torch.randn(6, 4, 5, 5)
    before.load_state_dict(
        {
            "weight": norm.bank.weight[0],
            "bias": norm.bank.bias[0],
            "running_mean": norm.bank.running_mean[2],
            "running_var": norm.bank.running_var[2],
            "num_batches_tracked": before.num_batches_tracked,
        }
    )
    assert torch.equal(norm.eval()(x), before.eval()(x))
    norm.bank.keep_row(2)
    norm.switch(0)
    assert torch.equal(norm(x), before(x))
    assert norm.bank.rows == len(norm.bank.weight) == 1


def test_statistics_of_the_active_copy_are_those_of_torch(norm: nn.Module) -> None:
    reference = copy.deepcopy(norm).train()
    switch_norm(norm, 2)
    norm.switch(1)
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
    norm.switch(1)
    torch.testing.assert_close(norm(torch.full((2, 3), 5.0)), torch.zeros(2, 3))


def test_restoring_gives_the_float_norm_back() -> None:
    norm = nn.BatchNorm2d(4)
    keys = list(norm.state_dict())
    switch_norm(norm, 2)
    assert isinstance(norm, SwitchableNorm)
    restore_norm(norm)
    assert type(norm) is nn.BatchNorm2d
    assert list(norm.state_dict()) == keys


def test_statistics_of_a_configuration_are_used_in_eval_mode_only(norm: nn.Module) -> None:
    reference = copy.deepcopy(norm)
    switch_norm(norm, 2)
    norm.switch(0)
    norm.override_with((torch.rand(4), 0.5 + torch.rand(4)))
    x = torch.randn(6, 4, 5, 5)
    reference.running_mean, reference.running_var = norm.override
    assert torch.equal(norm.eval()(x), reference.eval()(x))
    before = norm.override[0].clone()
    norm.train()(x)
    assert torch.equal(norm.override[0], before)
    norm.override_with(None)
    assert not torch.equal(norm.eval()(x), reference(x))


def test_a_norm_without_copies_uses_statistics_of_a_configuration_too(norm: nn.Module) -> None:
    reference = copy.deepcopy(norm)
    switch_norm(norm, 0)
    norm.override_with((torch.rand(4), 0.5 + torch.rand(4)))
    x = torch.randn(6, 4, 5, 5)
    before = [value.clone() for value in norm.override]
    torch.testing.assert_close(norm.train()(x), reference.train()(x), rtol=0, atol=0)
    assert torch.equal(norm.running_mean, reference.running_mean)
    assert all(map(torch.equal, norm.override, before))
    reference.running_mean, reference.running_var = norm.override
    assert torch.equal(norm.eval()(x), reference.eval()(x))


@pytest.mark.parametrize(
    ("sharing", "rows"), [("per-pair", 4 * 4), ("shared-affine", 4 * 4), ("shared", 0)]
)
def test_a_norm_has_as_many_copies_as_its_sharing_says(
    sharing: str, rows: int, float_net: nn.Module, images: Tensor
) -> None:
    net = anyprec.convert(float_net, bits=(2, 3, 4, 8), norm=sharing, example_input=images[:1])
    anyprec.calibrate(net, [images])
    bank = net.pointwise_norm.bank
    assert (0 if bank is None else bank.rows) == rows
    assert bank is None or len(bank.weight) == len(bank.bias) == (
        1 if sharing == "shared-affine" else rows
    )
    assert (net.joint_norm.bank is None) == (rows == 0)
    outputs = {}
    for bits in (2, (2, 8), (8, 2), 8, None):
        net.set_bits(bits)
        outputs[bits] = net(images)
        assert torch.isfinite(outputs[bits]).all()
        if bits is not None:
            width, activation = (bits, bits) if isinstance(bits, int) else bits
            index = (2, 3, 4, 8).index
            expected = {
                "per-pair": index(width) * 4 + index(activation),
                "shared-affine": index(width) * 4 + index(activation),
                "shared": None,
            }
            assert net.pointwise_norm.row == expected[sharing]
    assert torch.equal(outputs[None], float_net(images))
    groups = {
        group["name"]: {id(p) for p in group["params"]} for group in anyprec.param_groups(net)
    }
    assert (id(net.pointwise_norm.weight) in groups["norms and biases"]) == (sharing == "shared")


def test_with_a_shared_norm_quantized_weights_have_mean_and_spread_of_the_latent_ones(
    float_net: nn.Module, images: Tensor
) -> None:
    net = anyprec.convert(float_net, bits=(2, 8), norm="shared", example_input=images[:1])
    anyprec.calibrate(net, [images])
    net.set_bits(2)
    layer = net.pointwise
    used = layer.quantized_weight(layer.weight).detach().flatten(1)
    latent = layer.weight.detach().flatten(1)
    torch.testing.assert_close(used.mean(dim=1), latent.mean(dim=1))
    torch.testing.assert_close(used.std(dim=1), latent.std(dim=1))
    plain = layer.weight_quantizer(layer.weight, 0).detach().flatten(1)
    assert not torch.allclose(plain.std(dim=1), latent.std(dim=1), rtol=1e-3)
    # A layer whose output meets no norm is left as it is.
    assert torch.equal(
        net.head.quantized_weight(net.head.weight), net.head.weight_quantizer(net.head.weight, 0)
    )


def test_a_shared_norm_learns_from_every_precision(float_net: nn.Module, images: Tensor) -> None:
    net = anyprec.convert(float_net, bits=(2, 8), norm="shared", example_input=images[:1])
    anyprec.calibrate(net, [images])
    before = net.pointwise_norm.running_mean.clone()
    net.train()
    with net.using_bits(2):
        net(images).sum().backward()
    assert net.pointwise_norm.weight.grad is not None
    assert not torch.equal(net.pointwise_norm.running_mean, before)


def test_an_unknown_sharing_is_refused(float_net: nn.Module) -> None:
    with pytest.raises(
        ValueError,
        match=r"norm='per-bit' is not known: use one of \('per-pair', 'shared-affine', 'shared'\)",
    ):
        anyprec.convert(float_net, norm="per-bit")


@pytest.fixture
def bank() -> NormBank:
    """Two copies, and statistics of two uniform bit-widths that are numbers of their own."""
    bank = NormBank(nn.BatchNorm2d(3), 2, shared_affine=True, widths=(2, 4))
    bank.uniform_mean.copy_(torch.arange(6.0).reshape(2, 3))
    bank.uniform_var.copy_(10 + torch.arange(6.0).reshape(2, 3))
    bank.refresh()
    return bank


def test_the_one_copy_that_is_kept_takes_the_statistics_of_its_uniform_precision(
    bank: NormBank,
) -> None:
    bank.keep_row(0, 1)
    assert bank.rows == 1
    assert bank.running_mean.tolist() == [[3.0, 4.0, 5.0]]
    assert bank.running_var.tolist() == [[13.0, 14.0, 15.0]]
    assert not any("uniform" in name for name in bank.state_dict())


def test_copies_that_start_anew_leave_no_statistics_of_uniform_precisions(bank: NormBank) -> None:
    assert bank.has_uniform
    bank.copy_from(nn.BatchNorm2d(3))
    assert not bank.has_uniform
    assert torch.isnan(bank.uniform_mean).all()
    assert torch.isnan(bank.uniform_var).all()

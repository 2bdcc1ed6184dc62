"""Norms with a known forward: it runs on a stand-in, as if `F.batch_norm` were intercepted."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from anyprec.errors import ConversionError
from anyprec.nn import norms
from anyprec.nn.norms import switch_norm


class Wrapped(nn.BatchNorm2d):
    """A forward that has the name of torch's own, and is another."""

    @functools.wraps(nn.BatchNorm2d.forward)
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        return super().forward(input + 1)


class Checked(nn.BatchNorm2d):
    """It sets something on itself."""

    seen = 0

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 (torch's name)
        super()._check_input_dim(input)
        self.seen = input.shape[0]


class Doubled(nn.BatchNorm2d):
    """Its scale is a property."""

    @property
    def weight(self) -> Tensor:
        return 2 * self._parameters["weight"]

    @weight.setter
    def weight(self, value: Tensor) -> None:
        self._parameters["weight"] = value


SHAPES = {nn.BatchNorm1d: (6, 4), nn.BatchNorm2d: (6, 4, 3, 3), nn.BatchNorm3d: (6, 4, 2, 2, 2)}
SHAPES[BatchNormAct2d] = (6, 4, 3, 3)


def make(kind: Any = nn.BatchNorm2d, *, shared_affine: bool = False, **options: Any) -> Any:
    norm = kind(4, **options)
    switch_norm(norm, 3, shared_affine=shared_affine, widths=(2, 3))
    with torch.no_grad():
        for parameter in norm.bank.parameters():
            parameter.uniform_(0.5, 1.5)
        for name in ("running_mean", "running_var", "uniform_mean", "uniform_var"):
            getattr(norm.bank, name).uniform_(0.5, 2)
    norm.switch(1)
    return norm


@pytest.fixture
def interceptions(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The norms whose `F.batch_norm` was intercepted, in the order of their calls."""
    noted: list[nn.Module] = []

    class Noting(norms._NormInterceptor):
        def __init__(self, norm: Any) -> None:
            super().__init__(norm)
            noted.append(norm)

    monkeypatch.setattr(norms, "_NormInterceptor", Noting)
    return noted


def run(norm: Any, x: Tensor) -> list[Tensor | None]:
    """Output, gradients and all that is kept, after one call."""
    x = x.clone().requires_grad_()
    output = norm(x)
    (output * torch.linspace(-1, 1, output.numel()).reshape(output.shape)).sum().backward()
    gradients = [parameter.grad for parameter in norm.parameters()]
    return [output, x.grad, *gradients, *norm.state_dict().values()]


def are_equal(first: list[Tensor | None], second: list[Tensor | None]) -> bool:
    pairs = zip(first, second, strict=True)
    return all(a is b is None or torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("width", [None, 3])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"shared_affine": True}, {"affine": False}])
@pytest.mark.parametrize("kind", SHAPES)
def test_all_is_as_if_the_norm_were_intercepted(
    kind: Any,
    options: dict[str, Any],
    training: bool,
    width: int | None,
    interceptions: list[nn.Module],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    norm = make(kind, **options).train(training)
    norm.switch(1, width=width)
    intercepted, x = copy.deepcopy(norm), torch.randn(SHAPES[kind])
    results = run(norm, x)
    assert not interceptions
    with monkeypatch.context() as patched:
        patched.setattr(norms, "returns_normalised", lambda _: None)
        expected = run(intercepted, x)
    assert interceptions == [intercepted]
    assert are_equal(results, expected)
    assert norm.num_batches_tracked == int(training)


def test_missing_statistics_of_a_uniform_precision_are_those_of_the_copy() -> None:
    norm, x = make().eval(), torch.randn(6, 4, 3, 3)
    expected = norm(x)
    for missing in (float("nan"), float("inf")):
        norm.bank.uniform_mean[1] = norm.bank.running_mean[1] + 1
        norm.bank.uniform_var[1] = norm.bank.running_var[1]
        norm.switch(1, width=3)
        assert not torch.equal(norm(x), expected)
        # As an average of weights writes it, which copies no flags.
        norm.bank.uniform_mean[1] = missing
        assert torch.equal(norm(x), expected)


def test_hooks_see_the_norms_own_values() -> None:
    norm, seen = make(), []
    values = norm.weight, norm.running_mean
    norm.register_forward_hook(lambda module, *_: seen.append((module.weight, module.running_mean)))
    with norm.output_observers.including(lambda _: seen.append((norm.weight, norm.running_mean))):
        norm(torch.randn(6, 4, 3, 3))
    assert len(seen) == 2
    for pair in seen:
        assert all(value is own for value, own in zip(pair, values, strict=True))


def test_an_outer_mode_sees_one_norm_with_the_copys_values() -> None:
    class Calls(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is F.batch_norm:
                means.append(args[1])
            return func(*args, **(kwargs or {}))

    norm, means = make(), []
    with Calls():
        norm(torch.randn(6, 4, 3, 3))
    assert len(means) == 1
    assert means[0].data_ptr() == norm.bank.running_mean[1].data_ptr()


def test_statistics_move_in_the_bank_that_is_there() -> None:
    norm, x = make(), torch.randn(6, 4, 3, 3)
    norm(x)
    replaced = {name: value.clone() for name, value in norm.state_dict().items()}
    changes = [
        lambda norm: norm.double(),
        lambda norm: norm.load_state_dict(replaced, assign=True),
        copy.deepcopy,
        lambda norm: pickle.loads(pickle.dumps(norm)),
        moved_by_data,
        lambda norm: norm.share_memory(),
    ]
    for change in changes:
        before = norm.bank.running_mean.detach()
        result = change(norm)
        changed = result if isinstance(result, nn.Module) else norm
        is_shared = changed.bank.running_mean.data_ptr() == before.data_ptr()
        start, left = changed.bank.running_mean.clone(), before.clone()
        changed(x.to(start.dtype))
        assert (changed.bank.running_mean[1] != start[1]).all()
        assert torch.equal(changed.bank.running_mean[0], start[0])
        assert is_shared or torch.equal(before, left)


def moved_by_data(norm: Any) -> None:
    """As FSDP moves a tensor."""
    norm.bank.running_mean.data = norm.bank.running_mean.data.clone()


def test_rows_that_are_used_again_are_those_of_the_present_values() -> None:
    norm, x = make().eval(), torch.randn(6, 4, 3, 3)
    changes = [
        lambda bank: bank.running_mean.add_(1),
        lambda bank: bank.weight.data.mul_(2),
        lambda bank: bank.running_var.numpy().__imul__(2),
        lambda bank: setattr(bank, "running_mean", bank.running_mean + 1),
        lambda bank: setattr(bank, "weight", nn.Parameter(bank.weight.detach() * 2)),
        lambda bank: setattr(bank.bias, "data", bank.bias.data * 2),
    ]
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        for change in changes:
            with torch.no_grad():
                before = norm(x)
                change(norm.bank)
            with context():
                output = norm(x)
            assert not torch.equal(output, before)
            assert torch.equal(output, of_row(norm, 1)(x))


def of_row(norm: Any, row: int) -> nn.Module:
    """A float norm with the values of a copy."""
    single = nn.BatchNorm2d(4).eval()
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(single, name).data.copy_(getattr(norm.bank, name)[row].detach())
    return single


def test_a_row_that_was_used_without_gradients_takes_some_later() -> None:
    norm, x = make(shared_affine=True), torch.randn(6, 4, 3, 3)
    with torch.inference_mode():
        norm(x)
    with torch.no_grad():
        norm(x)
    norm(x).square().sum().backward()
    assert norm.bank.weight.grad.all()


def test_observers_see_values_before_an_activation(interceptions: list[nn.Module]) -> None:
    norm, values = make(BatchNormAct2d), []
    with norm.output_observers.including(lambda value: values.append(value.clone())):
        output = norm(torch.randn(6, 4, 3, 3))
    assert interceptions == [norm]
    assert values[0].min() < 0
    assert torch.equal(values[0].relu(), output)


@pytest.mark.parametrize("kind", [Wrapped, Checked])
def test_other_norms_are_intercepted(kind: Any, interceptions: list[nn.Module]) -> None:
    norm = make(kind)
    norm(torch.randn(6, 4, 3, 3))
    assert interceptions == [norm]
    if kind is Checked:
        assert norm.seen == 6


def test_a_scale_that_is_a_property_is_intercepted(interceptions: list[nn.Module]) -> None:
    norm = make()
    norm.__class__ = type("SwitchableDoubled", (type(norm), Doubled), {"weight": Doubled.weight})
    norm(torch.randn(6, 4, 3, 3))
    assert interceptions == [norm]


def test_a_replica_of_data_parallel_is_intercepted(interceptions: list[nn.Module]) -> None:
    norm = make().eval()
    replica = norm._replicate_for_data_parallel()
    replica.weight, replica.bias = norm.weight.detach(), norm.bias.detach()
    x = torch.randn(6, 4, 3, 3)
    assert torch.equal(replica(x), norm(x))
    assert interceptions == [replica]


def test_a_norm_parametrized_after_conversion_is_refused() -> None:
    norm = make()
    parametrize.register_parametrization(norm, "weight", nn.Softplus())
    with pytest.raises(ConversionError, match="parametrized"):
        norm(torch.randn(6, 4, 3, 3))


def test_a_wrong_shape_raises_what_torch_raises() -> None:
    with pytest.raises(ValueError, match="expected 4D input"):
        make()(torch.randn(6, 4))

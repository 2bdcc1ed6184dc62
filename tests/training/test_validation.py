"""Validating while training: statistics of the present weights, and training as without."""

from __future__ import annotations

import copy
import io
import pickle
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import anyprec
from anyprec.training.validation import RecentBatches

WIDTHS = (None, 2, 3, 4, 8)


class DropNet(nn.Module):
    """Draws random numbers in training, and has a norm that stays in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, bias=False)
        self.fixed = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.2)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.fixed(self.stem(x)))
        x = self.drop(torch.relu(self.norm(self.conv(x))))
        return self.fc(x.mean(dim=(2, 3)))


class Loop:
    """A training loop of one's own, with a shuffled loader that draws from the global generator."""

    def __init__(self, batches: list[tuple[Tensor, Tensor]], steps: int = 20, lr: float = 0.2):
        torch.manual_seed(0)
        images = torch.cat([batch[0] for batch in batches])
        labels = torch.cat([batch[1] for batch in batches])
        self.loader = DataLoader(TensorDataset(images, labels), 16, shuffle=True)
        self.model = anyprec.convert(DropNet(), bits=(2, 3, 4, 8), example_input=images[:1])
        anyprec.calibrate(self.model, [images[:32]])
        self.oneshot = anyprec.OneShot(self.model, total_steps=steps)
        self.optimizer = torch.optim.SGD(
            anyprec.param_groups(self.model), lr=lr, momentum=0.9, weight_decay=1e-4
        )
        self.model.train()
        self.model.fixed.eval()

    def run(self, steps: int) -> None:
        done = 0
        while done < steps:
            for images, labels in self.loader:
                for path in self.oneshot.paths():
                    path.loss(self.model(images), labels, F.cross_entropy).backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.oneshot.step()
                done += 1
                if done == steps:
                    return


@pytest.fixture
def make_loop(loader: list[tuple[Tensor, Tensor]]) -> Callable[..., Loop]:
    return lambda **settings: Loop(loader, **settings)


def outputs(model: nn.Module, images: Tensor, requests: Any = WIDTHS) -> list[Tensor]:
    found = []
    for bits in requests:
        with model.using_bits(bits), torch.no_grad():
            found.append(model(images))
    return found


@pytest.mark.parametrize("bits", ["uniform", [4, None], {"conv": (2, 8)}])
def test_training_goes_on_as_if_nothing_had_been_evaluated(
    bits: Any, make_loop: Callable[..., Loop], images: Tensor
) -> None:
    straight, interrupted = make_loop(), make_loop()
    torch.manual_seed(1)
    straight.run(6)
    straight.run(6)
    expected = torch.rand(3), random.getstate(), np.random.get_state()[2]
    torch.manual_seed(1)
    interrupted.run(6)
    model = interrupted.model
    model.set_bits(3)
    modes = {name: module.training for name, module in model.named_modules()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    precision = model.bits
    with interrupted.oneshot.evaluating(interrupted.loader, bits) as evaluated:
        assert evaluated is model
        assert not any(module.training for module in model.modules())
        outputs(model, images, bits if isinstance(bits, list) else [])
        model.set_bits({"conv": (2, 8)})
    assert model.bits == precision
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert wanted == [parameter.requires_grad for parameter in model.parameters()]
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    model.zero_grad()
    interrupted.run(6)
    found = torch.rand(3), random.getstate(), np.random.get_state()[2]
    assert torch.equal(expected[0], found[0])
    assert expected[1:] == found[1:]
    unused = {"fixed.weight", "fixed.bias", "norm.weight", "norm.bias"}
    trained = dict(straight.model.named_parameters())
    for name, value in model.named_parameters():
        if name not in unused:
            assert torch.equal(value, trained[name]), name
    # What training reads in eval mode is as it was too.
    for name, value in straight.model.fixed.bank.named_buffers():
        torch.testing.assert_close(
            model.fixed.bank.get_buffer(name), value, rtol=0, atol=0, equal_nan=True
        )


def test_what_is_evaluated_is_what_update_norms_gives(
    make_loop: Callable[..., Loop], images: Tensor
) -> None:
    loop = make_loop()
    loop.model.fixed.train()
    loop.run(10)
    batches = [batch[0] for batch in loop.loader]
    reference = copy.deepcopy(loop.model)
    anyprec.update_norms(reference, batches, include_float=True)
    expected = outputs(reference.eval(), images)
    with loop.oneshot.evaluating(batches):
        found = outputs(loop.model, images)
        state = copy.deepcopy(loop.model.state_dict())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    # A checkpoint taken in the block has them.
    later = copy.deepcopy(loop.model)
    later.load_state_dict(state)
    for one, other in zip(outputs(later.eval(), images), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_configuration_has_statistics_of_its_own_until_the_next_step(
    make_loop: Callable[..., Loop], images: Tensor
) -> None:
    loop = make_loop()
    loop.model.fixed.train()
    loop.run(5)
    config = {"conv": (2, 8)}
    batches = [batch[0] for batch in loop.loader]
    reference = copy.deepcopy(loop.model)
    anyprec.update_norms(reference, batches, config)
    with loop.oneshot.evaluating(batches, config):
        (found,) = outputs(loop.model, images, [config])
    (expected,) = outputs(reference.eval(), images, [config])
    torch.testing.assert_close(found, expected)
    assert loop.model.anyprec_record.statistics
    loop.run(1)
    assert not loop.model.anyprec_record.statistics


def test_statistics_are_estimated_only_after_a_step(make_loop: Callable[..., Loop]) -> None:
    loop = make_loop()

    def refuse() -> Iterator[Tensor]:
        raise AssertionError("no batch is needed")
        yield

    with loop.oneshot.evaluating(refuse()):
        pass
    loop.run(1)
    with loop.oneshot.evaluating(loop.loader), loop.oneshot.evaluating(refuse()):
        pass


def test_evaluating_on_statistics_left_behind_warns_once_and_says_what_to_do(
    make_loop: Callable[..., Loop], images: Tensor
) -> None:
    loop = make_loop()
    outputs(copy.deepcopy(loop.model).eval(), images)  # calibrated: nothing to warn about
    loop.run(2)
    loop.model.eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outputs(loop.model, images)
    (warning,) = caught
    assert warning.category is anyprec.StaleNormsWarning
    for text in ("with oneshot.evaluating(train_loader):", "anyprec.update_norms(model"):
        assert text in str(warning.message)


@pytest.mark.parametrize("bits", WIDTHS)
def test_each_precision_warns(
    bits: int | None, make_loop: Callable[..., Loop], images: Tensor
) -> None:
    loop = make_loop()
    loop.run(1)
    loop.model.eval()
    with pytest.warns(anyprec.StaleNormsWarning):
        outputs(loop.model, images, [bits])


def test_mixed_precisions_warn_where_only_uniform_ones_are_up_to_date(
    make_loop: Callable[..., Loop], images: Tensor
) -> None:
    loop = make_loop()
    loop.run(1)
    with loop.oneshot.evaluating(loop.loader):
        outputs(loop.model, images)
        with pytest.warns(anyprec.StaleNormsWarning):
            outputs(loop.model, images, [{"conv": (2, 8)}])


def test_what_brings_statistics_up_to_date_ends_the_warning(
    make_loop: Callable[..., Loop], images: Tensor
) -> None:
    loop = make_loop()
    loop.run(2)
    model = loop.model
    anyprec.update_norms(model, [images], include_float=True)
    outputs(model.eval(), images, [*WIDTHS, {"conv": (2, 8)}])
    model.train()
    loop.run(1)
    with loop.oneshot.evaluating([images]):
        state = copy.deepcopy(model.state_dict())
    loop.run(1)
    model.load_state_dict(state)  # statistics come with the weights
    outputs(model.eval(), images)
    model.train()
    loop.run(1)
    anyprec.update_norms(model, [images])
    outputs(model.eval(), images, [2, 4])
    with pytest.warns(anyprec.StaleNormsWarning):  # the float network was not asked for
        outputs(model, images, [None])


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    return torch.load(stream)


@pytest.mark.parametrize("carry", [lambda state: state, copy.deepcopy, through_a_file])
def test_a_state_of_stale_statistics_is_stale_where_it_is_loaded(
    carry: Callable[[Any], Any], make_loop: Callable[..., Loop], images: Tensor
) -> None:
    loop = make_loop()
    fresh = copy.deepcopy(loop.model)
    loop.run(2)
    state = carry(loop.model.state_dict())
    fresh.load_state_dict(state)
    with pytest.warns(anyprec.StaleNormsWarning) as caught:
        outputs(fresh.eval(), images)
    assert len(caught) == 1
    with loop.oneshot.evaluating([images]):
        state = loop.model.state_dict()
    fresh.load_state_dict(state)
    outputs(fresh, images)


def averaging_by_hand(model: nn.Module) -> tuple[nn.Module, Callable[[nn.Module], None]]:
    average = copy.deepcopy(model)

    @torch.no_grad()
    def update(trained: nn.Module) -> None:
        for mean, value in zip(average.parameters(), trained.parameters(), strict=True):
            mean.lerp_(value, 0.5)

    return average, update


def averaging_by_torch(model: nn.Module) -> tuple[nn.Module, Callable[[nn.Module], None]]:
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    return average.module, average.update_parameters


def averaging_by_timm(model: nn.Module) -> tuple[nn.Module, Callable[[nn.Module], None]]:
    average = ModelEmaV3(model, decay=0.5)
    return average.module, average.update


@pytest.mark.parametrize("make", [averaging_by_hand, averaging_by_torch, averaging_by_timm])
@pytest.mark.parametrize("begins", ["before", "while"])
def test_an_average_of_weights_is_left_behind_with_them_and_can_be_brought_up_to_date(
    begins: str, make: Callable[..., Any], make_loop: Callable[..., Loop], images: Tensor
) -> None:
    loop = make_loop()
    loop.model.train()
    teacher = copy.deepcopy(loop.model).eval()
    loop.oneshot.remember(images)
    if begins == "while":
        loop.run(1)
        loop.oneshot.refresh_norms()
    average, update = make(loop.model)
    for _ in range(3):
        loop.run(1)
        update(loop.model)
    with pytest.warns(anyprec.StaleNormsWarning, match="oneshot.refresh_norms.average") as caught:
        outputs(average.eval(), images)
    assert len(caught) == 1
    outputs(teacher, images)  # its weights stayed, so its statistics are right
    loop.oneshot.refresh_norms(average)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refreshed = outputs(average, images)
    anyprec.update_norms(average, [images], include_float=True)
    expected = outputs(average, images)
    for value, reference in zip(refreshed, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-4, atol=1e-4)


def test_norms_that_left_training_before_the_step_is_counted_are_left_behind_too(
    make_loop: Callable[..., Loop], images: Tensor, labels: Tensor
) -> None:
    loop = make_loop()
    for path in loop.oneshot.paths():
        path.loss(loop.model(images), labels % 3, F.cross_entropy).backward()
    loop.optimizer.step()
    loop.model.eval()
    loop.oneshot.step()
    with pytest.warns(anyprec.StaleNormsWarning):
        outputs(loop.model, images)
    assert loop.model.fixed.bank.stale is None  # it was in eval mode in the step itself


def test_saving_what_training_left_behind_warns_once(
    make_loop: Callable[..., Loop], images: Tensor, tmp_path: Path
) -> None:
    loop = make_loop()
    loop.run(1)
    with loop.oneshot.evaluating([images]):
        anyprec.save(loop.model, tmp_path / "best", rebuildable=False)
    loop.run(1)
    with pytest.warns(anyprec.StaleNormsWarning, match="norm statistics that are saved") as caught:
        anyprec.save(loop.model, tmp_path / "best", rebuildable=False)
    assert len(caught) == 1
    anyprec.save(loop.model, tmp_path / "best", rebuildable=False)


def test_a_pickled_network_is_what_it_was(make_loop: Callable[..., Loop], images: Tensor) -> None:
    loop = make_loop()
    loop.run(1)
    again = pickle.loads(pickle.dumps(loop.model))
    with pytest.warns(anyprec.StaleNormsWarning):
        outputs(again.eval(), images)


def test_calibrating_from_a_float_network_that_was_left_behind_warns(
    make_loop: Callable[..., Loop], images: Tensor
) -> None:
    loop = make_loop()
    loop.run(2)
    with pytest.warns(anyprec.StaleNormsWarning):
        anyprec.calibrate(loop.model, [images])


def test_a_training_step_itself_and_fit_do_not_warn(
    make_loop: Callable[..., Loop], images: Tensor, loader: list[tuple[Tensor, Tensor]]
) -> None:
    loop = make_loop()
    loop.run(3)
    for norm_batches in (2, 0):
        anyprec.fit(loop.model, loader, epochs=1, norm_batches=norm_batches)
        outputs(loop.model, images)


def test_compiled_networks_warn_when_the_precision_is_set_and_compile_nothing_anew(
    make_loop: Callable[..., Loop], images: Tensor, labels: Tensor
) -> None:
    torch._dynamo.reset()
    loop = make_loop()
    model = loop.model
    model.fixed.train()
    counter = CompileCounterWithBackend("eager")
    network = torch.compile(model, backend=counter, fullgraph=True)
    oneshot = anyprec.OneShot(model, total_steps=20, compiled=True)

    def step() -> None:
        model.train()
        for path in oneshot.paths():
            path.loss(network(images), labels % 3, F.cross_entropy).backward()
        oneshot.step()

    def evaluate() -> None:
        for bits in (2, 4, 8):
            with model.using_bits(bits), torch.no_grad():
                network(images)

    step()
    with oneshot.evaluating([images]):
        evaluate()
    compiled = counter.frame_count
    for _ in range(2):
        step()
        with oneshot.evaluating([images]):
            evaluate()
    assert counter.frame_count == compiled
    step()
    model.eval()
    with pytest.warns(anyprec.StaleNormsWarning):
        evaluate()
    assert counter.frame_count == compiled


def test_without_images_there_is_nothing_to_evaluate_with(make_loop: Callable[..., Loop]) -> None:
    loop = make_loop()
    loop.run(1)
    with (
        pytest.raises(anyprec.TrainingError, match="pass a loader or batches, or call oneshot"),
        loop.oneshot.evaluating(),
    ):
        pass
    loop.oneshot.remember(next(iter(loop.loader))[0])
    with loop.oneshot.evaluating():
        outputs(loop.model, torch.randn(2, 3, 16, 16))


def test_the_last_images_are_kept_and_no_more_than_needed() -> None:
    recent = RecentBatches(images=10)
    for index in range(8):
        recent.add(torch.full((4, 1), float(index)))
    assert [int(batch[0]) for batch in recent.all()] == [5, 6, 7]
    recent.add(torch.full((30, 1), 8.0))
    (batch,) = recent.all()
    assert batch.shape == (10, 1)
    assert batch.untyped_storage().nbytes() == 40

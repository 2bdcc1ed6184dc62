"""One-shot training in the shape of timm's training script."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm.optim
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import anyprec
from anyprec.training.parameters import unused_parameters

pytest.importorskip("timm.task", reason="needs timm.task")
OneShotTask = pytest.importorskip("anyprec.integrations.timm_task").OneShotTask


def train(
    task: Any, images: Tensor, labels: Tensor, *, steps: int, accumulation: int = 1
) -> list[float]:
    """The core of timm's train.py."""
    groups = anyprec.param_groups(task.oneshot.model)
    optimizer = timm.optim.create_optimizer_v2(groups, opt="sgd", lr=0.1, weight_decay=0.0)
    task.follow(optimizer)
    task.train()
    losses = []
    for _ in range(steps):
        for _ in range(accumulation):
            result = task(images, labels)
            (result["loss"] / accumulation).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(result["loss_max"]))
        assert result["output"].shape == (8, 5)
    return losses


def test_the_task_takes_the_steps_of_ones_own_loop(
    net: anyprec.ConvertedModel, images: Tensor, labels: Tensor
) -> None:
    other = copy.deepcopy(net)
    recipe = anyprec.Recipe(feature_weight=0.1, error_weight=0.1, error_start=0.0)
    task = OneShotTask(net, total_steps=3, recipe=recipe, seed=3, verbose=False)
    train(task, images, labels, steps=3)
    oneshot = anyprec.OneShot(other, total_steps=3, seed=3, recipe=recipe)
    optimizer = torch.optim.SGD(anyprec.param_groups(other), lr=0.1, momentum=0.9, nesterov=True)
    other.train()
    for _ in range(3):
        for path in oneshot.paths():
            path.loss(other(images), labels, F.cross_entropy).backward()
        optimizer.step()
        optimizer.zero_grad()
        oneshot.step()
    for name, value in other.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], value, equal_nan=True)
    assert task.oneshot.steps_done == 3


def test_it_learns_with_ema_accumulation_and_soft_targets(
    net: anyprec.ConvertedModel, images: Tensor, labels: Tensor
) -> None:
    task = OneShotTask(
        net, total_steps=60, accumulation=2, criterion_kwargs={"smoothing": 0.1}, verbose=False
    )
    task.setup_ema(decay=0.5)
    losses = train(task, images, labels, steps=60, accumulation=2)
    task.update_ema(step=60)
    assert losses[-1] < 0.7 * losses[0]
    assert isinstance(task.get_eval_model(ema=True).module, anyprec.ConvertedModel)
    with net.using_bits(3):
        assert torch.isfinite(task.get_eval_model()(images)).all()


def test_a_timm_checkpoint_continues_the_draws(
    net: anyprec.ConvertedModel, images: Tensor, labels: Tensor
) -> None:
    task = OneShotTask(net, total_steps=9, verbose=False)
    train(task, images, labels, steps=2)
    state = copy.deepcopy(task.get_checkpoint_state())
    assert set(state) == {"state_dict", "task_state"}
    expected = task.oneshot.random_configs(3)
    resumed = OneShotTask(copy.deepcopy(net), total_steps=9, seed=99, verbose=False)
    resumed.load_checkpoint_state(state["state_dict"], task_state=state["task_state"])
    assert resumed.oneshot.steps_done == 2
    assert resumed.oneshot.random_configs(3) == expected


def test_losses_are_scaled_as_the_script_scales_them(
    net: anyprec.ConvertedModel, images: Tensor, labels: Tensor
) -> None:
    gradients = []
    for scale in (None, lambda loss: 4 * loss):
        net.zero_grad()
        task = OneShotTask(net.eval(), total_steps=1, scale=scale, verbose=False)
        loss = task(images, labels)["loss"]
        (loss if scale is None else scale(loss)).backward()
        gradients.append(net.head.weight.grad.clone())
    torch.testing.assert_close(4 * gradients[0], gradients[1])


def test_a_compiled_task_compiles_once(
    net: anyprec.ConvertedModel, images: Tensor, labels: Tensor
) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    task = OneShotTask(net, total_steps=3, verbose=False)
    task.compile(backend=counter)
    train(task, images, labels, steps=3)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"total_steps": 1, "accumulation": 0}, ValueError, "accumulation=0 must be at least 1"),
        ({"total_steps": 0}, ValueError, "total_steps=0 must be at least 1"),
        ({"total_steps": 1, "recipe": "paper"}, ValueError, "recipe='paper' is not a recipe"),
    ],
)
def test_bad_settings_are_refused(
    arguments: dict[str, Any], error: type[Exception], text: str, net: anyprec.ConvertedModel
) -> None:
    with pytest.raises(error, match=text):
        OneShotTask(net, verbose=False, **arguments)


def test_a_float_network_is_refused() -> None:
    with pytest.raises(
        anyprec.ConversionError, match="OneShotTask needs a converted model, got Linear"
    ):
        OneShotTask(nn.Linear(2, 2), total_steps=1)


def warmed_up(net: anyprec.ConvertedModel, images: Tensor, labels: Tensor) -> Any:
    """A task with an average, after a few steps."""
    task = OneShotTask(net, total_steps=20, verbose=False)
    task.setup_ema(decay=0.5)
    train(task, images, labels, steps=5)
    task.update_ema(step=5)
    return task


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("way", ["get_eval_model", "checkpoint"])
def test_what_is_validated_and_saved_has_norm_statistics_of_its_weights(
    way: str, ema: bool, net: anyprec.ConvertedModel, images: Tensor, labels: Tensor
) -> None:
    task = warmed_up(net, images, labels)
    trained = task.get_trainable_module(ema=True).module if ema else net
    reference = copy.deepcopy(trained)
    anyprec.update_norms(reference, [images] * 5, include_float=True)
    if way == "get_eval_model":
        evaluated = task.get_eval_model(ema=ema)
        evaluated = evaluated.module if ema else evaluated
    else:
        state = task.get_checkpoint_state(ema=ema)
        evaluated = copy.deepcopy(net)
        evaluated.load_state_dict(state["state_dict_ema" if ema else "state_dict"])
    for bits in (None, 2, 3, 8):
        with evaluated.eval().using_bits(bits), reference.eval().using_bits(bits), torch.no_grad():
            torch.testing.assert_close(evaluated(images), reference(images))


def test_validation_changes_no_training(
    net: anyprec.ConvertedModel, images: Tensor, labels: Tensor
) -> None:
    other = copy.deepcopy(net)
    for model in (net, other):
        task = OneShotTask(model, total_steps=20, verbose=False)
        for _ in range(2):
            train(task, images, labels, steps=3)
            if model is net:
                with torch.no_grad(), task.get_eval_model().eval().using_bits(3):
                    model(images)
                task.eval()
    unused = {id(parameter) for parameter in unused_parameters(net)}
    for (name, value), expected in zip(net.named_parameters(), other.parameters(), strict=True):
        if id(value) not in unused:
            assert torch.equal(value, expected), name

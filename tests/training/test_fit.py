"""`fit` and the parameter groups: the loop, its records, what it leaves and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math

import pytest
import timm
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import anyprec
from anyprec.errors import TrainingError
from anyprec.training.fit import _cosine


def accuracy(
    net: anyprec.ConvertedModel, loader: list[tuple[Tensor, Tensor]], bits: object
) -> float:
    with net.using_bits(bits), torch.no_grad():
        return sum(float((net(x).argmax(dim=1) == y).float().mean()) for x, y in loader) / len(
            loader
        )


def test_fit_teaches_every_bit_width(
    float_net: nn.Module, loader: list[tuple[Tensor, Tensor]]
) -> None:
    net = anyprec.convert(float_net, bits=(2, 3, 4, 8), example_input=loader[0][0])
    seen = []
    history = anyprec.fit(net, loader, epochs=8, lr=0.1, on_epoch_end=seen.append)
    assert seen == history
    assert [record.epoch for record in history] == list(range(8))
    assert len(history[0].losses) == 4
    assert sum(history[-1].losses) < 0.6 * sum(history[0].losses)
    assert history[0].images_per_second > 0
    assert not net.training
    assert net.bits is None
    for bits in (2, 3, 4, 8, (2, 8), None):
        assert accuracy(net, loader, bits) > 0.8, bits


def test_fit_is_deterministic(float_net: nn.Module, loader: list[tuple[Tensor, Tensor]]) -> None:
    states = []
    for _ in range(2):
        net = anyprec.convert(float_net, bits=(2, 8), example_input=loader[0][0], inplace=False)
        anyprec.fit(net, loader, epochs=1, seed=4)
        states.append(net.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_calibrated_model_is_not_calibrated_again(
    net: anyprec.ConvertedModel, loader: list[tuple[Tensor, Tensor]]
) -> None:
    with torch.no_grad():
        net.head.input_quantizer.step.mul_(2)
    before = net.head.input_quantizer.step.clone()
    anyprec.fit(net, loader[:1], epochs=1, lr=1e-9)
    torch.testing.assert_close(net.head.input_quantizer.step, before, rtol=1e-4, atol=0)


def test_a_users_optimizer_and_criterion_are_used(
    net: anyprec.ConvertedModel, loader: list[tuple[Tensor, Tensor]]
) -> None:
    optimizer = torch.optim.Adam([net.fc.weight], lr=0.01)
    head, fc = net.head.weight.clone(), net.fc.weight.clone()
    calls = []

    def criterion(output: Tensor, target: Tensor) -> Tensor:
        calls.append(len(target))
        return nn.functional.cross_entropy(output, target, label_smoothing=0.1)

    anyprec.fit(net, loader[:2], epochs=1, optimizer=optimizer, criterion=criterion, random_paths=1)
    assert calls == [16] * 4
    assert torch.equal(net.head.weight, head)
    assert not torch.equal(net.fc.weight, fc)


def test_gradients_are_clipped_by_value(
    net: anyprec.ConvertedModel, loader: list[tuple[Tensor, Tensor]]
) -> None:
    before = net.fc.weight.clone()
    optimizer = torch.optim.SGD([net.fc.weight], lr=1.0)
    anyprec.fit(
        net, loader[:1], epochs=1, optimizer=optimizer, clip_value=1e-3, norm_batches=0, warmup=0.0
    )
    change = (net.fc.weight - before).abs().max()
    assert 0 < change <= 1e-3 * (1 + 1e-5)


def test_the_schedule_warms_up_and_falls_on_a_cosine() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = _cosine(optimizer, 20, 4)
    rates = []
    for step in range(20):
        schedule.step_update(step + 0.5)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[:4] == pytest.approx([2 * (step + 0.5) / 4 for step in range(4)])
    assert rates[4:] == pytest.approx(
        [1 + math.cos(math.pi * (step + 0.5) / 16) for step in range(16)]
    )


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"epochs": 0}, ValueError, "epochs=0 must be at least 1"),
        ({"accumulation": 0}, ValueError, "accumulation=0 must be at least 1"),
        ({"lr": 0.0}, ValueError, "lr=0.0 must be positive"),
        ({"ema_decay": 1.0}, ValueError, "ema_decay=1.0 must be from 0, below 1"),
        (
            {"learning_rate": 0.1},
            ValueError,
            "no setting 'learning_rate' in a recipe; settings are random_paths, ",
        ),
        ({"autocast": torch.float16}, ValueError, "autocast=torch.float16 is not supported"),
        ({"warmup": 1.0}, ValueError, "warmup=1.0 is a fraction"),
        ({"random_paths": -1}, ValueError, "random_paths=-1"),
        ({"recipe": "paper"}, ValueError, r"recipe='paper' is not a recipe: .*Recipe\(\)"),
    ],
)
def test_bad_settings_are_refused(
    arguments: dict[str, float],
    error: type[Exception],
    text: str,
    net: anyprec.ConvertedModel,
    loader: list[tuple[Tensor, Tensor]],
) -> None:
    with pytest.raises(error, match=text):
        anyprec.fit(net, loader, **{"epochs": 1, **arguments})


def test_an_empty_loader_is_refused(net: anyprec.ConvertedModel) -> None:
    with pytest.raises(TrainingError, match="the training loader yields no batch"):
        anyprec.fit(net, [], epochs=1)


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched(
    net: anyprec.ConvertedModel, loader: list[tuple[Tensor, Tensor]]
) -> None:
    before = {name: value.clone() for name, value in net.named_parameters()}
    images, labels = loader[0]
    with pytest.raises(
        TrainingError, match="the loss of the max path is nan at step 0: lower the learning rate"
    ):
        anyprec.fit(net, [(images * math.nan, labels)], epochs=1)
    assert all(torch.equal(value, before[name]) for name, value in net.named_parameters())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert net.bits is None


def test_parameter_groups_go_by_what_a_parameter_is(net: anyprec.ConvertedModel) -> None:
    groups = {
        group["name"]: group
        for group in anyprec.param_groups(net, lr=0.1, weight_decay=0.01, step_lr_scale=0.5)
    }
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    found = {name: {names[id(p)] for p in group["params"]} for name, group in groups.items()}
    assert found["weights"] == {f"{path}.weight" for path in net.quantized_layers}
    assert all("quantizer.step" in name for name in found["step sizes"])
    assert len(found["step sizes"]) == 2 * len(net.quantized_layers)
    expected = {
        f"{norm}.bank.{part}" for norm in net.anyprec_record.norms for part in ("weight", "bias")
    }
    assert found["norms and biases"] == expected | {"head.bias", "fc.bias"}
    assert [groups[name]["weight_decay"] for name in found] == [0.01, 0.0, 0.0]
    assert [groups[name]["lr"] for name in found] == [0.1, 0.1, 0.05]


def test_parameters_that_timm_exempts_from_decay_and_frozen_ones_are_respected() -> None:
    model = anyprec.convert(timm.create_model("test_vit", img_size=48))
    model.head.weight.requires_grad_(False)
    groups = {
        group["name"]: group["params"] for group in anyprec.param_groups(model, weight_decay=0.01)
    }
    assert any(parameter is model.pos_embed for parameter in groups["norms and biases"])
    assert not any(
        parameter is model.head.weight for group in groups.values() for parameter in group
    )
    with pytest.raises(ValueError, match="step_lr_scale=0.1 needs lr="):
        anyprec.param_groups(model, step_lr_scale=0.1)


def test_accumulated_batches_are_one_step(
    float_net: nn.Module, loader: list[tuple[Tensor, Tensor]]
) -> None:
    """Three batches give the gradients of one that holds them all, where no norm mixes samples."""
    weights = []
    whole = [
        tuple(torch.cat(parts) for parts in zip(*loader[i : i + 3], strict=True)) for i in (0, 3)
    ]
    for batches, accumulation in ((loader, 3), (whole, 1)):
        torch.manual_seed(1)
        net = anyprec.convert(
            nn.Sequential(
                nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(),
                nn.Linear(8 * 144, 3),
            ),
            bits=(2, 4), example_input=loader[0][0],
        )  # fmt: skip
        anyprec.calibrate(net, whole[:1], batches=1)
        anyprec.fit(
            net,
            batches,
            epochs=1,
            accumulation=accumulation,
            warmup=0.0,
            clip_value=None,
            random_paths=0,
        )
        weights.append(net.state_dict())
    for name, value in weights[0].items():
        # Sums are in another order.
        torch.testing.assert_close(value, weights[1][name], rtol=1e-4, atol=1e-6)


def test_averaged_weights_are_what_remains(
    net: anyprec.ConvertedModel, loader: list[tuple[Tensor, Tensor]]
) -> None:
    plain, averaged = copy.deepcopy(net), copy.deepcopy(net)
    seen = []
    keep = lambda model: lambda _: seen.append(model.fc.weight.detach().clone())  # noqa: E731
    anyprec.fit(plain, loader[:1], epochs=3, on_epoch_end=keep(plain), norm_batches=0)
    anyprec.fit(averaged, loader[:1], epochs=3, ema_decay=0.5, norm_batches=0)
    expected = net.fc.weight.detach()
    # timm's warm-up: the first update copies, the later ones decay by at most ema_decay.
    decays = [
        ModelEmaV3(nn.Linear(1, 1), decay=0.5, use_warmup=True).get_decay(step)
        for step in (1, 2, 3)
    ]
    for weight, decay in zip(seen, decays, strict=True):
        expected = decay * expected + (1 - decay) * weight
    torch.testing.assert_close(averaged.fc.weight, expected)
    assert not torch.equal(averaged.fc.weight, plain.fc.weight)


def test_the_norm_of_gradients_is_clipped(
    net: anyprec.ConvertedModel, loader: list[tuple[Tensor, Tensor]]
) -> None:
    before = net.fc.weight.clone()
    optimizer = torch.optim.SGD([net.fc.weight], lr=1.0)
    anyprec.fit(
        net,
        loader[:1],
        epochs=1,
        optimizer=optimizer,
        clip_value=None,
        clip_norm=1e-3,
        norm_batches=0,
        warmup=0.0,
    )
    # The schedule is read in the middle of the only step, at half of the learning rate.
    assert (net.fc.weight - before).norm().item() == pytest.approx(0.5e-3, rel=1e-2)


def test_no_argument_of_fit_or_oneshot_hides_a_setting_of_the_recipe() -> None:
    settings = {field.name for field in dataclasses.fields(anyprec.Recipe)}
    for taker in (anyprec.OneShot, anyprec.fit):
        assert not settings & inspect.signature(taker).parameters.keys()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"feature_weight": -1.0}, "feature_weight=-1.0 must not be negative"),
        ({"error_start": 1.0}, "error_start=1.0 is a time: from 0, below 1"),
        ({"lr": None}, "lr=None must be positive"),
        ({"momentum": 1.0}, "momentum=1.0 must be from 0, below 1"),
        ({"sampler": "sandwhich"}, "sampler='sandwhich' is not known"),
    ],
)
def test_a_recipe_out_of_range_is_refused_when_it_is_made(
    changes: dict[str, object], text: str
) -> None:
    with pytest.raises(ValueError, match=text):
        anyprec.Recipe(**changes)


def test_the_papers_recipe_trains_with_every_part_of_the_method(
    float_net: nn.Module, loader: list[tuple[Tensor, Tensor]]
) -> None:
    recipe = anyprec.Recipe.paper()
    net = anyprec.convert(float_net, example_input=loader[0][0], **recipe.conversion)
    assert net.head.weight_quantizer.step.shape == (5, 1)
    assert net.anyprec_record.settings.norm == "per-pair"
    assert (recipe.sampler, recipe.random_weight) == ("uniform", recipe.random_paths)
    history = anyprec.fit(
        net, loader, epochs=8, recipe=recipe, lr=0.025, ema_decay=0.5, step_lr=1e-3
    )
    assert (
        history[-1].frozen == len(net.frozen) == 0
    )  # 3 layers have a choice, and 0.2 of them is none
    assert history[0].frozen == 1
    assert sum(history[-1].losses) < 0.7 * sum(history[0].losses)
    for bits in (2, 4, 6, None):
        assert accuracy(net, loader, bits) > 0.8, bits


def test_step_sizes_may_have_an_optimizer_of_their_own(
    net: anyprec.ConvertedModel, loader: list[tuple[Tensor, Tensor]]
) -> None:
    before = {
        path: layer.weight_quantizer.step.detach().clone()
        for path, layer in net.quantized_layers.items()
    }
    anyprec.fit(
        net,
        loader[:1],
        epochs=1,
        lr=10.0,
        clip_value=1e-6,
        step_lr=1e-3,
        warmup=0.0,
        norm_batches=0,
    )
    changes = [
        (net.quantized_layers[path].weight_quantizer.step - step).abs().max()
        for path, step in before.items()
    ]
    # Adam's first step is its learning rate, whatever the gradient; the schedule is read in the
    # middle of the only step.
    assert all(change.item() == pytest.approx(0.5e-3, rel=0.02) for change in changes)


def test_a_teacher_mixup_and_own_terms_take_part(
    net: anyprec.ConvertedModel, loader: list[tuple[Tensor, Tensor]]
) -> None:
    teacher = copy.deepcopy(net)
    teacher.train()
    seen = []

    def smallness(path: object, output: Tensor, targets: Tensor) -> Tensor:
        seen.append((path.is_max, targets.shape, targets.sum(dim=1)))
        return output.square().mean()

    mixup = timm.data.Mixup(mixup_alpha=0.4, label_smoothing=0.1, num_classes=5)
    history = anyprec.fit(
        net, loader[:2], epochs=1, teacher=teacher, mixup=mixup, terms=[smallness], random_paths=1
    )
    assert math.isfinite(sum(history[0].losses))
    assert teacher.training
    assert [is_max for is_max, _, _ in seen] == [True, False] * 2
    assert all(
        shape == (16, 5) and torch.allclose(total, torch.ones(16)) for _, shape, total in seen
    )


def test_forward_passes_may_run_in_bfloat16(
    float_net: nn.Module, loader: list[tuple[Tensor, Tensor]]
) -> None:
    net = anyprec.convert(float_net, bits=(2, 4, 8), example_input=loader[0][0])
    seen = set()
    net.fc.register_forward_hook(lambda _module, _args, output: seen.add(output.dtype))
    recipe = anyprec.Recipe(feature_weight=0.01, error_weight=0.1, error_start=0.0, lr=0.1)
    anyprec.fit(net, loader, epochs=6, recipe=recipe, autocast=torch.bfloat16, norm_batches=0)
    assert torch.bfloat16 in seen
    assert all(parameter.dtype == torch.float32 for parameter in net.parameters())
    anyprec.update_norms(net, loader)
    assert accuracy(net, loader, 4) > 0.8

"""The one-shot step: which paths, which losses, whose gradients."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import anyprec
from anyprec.bits import highest_config
from anyprec.errors import TrainingError
from anyprec.training.losses import distillation_loss


def run_step(
    net: anyprec.ConvertedModel, oneshot: anyprec.OneShot, images: Tensor, labels: Tensor
) -> list[float]:
    losses = []
    for path in oneshot.paths():
        loss = path.loss(net(images), labels, F.cross_entropy)
        loss.backward()
        losses.append(float(loss.detach()))
    oneshot.step()
    return losses


def test_the_max_path_comes_first_then_the_lowest_then_random_ones_each_active_in_turn(
    net: anyprec.ConvertedModel,
) -> None:
    net.set_bits(3)
    before = net.bits
    oneshot = anyprec.OneShot(net, total_steps=5, random_paths=3)
    configs = []
    for path in oneshot.paths():
        assert net.bits == path.config
        assert path.is_max == (path.index == 0)
        assert path.weight == (1 if path.is_max else 2 / 3)
        configs.append(path.config)
    assert all(bits == net.candidates[path].highest for path, bits in configs[0].items())
    assert all(bits == net.candidates[path].lowest for path, bits in configs[1].items())
    assert len(set(configs)) == 4
    assert net.bits == before


def test_leaving_the_loop_early_restores_the_precision(net: anyprec.ConvertedModel) -> None:
    net.set_bits(2)
    before = net.bits
    oneshot = anyprec.OneShot(net, total_steps=5)
    with pytest.raises(RuntimeError, match="stop"):
        for _ in oneshot.paths():
            raise RuntimeError("stop")
    assert net.bits == before


def test_draws_are_uniform_and_independent_over_the_candidates(net: anyprec.ConvertedModel) -> None:
    oneshot = anyprec.OneShot(net, total_steps=1, seed=3)
    draws = oneshot.random_configs(4000)
    for path, widths in (("head", 4), ("depthwise", 3)):
        pairs = Counter((config[path].weight, config[path].activation) for config in draws)
        assert len(pairs) == widths**2
        expected = 4000 / widths**2
        # Five standard deviations of a binomial count.
        assert all(abs(count - expected) < 5 * expected**0.5 for count in pairs.values())
    together = Counter((config["head"].weight, config["pointwise"].weight) for config in draws)
    assert len(together) == 16


def test_the_same_seed_draws_the_same_paths_and_a_state_goes_on_where_it_stood(
    net: anyprec.ConvertedModel,
) -> None:
    one, two = (anyprec.OneShot(net, total_steps=9, seed=5) for _ in range(2))
    torch.rand(3)  # the global generator does not matter
    assert one.random_configs(3) == two.random_configs(3)
    one.step()
    resumed = anyprec.OneShot(net, total_steps=9, seed=99)
    resumed.load_state_dict(one.state_dict())
    assert resumed.steps_done == 1
    assert resumed.random_configs(1) == one.random_configs(1)
    with pytest.raises(TrainingError, match=r"found keys \['steps'\]"):
        resumed.load_state_dict({"steps": 1})


def test_losses_are_task_then_task_and_distillation_each_with_its_weight(
    net: anyprec.ConvertedModel, images: Tensor, labels: Tensor
) -> None:
    oneshot = anyprec.OneShot(
        net, total_steps=1, random_paths=2, random_weight=1.4, distillation=0.3, temperature=2.0
    )
    net.eval()
    outputs, losses = [], []
    for path in oneshot.paths():
        outputs.append(net(images).detach())
        losses.append(path.loss(outputs[-1], labels, F.cross_entropy))
    target = torch.softmax(outputs[0] / 2, dim=1)
    for index, (output, loss) in enumerate(zip(outputs, losses, strict=True)):
        task = -torch.log_softmax(output, dim=1)[torch.arange(8), labels].mean()
        mimic = (
            4 * (target * (target.log() - torch.log_softmax(output / 2, dim=1))).sum(dim=1).mean()
        )
        expected = task if index == 0 else 0.7 * (0.7 * task + 0.3 * mimic)
        torch.testing.assert_close(loss, expected)


def test_no_gradient_flows_into_the_target_of_distillation() -> None:
    student, teacher = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    distillation_loss(student, teacher).backward()
    assert student.grad.any()
    assert teacher.grad is None


def test_the_max_path_counts_as_in_ordinary_training_and_the_random_ones_share_their_weight(
    net: anyprec.ConvertedModel, images: Tensor, labels: Tensor
) -> None:
    """With identical paths the step's gradient is that of one path times 1 + `random_weight`.

    K does not matter.
    """
    gradients = []
    highest = highest_config(net.candidates)
    for random_paths, random_weight in ((0, 1.0), (1, 1.0), (3, 1.0), (3, 3.0)):
        net.zero_grad()
        net.eval()
        oneshot = anyprec.OneShot(
            net,
            total_steps=1,
            random_paths=random_paths,
            random_weight=random_weight,
            distillation=0.0,
        )
        oneshot.random_configs = lambda count: [highest] * count
        run_step(net, oneshot, images, labels)
        gradients.append(net.head.weight.grad.clone())
    for found, times in zip(gradients, (1, 2, 2, 4), strict=True):
        torch.testing.assert_close(found, times * gradients[0])


def test_random_paths_share_their_weight_however_many_a_sampler_draws(
    net: anyprec.ConvertedModel,
) -> None:
    oneshot = anyprec.OneShot(net, total_steps=1, random_paths=3, random_weight=1.5)
    drawn = oneshot.random_configs(2)
    oneshot.random_configs = lambda count: drawn
    assert [path.weight for path in oneshot.paths()] == [1, 0.75, 0.75]


def test_a_step_reaches_every_layer_and_only_norm_copies(
    net: anyprec.ConvertedModel, images: Tensor, labels: Tensor
) -> None:
    net.train()
    oneshot = anyprec.OneShot(net, total_steps=1)
    run_step(net, oneshot, images, labels)
    for layer in net.quantized_layers.values():
        assert layer.weight.grad.any()
        assert layer.weight_quantizer.step.grad.any()
        assert layer.input_quantizer.step.grad.any()
    assert net.stem_norm.weight.grad is None
    assert net.stem_norm.bank.weight.grad.any()


def test_hooks_out_of_order_are_refused(
    net: anyprec.ConvertedModel, images: Tensor, labels: Tensor
) -> None:
    oneshot = anyprec.OneShot(net, total_steps=1)
    paths = oneshot.paths()
    next(paths)
    second = next(paths)
    with pytest.raises(
        TrainingError, match="call loss\\(\\) on every path in order, or set distillation=0"
    ):
        second.loss(net(images), labels, F.cross_entropy)
    paths.close()
    oneshot.step()
    with pytest.raises(TrainingError, match="total_steps=1 and has done them all"):
        oneshot.step()


def test_a_path_has_no_loss_once_the_loop_is_left(
    net: anyprec.ConvertedModel, images: Tensor, labels: Tensor
) -> None:
    oneshot = anyprec.OneShot(net, total_steps=1)
    paths = oneshot.paths()
    path = next(paths)
    paths.close()
    with pytest.raises(TrainingError, match="loss is taken inside the loop over paths()"):
        path.loss(net(images), labels, F.cross_entropy)


@pytest.mark.parametrize(
    ("output", "text"),
    [
        ((torch.zeros(2, 3), torch.zeros(2, 3)), "the network's output is tuple"),
        ({"logits": torch.zeros(2, 3)}, "the network's output is dict"),
        (torch.zeros(2, 5, 4, 4), r"is a tensor of shape \(2, 5, 4, 4\); set distillation=0"),
        (torch.zeros(2, 7, 3), r"is a tensor of shape \(2, 7, 3\); set distillation=0"),
        (torch.zeros(2), r"is a tensor of shape \(2,\)"),
        (torch.zeros(2, 1), r"of two classes or more: the network's output is a .*\(2, 1\)"),
    ],
)
def test_outputs_that_distillation_cannot_compare_are_refused_at_the_first_path(
    output: object, text: str, net: anyprec.ConvertedModel
) -> None:
    def criterion(_output: object, _targets: object) -> Tensor:
        return torch.zeros((), requires_grad=True)

    oneshot = anyprec.OneShot(net, total_steps=1)
    paths = oneshot.paths()
    with pytest.raises(TrainingError, match=text):
        next(paths).loss(output, None, criterion)
    paths.close()
    for settings in ({"distillation": 0.0}, {"random_paths": 0}):
        oneshot = anyprec.OneShot(net, total_steps=1, **settings)
        for path in oneshot.paths():
            assert path.loss(output, None, criterion) == 0
    if isinstance(output, Tensor):
        with pytest.raises(TrainingError, match=text):
            distillation_loss(output, output)


def test_logits_of_other_shapes_are_no_target_of_distillation(
    net: anyprec.ConvertedModel, images: Tensor, labels: Tensor
) -> None:
    paths = anyprec.OneShot(net, total_steps=1).paths()
    next(paths).loss(net(images), labels, F.cross_entropy)
    with pytest.raises(TrainingError, match=r"returned \(4, 5\), its target has \(8, 5\)"):
        next(paths).loss(net(images[:4]), labels[:4], F.cross_entropy)
    paths.close()


@pytest.mark.parametrize(
    ("teacher", "text"),
    [
        (nn.Conv2d(3, 5, 1), r"the teacher's output is a tensor of shape \(8, 5, 16, 16\)"),
        (nn.Sequential(nn.Flatten(), nn.Linear(768, 4)), r"its target has \(8, 4\)"),
    ],
)
def test_a_teacher_with_other_outputs_is_refused(
    teacher: nn.Module,
    text: str,
    net: anyprec.ConvertedModel,
    images: Tensor,
    labels: Tensor,
) -> None:
    oneshot = anyprec.OneShot(net, total_steps=1, teacher=teacher)
    with pytest.raises(TrainingError, match=text):
        for path in oneshot.paths(images):
            path.loss(net(images), labels, F.cross_entropy)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"total_steps": 0}, "total_steps=0 must be at least 1"),
        ({"random_paths": -1}, "random_paths=-1 must not be negative"),
        ({"random_weight": 0}, "random_weight=0 must be positive"),
        ({"distillation": 1.5}, "distillation=1.5 must be from 0 to 1"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"learning_rate": 0.1}, "no setting 'learning_rate' in a recipe; settings are random_"),
        ({"recipe": "paper"}, r"recipe='paper' is not a recipe: use anyprec.Recipe\(\) for the"),
        ({"recipe": anyprec.Recipe}, r"is not a recipe: use .* or anyprec.Recipe.paper\(\) for"),
    ],
)
def test_settings_out_of_range_are_refused(
    arguments: dict[str, float], text: str, net: anyprec.ConvertedModel
) -> None:
    with pytest.raises(ValueError, match=text):
        anyprec.OneShot(net, **{"total_steps": 1, **arguments})


def test_settings_come_from_a_recipe_and_single_ones_may_be_changed(
    net: anyprec.ConvertedModel,
) -> None:
    recipe = anyprec.Recipe(random_paths=1, distillation=0.2)
    assert anyprec.OneShot(net, total_steps=1).recipe == anyprec.Recipe()
    assert anyprec.OneShot(net, total_steps=1, recipe=recipe).recipe == recipe
    oneshot = anyprec.OneShot(net, total_steps=1, recipe=recipe, random_paths=2)
    assert oneshot.recipe == anyprec.Recipe(random_paths=2, distillation=0.2)
    assert len(list(oneshot.paths())) == 3


def test_a_users_own_loop_learns(
    net: anyprec.ConvertedModel, images: Tensor, labels: Tensor
) -> None:
    optimizer = torch.optim.SGD(anyprec.param_groups(net, lr=0.2), lr=0.2, momentum=0.9)
    oneshot = anyprec.OneShot(net, total_steps=40)
    net.train()
    losses = []
    for _ in range(40):
        losses.append(sum(run_step(net, oneshot, images, labels)))
        optimizer.step()
        optimizer.zero_grad()
    assert sum(losses[-3:]) < 0.5 * sum(losses[:3])
    for layer in net.quantized_layers.values():
        assert isinstance(layer, nn.Module)
        assert torch.isfinite(layer.weight_quantizer.step).all()


def test_random_paths_mimic_the_last_output_of_the_max_path(
    net: anyprec.ConvertedModel, images: Tensor, labels: Tensor
) -> None:
    paths = anyprec.OneShot(net, total_steps=1, distillation=1.0).paths()
    best = next(paths)
    output = net(images)
    best.loss(output, labels, F.cross_entropy)
    lowest = next(paths)
    student = net(images)
    for target in (output, output.flip(0)):
        best.loss(target, labels, F.cross_entropy)
        loss = lowest.loss(student, labels, F.cross_entropy)
        assert torch.equal(loss, lowest.weight * distillation_loss(student, target))
    paths.close()

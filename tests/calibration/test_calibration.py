"""Calibration: least squared error, every candidate, right statistics, all undone on failure."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from timm.layers import ScaledStdConv2d
from timm.utils import ModelEmaV3
from torch import Tensor, nn

import anyprec
from anyprec.bits import Bits
from anyprec.calibration.least_squares import input_grid, weight_steps
from anyprec.calibration.norm_inputs import float_statistics
from anyprec.calibration.norm_statistics import update_norms
from anyprec.calibration.norm_updates import update_copies
from anyprec.errors import CalibrationError, NotCalibratedError
from anyprec.model.intact import switchable_norms
from anyprec.nn.functional import fake_quantize
from anyprec.nn.quantizers import InputQuantizer, WeightQuantizer


def error(values: Tensor, step: float, qmin: int, qmax: int) -> float:
    return float(
        (fake_quantize(values, torch.tensor(step), qmin=qmin, qmax=qmax) - values).square().mean()
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weight_steps_are_within_a_percent_of_the_least_squared_error(bits: int) -> None:
    weight = torch.randn(3, 400) * torch.tensor([[0.02], [1.0], [30.0]])
    quantizer = WeightQuantizer((bits,), channels=3)
    steps = weight_steps(weight, quantizer)[0]
    qmin, qmax = quantizer.limits(0)
    for row, step in zip(weight, steps.tolist(), strict=True):
        largest = float(row.abs().max())
        best = min(
            error(row, largest * fraction / 2000, qmin, qmax) for fraction in range(1, 4001, 2)
        )
        assert error(row, step, qmin, qmax) <= 1.01 * best


def test_an_input_that_cannot_be_negative_gets_zero_point_zero() -> None:
    quantizer = InputQuantizer((2, 8), nonnegative=True)
    steps, zeros = input_grid(torch.rand(5000), quantizer)
    assert zeros.tolist() == [0, 0]
    torch.testing.assert_close(steps[1], torch.tensor(1 / 255), rtol=0.02, atol=0)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_lopsided_input_gets_a_zero_point_that_beats_the_symmetric_grid(bits: int) -> None:
    sample = nn.functional.silu(torch.randn(20000) * 1.5)
    quantizer = InputQuantizer((bits,), nonnegative=False)
    steps, zeros = input_grid(sample, quantizer)
    quantizer.set_grid(steps, zeros)
    assert quantizer.kind == "affine"
    assert 0 < int(zeros[0]) < 2 ** (bits - 2)
    half = 2 ** (bits - 1)
    symmetric = min(error(sample, 10 * k / 500 / half, -half, half - 1) for k in range(1, 500))
    assert error(sample, float(steps[0]), *quantizer.limits(0)) < 0.6 * symmetric


def test_an_input_that_is_always_zero_gets_a_usable_step() -> None:
    for nonnegative in (True, False):
        steps, _ = input_grid(torch.zeros(100), InputQuantizer((2, 8), nonnegative=nonnegative))
        assert (steps > 0).all()


def test_every_candidate_is_set_at_once_and_the_float_network_stays(
    float_net: nn.Module, images: Tensor
) -> None:
    expected = float_net(images)
    model = anyprec.convert(float_net, bits=(2, 4), example_input=images)
    model.train()
    anyprec.calibrate(model, [(images, None)])
    assert model.training
    assert model.bits is None
    for layer in model.quantized_layers.values():
        assert torch.isfinite(layer.weight_quantizer.step).all()
        assert torch.isfinite(layer.input_quantizer.step).all()
        assert not layer.operand_observers
    assert torch.equal(model.eval()(images), expected)


def test_calibration_is_deterministic(small_net: Callable[..., nn.Module], images: Tensor) -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(7)
        model = anyprec.convert(small_net().eval(), bits=(2, 4), example_input=images)
        anyprec.calibrate(
            model, [torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(3))]
        )
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_standardised_weight_gets_the_steps_of_the_standardised_values() -> None:
    model = nn.Sequential(ScaledStdConv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1)).eval()
    model[0].weight.data.mul_(1000)  # a scale that standardisation removes
    model = anyprec.convert(
        model, bits=(4,), first_last_bits=None, example_input=torch.randn(1, 3, 8, 8)
    )
    anyprec.calibrate(model, [torch.randn(4, 3, 8, 8)])
    assert float(model[0].weight_quantizer.step.detach().max()) < 0.2


def test_anchored_statistics_do_not_move_where_quantization_changes_nothing(
    float_net: nn.Module, images: Tensor
) -> None:
    stored = float_net.pointwise_norm.running_mean.clone()
    model = anyprec.convert(float_net, bits=(2, 8), example_input=images)
    anyprec.calibrate(model, [images])
    bank = model.pointwise_norm.bank
    highest, lowest = bank.running_mean[-1], bank.running_mean[0]
    spread = float_net.pointwise_norm.running_var.sqrt()
    assert ((highest - stored).abs() < 0.05 * spread).all()
    assert ((lowest - stored).abs() > (highest - stored).abs()).any()


def test_anchored_statistics_do_not_depend_on_how_images_differ_between_batches(
    float_net: nn.Module, images: Tensor
) -> None:
    """Each batch is compared with itself: at 8 bits, other brightness leaves no trace."""
    model = anyprec.convert(float_net, bits=(8,), example_input=images)
    anyprec.calibrate(model, [images - 2, images, images + 2], batches=3, norm_batches=3)
    for norm in (model.stem_norm, model.depthwise_norm, model.pointwise_norm):
        shift = (norm.bank.running_mean - norm.running_mean).abs() / norm.running_var.sqrt()
        assert (shift < 0.02).all()


def test_moved_weights_move_the_statistics_of_the_float_network_once_however_many_batches(
    float_net: nn.Module, images: Tensor
) -> None:
    model = anyprec.convert(float_net, bits=(4, 8), example_input=images[:1])
    anyprec.calibrate(model, [images])
    norms = {path: norm for path, norm in switchable_norms(model) if norm.bank is not None}
    batches = list(images.split(2))
    with torch.no_grad():
        reference = float_statistics(model.eval(), norms, batches)
        before = model.stem_norm.running_mean.clone(), model.stem_norm.running_var.clone()
        model.stem.weight.mul_(3)
    update_copies(model, norms, batches, [Bits(4, 4), None], reference=reference)
    mean = reference["stem_norm", len(batches)][0]
    assert torch.allclose(model.stem_norm.running_mean, before[0] + 2 * mean.float(), atol=1e-4)
    assert torch.allclose(model.stem_norm.running_var, 9 * before[1], rtol=1e-3)


def test_plain_statistics_are_those_of_all_batches_together(net: anyprec.ConvertedModel) -> None:
    batches = [torch.randn(size, 3, 16, 16) + size for size in (8, 8, 3)]
    seen: list[Tensor] = []
    handle = net.stem_norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].double()))
    with net.using_bits(8), torch.no_grad():
        for batch in batches:
            net(batch)
    handle.remove()
    update_norms(net, batches)
    everything = torch.cat(seen).transpose(0, 1).flatten(1)
    bank = net.stem_norm.bank
    torch.testing.assert_close(bank.running_mean[0], everything.mean(dim=1).float())
    torch.testing.assert_close(bank.running_var[0], everything.var(dim=1).float())


def test_a_copy_is_estimated_at_its_own_precision(
    net: anyprec.ConvertedModel, images: Tensor
) -> None:
    update_norms(net, [images])
    for bits, row in ((4, 1 * 3 + 1), (8, 2 * 3 + 2)):
        seen: list[Tensor] = []
        handle = net.depthwise_norm.register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0])
        )
        with net.using_bits(bits), torch.no_grad():
            net(images)
        handle.remove()
        torch.testing.assert_close(
            net.depthwise_norm.bank.running_mean[row], seen[0].mean(dim=(0, 2, 3))
        )


def test_float_statistics_are_re_estimated_only_on_request(net: anyprec.ConvertedModel) -> None:
    before = net.stem_norm.running_mean.clone()
    batches = [torch.randn(8, 3, 16, 16) + 2]
    update_norms(net, batches)
    assert torch.equal(net.stem_norm.running_mean, before)
    update_norms(net, batches, include_float=True)
    assert not torch.equal(net.stem_norm.running_mean, before)
    with pytest.raises(ValueError, match="choose one"):
        update_norms(net, batches, include_float=True, anchored=True)


@pytest.mark.parametrize("norm", ["shared-affine", "per-pair"])
def test_after_training_the_float_network_takes_over_the_scale_and_shift_of_the_highest_precision(
    float_net: nn.Module, images: Tensor, norm: str
) -> None:
    net = anyprec.convert(float_net, (2, 4, 8), norm=norm, example_input=images)
    anyprec.calibrate(net, [images])
    before = net.depthwise_norm.weight.clone()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for bank in (net.stem_norm.bank, net.depthwise_norm.bank):
            # What training would do.
            bank.weight.mul_(1 + torch.rand(bank.weight.shape, generator=generator))
            bank.bias.add_(torch.rand(bank.bias.shape, generator=generator))
    update_norms(net, [images])
    assert torch.equal(net.depthwise_norm.weight, before)
    update_norms(net, [images], include_float=True)
    for own in (net.stem_norm, net.depthwise_norm):
        assert torch.equal(own.weight, own.bank.weight[-1])
        assert torch.equal(own.bias, own.bank.bias[-1])
    with net.using_bits(8), torch.no_grad():
        expected = net(images)
    with net.using_bits(None), torch.no_grad():
        found = net(images)
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()


def test_what_the_float_network_learned_after_conversion_reaches_every_precision(
    float_net: nn.Module, images: Tensor
) -> None:
    net = anyprec.convert(float_net, (2, 4, 8), example_input=images)
    with torch.no_grad():
        net.depthwise_norm.weight.mul_(3)
        net.stem_norm.bias.add_(1)
    anyprec.calibrate(net, [images])
    for own in (net.stem_norm, net.depthwise_norm):
        assert torch.equal(own.weight.expand_as(own.bank.weight), own.bank.weight)
        assert torch.equal(own.bias.expand_as(own.bank.bias), own.bank.bias)


@pytest.mark.parametrize(
    ("batches", "text"),
    [
        ([], "the loader yields no batch"),
        (
            [torch.full((2, 3, 16, 16), math.nan)],
            "the calibration images hold NaN or infinite values",
        ),
        (
            [torch.full((2, 3, 16, 16), math.inf)],
            "the calibration images hold NaN or infinite values",
        ),
        (
            [torch.full((2, 3, 16, 16), 1e38)],
            "the input of layer 'depthwise' holds NaN or infinite values",
        ),
    ],
)
def test_bad_data_is_refused_and_nothing_changes(
    batches: list[Tensor], text: str, net: anyprec.ConvertedModel, images: Tensor
) -> None:
    net.set_bits(3)
    before, expected = {k: v.clone() for k, v in net.state_dict().items()}, net(images)
    net.stem.weight.data.mul_(1.0 if "depthwise" not in text else 1e5)
    weight = net.stem.weight.clone()
    with pytest.raises(CalibrationError, match=text):
        anyprec.calibrate(net, batches)
    assert torch.equal(net.stem.weight, weight)
    net.load_state_dict({**net.state_dict(), "stem.weight": before["stem.weight"]})
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(net(images), expected)


def test_a_failure_in_the_norm_pass_restores_the_steps_too(
    net: anyprec.ConvertedModel, images: Tensor
) -> None:
    before = {name: value.clone() for name, value in net.state_dict().items()}
    calls = 0

    def fail_late(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise RuntimeError("the power went out")

    handle = net.register_forward_pre_hook(fail_late)
    with pytest.raises(RuntimeError, match="power"):
        anyprec.calibrate(net, [images + 1])
    handle.remove()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.bits is None


def test_a_weight_that_is_not_finite_is_refused(float_net: nn.Module, images: Tensor) -> None:
    model = anyprec.convert(float_net, bits=(2, 4), example_input=images)
    model.fc.weight.data[0, 0] = math.nan
    with pytest.raises(CalibrationError, match="a weight holds NaN or infinite values"):
        anyprec.calibrate(model, [images])
    with pytest.raises(NotCalibratedError):
        model.set_bits(4)


def test_statistics_of_a_configuration_belong_to_it_alone(
    net: anyprec.ConvertedModel, images: Tensor
) -> None:
    net.eval()
    mixed = {"head": (2, 3), "pointwise": (3, 2)}
    others = [None, 2, 4, {**mixed, "head": 4}]
    before = [net(images) for bits in others if net.set_bits(bits) is None]
    net.set_bits(mixed)
    plain = net(images)
    net.set_bits(3)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    config = net.resolve_bits(mixed)
    anyprec.update_norms(net, [torch.randn(32, 3, 16, 16)], config)
    assert net.bits == net.resolve_bits(3)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    net.set_bits(mixed)
    assert net.bits == config
    own = net(images)
    assert not torch.equal(own, plain)
    with net.using_bits(2):
        pass
    assert torch.equal(net(images), own)
    after = [net(images) for bits in others if net.set_bits(bits) is None]
    assert all(torch.equal(here, there) for here, there in zip(before, after, strict=True))


def test_statistics_of_a_configuration_are_those_of_a_norm_in_train_mode(
    net: anyprec.ConvertedModel,
) -> None:
    """Layer by layer, at the configuration itself: as one big batch in train mode, momentum 1."""
    batch = torch.randn(64, 3, 16, 16)
    config = net.resolve_bits({"head": (2, 3), "pointwise": (3, 2)})
    anyprec.update_norms(net, [batch], config)
    found = net.anyprec_record.statistics[config]
    net.set_bits(config)
    for norm in (net.stem_norm, net.pointwise_norm, net.joint_norm):
        norm.momentum = 1.0
    net.depthwise_norm.momentum = 1.0
    net.train()(batch)
    for path in ("stem_norm", "depthwise_norm", "pointwise_norm", "joint_norm"):
        norm = net.get_submodule(path)
        # Rounding differs in the last digit, and a value next to a rounding threshold may then
        # flip by a whole step.
        torch.testing.assert_close(
            found[path][0], norm.bank.running_mean[norm.row], rtol=1e-2, atol=1e-3
        )
        torch.testing.assert_close(
            found[path][1], norm.bank.running_var[norm.row], rtol=1e-2, atol=1e-3
        )


def test_statistics_of_the_active_configuration_take_effect_at_once(
    net: anyprec.ConvertedModel, images: Tensor
) -> None:
    net.set_bits(2)
    before = net.eval()(images)
    anyprec.update_norms(net, [torch.randn(32, 3, 16, 16)], 2)
    assert not torch.equal(net(images), before)
    assert not torch.equal(copy.deepcopy(net)(images), before)


def test_an_update_of_one_configuration_that_fails_leaves_the_model_as_it_was(
    net: anyprec.ConvertedModel, images: Tensor
) -> None:
    net.set_bits(2)
    before = net.eval()(images)
    with pytest.raises(CalibrationError, match="came out not finite"):
        anyprec.update_norms(net, [images * math.nan], 2)
    with pytest.raises(anyprec.BitsError, match="include_float=True"):
        anyprec.update_norms(net, [images], None)
    assert torch.equal(net(images), before)
    assert net.anyprec_record.statistics == {}


@pytest.mark.parametrize("option", [{"anchored": True}, {"include_float": True}])
def test_options_of_all_precisions_are_refused_for_a_configuration(
    net: anyprec.ConvertedModel, images: Tensor, option: dict[str, bool]
) -> None:
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError, match='need bits="all", got bits=2'):
        anyprec.update_norms(net, [images], 2, **option)
    with pytest.raises(anyprec.BitsError, match="include_float=True"):
        anyprec.update_norms(net, [images], None, **option)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.anyprec_record.statistics == {}


def test_training_on_drops_statistics_of_a_configuration(
    net: anyprec.ConvertedModel, images: Tensor
) -> None:
    anyprec.update_norms(net, [images], 2)
    assert net.anyprec_record.statistics
    oneshot = anyprec.OneShot(net, total_steps=1)
    oneshot.step()
    assert net.anyprec_record.statistics == {}


def test_norms_that_all_precisions_share_are_not_re_estimated(
    float_net: nn.Module, images: Tensor
) -> None:
    net = anyprec.convert(float_net, bits=(2, 4), norm="shared", example_input=images[:1])
    before = net.stem_norm.running_mean.clone()
    anyprec.calibrate(net, [images])
    anyprec.update_norms(net, [images], include_float=True)
    assert torch.equal(net.stem_norm.running_mean, before)


@pytest.mark.parametrize("norm", ["per-pair", "shared-affine"])
def test_every_uniform_precision_has_the_statistics_of_its_own_configuration(
    norm: str, float_net: nn.Module, images: Tensor
) -> None:
    """Also where a copy serves several: the depthwise layer takes 3 bits in W2A2 too."""
    net = anyprec.convert(float_net, bits=(2, 3, 4, 8), norm=norm, example_input=images[:1])
    anyprec.calibrate(net, [images])
    batches = [torch.randn(32, 3, 16, 16) for _ in range(2)]
    update_norms(net, batches)
    assert net.bits is None
    for width in (2, 3, 4, 8):
        net.set_bits(width)
        found = {
            path: net.get_submodule(path).active_statistics() for path in net.anyprec_record.norms
        }
        again = copy.deepcopy(net)
        config = again.resolve_bits(width)
        anyprec.update_norms(again, batches, config)
        for path, statistics in again.anyprec_record.statistics[config].items():
            assert all(
                torch.equal(*parts) for parts in zip(found[path], statistics, strict=True)
            ), (width, path)


def test_statistics_of_uniform_precisions_take_effect_at_once_and_go_where_the_state_goes(
    float_net: nn.Module, small_net: Callable[..., nn.Module], images: Tensor, tmp_path: Path
) -> None:
    net = anyprec.convert(float_net, bits=(2, 3, 8), example_input=images[:1])
    anyprec.calibrate(net, [images])
    net.set_bits(2)
    before = net.eval()(images)
    update_norms(net, [torch.randn(32, 3, 16, 16)])
    expected = net(images)
    assert not torch.equal(expected, before)
    assert net.depthwise_norm.uniform is not None
    assert net.pointwise_norm.uniform is None  # its copy for W2A2 serves nothing else
    other = anyprec.convert(small_net(), bits=(2, 3, 8), example_input=images[:1])
    other.load_state_dict(net.state_dict())
    models = [other, copy.deepcopy(net)]
    for packed in (False, True):
        file = tmp_path / f"{packed}.safetensors"
        anyprec.save(net, file, packed=packed, rebuildable=False)
        models += [anyprec.load(file, small_net()), anyprec.load(file, small_net(), bits=2)]
    anyprec.save(models[-1], tmp_path / "alone.safetensors", packed=True, rebuildable=False)
    models.append(anyprec.load(tmp_path / "alone.safetensors", small_net()))
    for model in models:
        model.eval().set_bits(2)
        assert torch.equal(model(images), expected)
    other.load_state_dict(net.float_state_dict())
    anyprec.calibrate(other, [images])
    other.set_bits(2)
    assert torch.equal(other.eval()(images), before)


def test_training_drops_statistics_of_uniform_precisions(
    net: anyprec.ConvertedModel, images: Tensor
) -> None:
    with net.using_bits(2):
        assert net.joint_norm.uniform is not None
    with net.using_bits(2):
        net.train()(images)
    net.eval().set_bits(2)
    assert net.joint_norm.uniform is None
    assert not net.joint_norm.bank.has_uniform
    assert torch.isnan(net.joint_norm.bank.uniform_mean).all()
    update_norms(net, [images])
    assert net.joint_norm.uniform is not None
    anyprec.OneShot(net, total_steps=1).step()
    net.set_bits(2)
    assert net.joint_norm.uniform is None


def test_a_mixed_configuration_takes_the_copies(net: anyprec.ConvertedModel) -> None:
    for request in ({"*": 2, "head": 4}, (2, 3), {"*": 3, "depthwise": 4}):
        net.set_bits(request)
        assert net.joint_norm.uniform is None
    net.set_bits({"*": 3})
    assert net.joint_norm.uniform is not None


def test_statistics_of_uniform_precisions_come_back_when_an_estimate_fails(
    net: anyprec.ConvertedModel, images: Tensor
) -> None:
    net.eval().set_bits(2)
    before = net(images)
    with pytest.raises(CalibrationError, match="came out not finite"):
        update_norms(net, [images * math.nan])
    assert torch.equal(net(images), before)


def test_an_average_of_weights_from_outside_falls_back_to_the_copies(
    net: anyprec.ConvertedModel, images: Tensor
) -> None:
    average = ModelEmaV3(net, decay=0.5)
    for _ in range(2):
        with net.using_bits(2):
            net.train()(images)
        average.update(net)
    module = average.module.eval()
    with module.using_bits(2):
        assert torch.isfinite(module(images)).all()


def test_a_copy_of_several_uniform_precisions_has_the_statistics_of_the_highest(
    net: anyprec.ConvertedModel,
) -> None:
    update_norms(net, [torch.randn(32, 3, 16, 16)])
    bank = net.joint_norm.bank
    assert torch.equal(bank.running_mean[0], bank.uniform_mean[-1])
    assert torch.equal(bank.running_var[0], bank.uniform_var[-1])
    assert not torch.equal(bank.running_var[0], bank.uniform_var[0])

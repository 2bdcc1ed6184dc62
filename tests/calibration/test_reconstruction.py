"""`reconstruct`: all precisions nearer to the float network, from unlabelled images alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import anyprec
from anyprec.calibration import reconstruction
from anyprec.calibration.reconstruction_losses import output_loss, relative_error
from anyprec.errors import CalibrationError, ConversionError, PackedError

BITS = (2, 3, 4, 8)


class Block(nn.Module):
    """A residual unit."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 1, bias=False)
        self.last_norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.last_norm(self.second(torch.relu(self.norm(self.first(x))))))


class Residual(nn.Module):
    """A stem, two residual units and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(Block(8), Block(8))
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(torch.relu(self.stem_norm(self.stem(x))))
        return self.head(x.mean(dim=(2, 3)))


@pytest.fixture
def images() -> Tensor:
    return F.interpolate(torch.randn(96, 3, 4, 4), size=12, mode="bilinear")


@pytest.fixture
def loader(images: Tensor) -> list[Tensor]:
    return list(images[:64].split(16))


@pytest.fixture
def net(loader: list[Tensor]) -> anyprec.ConvertedModel:
    network = Residual().train()
    for _ in range(40):  # statistics of its own
        network(loader[0])
    model = anyprec.convert(network.eval(), bits=BITS, example_input=loader[0][:1])
    anyprec.calibrate(model, loader)
    return model


def outputs(model: anyprec.ConvertedModel, images: Tensor, bits: Any) -> Tensor:
    with model.using_bits(bits), torch.no_grad():
        return model.eval()(images)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def test_low_precisions_come_nearer_to_the_float_network(
    net: anyprec.ConvertedModel, images: Tensor, loader: list[Tensor]
) -> None:
    used, configs = images[:64], [3, 4, {"blocks.0.*": (3, 4), "blocks.1.*": (4, 3)}]
    target = outputs(net, used, None)

    def errors() -> Tensor:
        return torch.stack([relative_error(outputs(net, used, bits), target) for bits in configs])

    before = errors()
    anyprec.reconstruct(net, loader, steps=120)
    ratios = errors() / before
    assert ratios.log().mean().exp() < 0.9
    # Both have moved a little.
    assert relative_error(outputs(net, used, 8), target) < 0.3 * before[0]
    assert relative_error(outputs(net, used, None), target) < 0.3 * before[0]


def test_one_seed_is_one_result_and_nobody_else_draws_otherwise(
    net: anyprec.ConvertedModel, loader: list[Tensor]
) -> None:
    other, third = copy.deepcopy(net), copy.deepcopy(net)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    anyprec.reconstruct(net, loader, steps=4)
    assert torch.equal(torch.rand(4), expected)
    anyprec.reconstruct(other, loader, steps=4)
    anyprec.reconstruct(third, loader, steps=4, seed=1)
    assert same(net.state_dict(), other.state_dict())
    assert not same(net.state_dict(), third.state_dict())


def test_a_model_that_is_not_calibrated_is_calibrated_first(loader: list[Tensor]) -> None:
    float_net = Residual().eval()
    models = []
    for calibrated in (True, False):
        model = anyprec.convert(copy.deepcopy(float_net), bits=BITS, example_input=loader[0][:1])
        if calibrated:
            anyprec.calibrate(model, loader)
        anyprec.reconstruct(model, loader, steps=2)
        models.append(model)
    assert same(models[0].state_dict(), models[1].state_dict())


def test_labels_are_ignored_and_precision_mode_and_gradients_are_left_as_they_were(
    net: anyprec.ConvertedModel, loader: list[Tensor]
) -> None:
    net.set_bits(3)
    net.train()
    net.stem.weight.requires_grad_(requires_grad=False)
    labelled = [(batch, torch.zeros(len(batch), dtype=torch.long)) for batch in loader]
    anyprec.reconstruct(net, labelled, steps=2)
    assert net.bits == net.resolve_bits(3)
    assert net.training
    required = {name for name, value in net.named_parameters() if not value.requires_grad}
    assert required == {"stem.weight"}
    assert all(parameter.grad is None for parameter in net.parameters())
    for name, norm in net.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.override is None, name


def test_layers_of_one_bit_width_stay_as_they_are(
    net: anyprec.ConvertedModel, loader: list[Tensor]
) -> None:
    before = state_of(net)
    anyprec.reconstruct(net, loader, steps=6)
    moved = [
        name for name, value in net.state_dict().items() if not torch.equal(value, before[name])
    ]
    assert {"blocks.0.first.weight", "blocks.1.second.weight_quantizer.step"} <= set(moved)
    assert not {name for name in moved if name.startswith(("stem.", "head."))}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("calibrated", [True, False])
def test_a_run_that_ends_early_leaves_the_model_as_it_was(
    loader: list[Tensor], monkeypatch: pytest.MonkeyPatch, error: Any, calibrated: bool
) -> None:
    model = anyprec.convert(Residual().eval(), bits=BITS, example_input=loader[0][:1])
    if calibrated:
        anyprec.calibrate(model, loader)
        anyprec.update_norms(model, loader, 4)
        model.set_bits(4)
    before, bits = state_of(model), model.bits
    expected = outputs(model, loader[0], bits)
    real, calls = reconstruction.update_copies, []

    def fail(*arguments: Any, **settings: Any) -> None:
        calls.append(1)
        real(*arguments, **settings)
        raise error

    monkeypatch.setattr(reconstruction, "update_copies", fail)
    with pytest.raises(error):
        anyprec.reconstruct(model, loader, steps=3)
    assert calls
    after = model.state_dict()
    for name, value in before.items():
        assert torch.equal(after[name].nan_to_num(), value.nan_to_num()), name
    assert model.bits == bits
    assert torch.equal(outputs(model, loader[0], bits), expected)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_cannot_be_is_refused(
    net: anyprec.ConvertedModel, loader: list[Tensor], tmp_path: Path
) -> None:
    with pytest.raises(ConversionError):
        anyprec.reconstruct(Residual(), loader)  # type: ignore[arg-type]
    for settings in ({"steps": 0}, {"steps": 1.5}, {"batches": 0}):
        with pytest.raises(CalibrationError):
            anyprec.reconstruct(net, loader, **settings)  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match="yields no batch"):
        anyprec.reconstruct(net, [])
    before = state_of(net)
    with pytest.raises(CalibrationError, match="loss is nan"):
        anyprec.reconstruct(net, [torch.full_like(loader[0], torch.nan)], steps=1)
    assert same(net.state_dict(), before)
    file = tmp_path / "net.safetensors"
    anyprec.save(net, file, packed=True, rebuildable=False)
    with pytest.raises(PackedError):
        anyprec.reconstruct(anyprec.load(file, Residual().eval()), loader)


def test_the_file_holds_what_was_reconstructed(
    net: anyprec.ConvertedModel, loader: list[Tensor], tmp_path: Path
) -> None:
    anyprec.reconstruct(net, loader, steps=4)
    for packed in (False, True):
        file = tmp_path / f"{packed}.safetensors"
        anyprec.save(net, file, packed=packed, rebuildable=False)
        again = anyprec.load(file, Residual().eval())
        for bits in BITS:
            assert torch.equal(outputs(again, loader[0], bits), outputs(net, loader[0], bits))


def test_statistics_of_configurations_belong_to_other_weights_and_are_dropped(
    net: anyprec.ConvertedModel, loader: list[Tensor]
) -> None:
    anyprec.update_norms(net, loader, (3, 4))
    assert net.anyprec_record.statistics
    anyprec.reconstruct(net, loader, steps=1)
    assert not net.anyprec_record.statistics


def test_images_of_several_sizes_and_fewer_than_a_step_takes(net: anyprec.ConvertedModel) -> None:
    before = state_of(net)
    anyprec.reconstruct(net, [torch.randn(3, 3, 12, 12), torch.randn(2, 3, 16, 14)], steps=2)
    assert not same(net.state_dict(), before)
    anyprec.reconstruct(net, [torch.randn(1, 3, 12, 12)], steps=2)


def layer_norms() -> nn.Module:
    body = nn.Sequential(nn.Linear(12, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 16))
    return nn.Sequential(nn.Flatten(2), body, nn.Flatten(), nn.Linear(48, 3))


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (layer_norms, {}),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(432, 4)), {}),
        (Residual, {"norm": "shared"}),
        (Residual, {"norm": "per-pair"}),
        (Residual, {"placement": "integer"}),
        (Residual, {"activation_scale": "power-of-two"}),
        (Residual, {"per_channel": False}),
    ],
)
def test_any_network_is_taken(
    make: Callable[[], nn.Module], settings: dict[str, Any], images: Tensor
) -> None:
    images = images[:8, :, :, :4].contiguous() if make is layer_norms else images[:8]
    if make is layer_norms:
        images = images[:, :, :3]
    model = anyprec.convert(make().eval(), bits=BITS, example_input=images[:1], **settings)
    anyprec.reconstruct(model, [images], steps=3)
    widths = {width for layer in model.candidates.values() for width in layer.weight}
    for bits in (None, *widths):
        assert outputs(model, images, bits).isfinite().all()


def test_the_loss_of_an_output_is_a_divergence_or_a_relative_error() -> None:
    one, other = torch.randn(2, 4, 5).unbind()
    expected = F.kl_div(one.log_softmax(1), other.softmax(1), reduction="batchmean")
    assert torch.equal(output_loss(one, other), expected)
    maps = one.reshape(2, 2, 5), other.reshape(2, 2, 5)
    error = (one - other).square().sum() / other.square().sum()
    assert torch.allclose(output_loss(*maps), error)
    both = {"logits": one, "maps": [maps[0]]}, {"logits": other, "maps": [maps[1]]}
    assert torch.allclose(output_loss(*both), (expected + error) / 2)
    assert relative_error(torch.ones(3), torch.zeros(3)).isfinite()


class WithNeck(Residual):
    """A layer between the last block and the classifier that has several bit-widths."""

    def __init__(self) -> None:
        super().__init__()
        self.neck = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(torch.relu(self.stem_norm(self.stem(x))))
        return self.head(torch.relu(self.neck(x.mean(dim=(2, 3)))))


def test_what_is_behind_the_last_block_learns_from_the_output(loader: list[Tensor]) -> None:
    model = anyprec.convert(WithNeck().eval(), bits=BITS, example_input=loader[0][:1])
    anyprec.calibrate(model, loader)
    before = model.neck.weight.clone()
    anyprec.reconstruct(model, loader, steps=2)
    assert not torch.equal(model.neck.weight, before)


def test_units_are_cut_off_mixed_and_normalised_as_their_batch_has_it(
    net: anyprec.ConvertedModel, loader: list[Tensor]
) -> None:
    given: list[Tensor] = []
    changed: list[float] = []
    corrected: list[bool] = []
    block = net.blocks[1]

    def compare(_layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        if net.bits is not None and torch.is_grad_enabled():
            positive = given[-1] > 0
            changed.append(float((args[0] != given[-1])[positive].float().mean()))

    def note(norm: nn.Module, _args: Any, _output: Any) -> None:
        if net.bits is not None and torch.is_grad_enabled():
            corrected.append(norm.override is not None)  # type: ignore[attr-defined]

    # Before those of the run, which sees what these let through.
    block.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    block.first.register_forward_pre_hook(compare)
    block.norm.register_forward_hook(note)
    anyprec.reconstruct(net, loader, steps=6)
    assert not any(value.requires_grad for value in given)
    # Half of the values, where the two differ.
    assert len(changed) == len(corrected) == 6
    assert all(0.3 < share < 0.65 for share in changed)
    assert all(corrected)

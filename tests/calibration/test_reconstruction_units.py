"""The parts of a network that are reconstructed each for itself, and what moves them."""

from __future__ import annotations

from collections import Counter

import pytest
import timm
import torch
from torch import Tensor, nn

import anyprec
from anyprec.bits import Bits, LayerCandidates
from anyprec.calibration.reconstruction_draws import Draws
from anyprec.calibration.reconstruction_units import Units, find_units
from anyprec.calibration.scaled_adam import ScaledAdam


def units_of(network: nn.Module, images: Tensor) -> Units:
    model = anyprec.convert(network.eval(), example_input=images)
    return find_units(model, images)


def test_residual_units_and_transformer_blocks_are_blocks() -> None:
    found = units_of(timm.create_model("test_resnet"), torch.randn(1, 3, 32, 32))
    stem = ("conv1.0", "conv1.3", "conv1.6")
    assert found.inner == (*stem, *(f"layer{number}.0" for number in range(1, 5)))
    assert found.tail == ("fc",)
    assert found.starts == (*found.inner, "fc")
    found = units_of(timm.create_model("test_vit", img_size=32), torch.randn(1, 3, 32, 32))
    assert found.inner == ("patch_embed", *(f"blocks.{number}" for number in range(6)))
    assert found.tail == ("head",)
    found = units_of(timm.create_model("test_efficientnet"), torch.randn(1, 3, 32, 32))
    assert found.tail == ("conv_head", "classifier")


class Pair(nn.Module):
    """Two layers in a module that takes or returns no single tensor."""

    def __init__(self, *, returns: bool) -> None:
        super().__init__()
        self.returns = returns
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        one = self.one(x)
        return (one, self.two(x)) if self.returns else self.two(one)


class Around(nn.Module):
    def __init__(self, *, returns: bool) -> None:
        super().__init__()
        self.last, self.pair, self.unused = nn.Linear(4, 2), Pair(returns=returns), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        found = self.pair(x)
        return self.last(sum(found) if isinstance(found, tuple) else found)


def test_a_module_that_returns_several_tensors_is_no_block() -> None:
    images = torch.randn(1, 4)
    assert units_of(Around(returns=False), images) == Units(("pair",), ("last",))
    assert units_of(Around(returns=True), images) == Units(("pair.one", "pair.two"), ("last",))


def test_a_sequence_is_no_block() -> None:
    images = torch.randn(1, 4)
    network = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    assert units_of(network, images) == Units(("0", "1.0"), ("1.1",))


def candidates() -> dict[str, LayerCandidates]:
    layers = {f"{number}": LayerCandidates((2, 3, 4, 6, 8), (2, 3, 4, 6, 8)) for number in range(4)}
    return {"first": LayerCandidates((8,), (8,)), **layers, "thin": LayerCandidates((4, 8), (3, 8))}


def test_low_bit_widths_are_drawn_more_often_and_half_of_the_draws_are_mixed() -> None:
    draws = Draws(candidates(), seed=0)
    names, widths = Counter(), (3, 4, 6, 8)
    for _ in range(210):
        name, config = draws.draw()
        names[name] += 1
        assert config["first"] == Bits(8, 8)
        width = int(name.removeprefix("around "))
        place = widths.index(width)
        near = set(widths[max(0, place - 1) : place + 2])
        used = {bits for path in "0123" for bits in (config[path].weight, config[path].activation)}
        assert used == {width} if name == f"{width}" else used <= near
    assert sum(names.values()) == 210
    assert {int(name.removeprefix("around ")) for name in names} == set(widths)
    of_width = {width: names[f"{width}"] + names[f"around {width}"] for width in widths}
    for width in widths:
        # 210 draws: 65, 56, 46, 40.
        share = width**-0.5 / sum(other**-0.5 for other in widths)
        assert abs(of_width[width] - 210 * share) <= 1
        assert abs(names[f"{width}"] - names[f"around {width}"]) <= 1
    again = Draws(candidates(), seed=0)
    assert [again.draw() for _ in range(9)] == [
        entry
        for draws in (Draws(candidates(), seed=0),)
        for entry in (draws.draw() for _ in range(9))
    ]


def test_two_bits_are_drawn_where_there_is_nothing_else() -> None:
    layers = {"a": LayerCandidates((2,), (2,)), "b": LayerCandidates((2,), (2, 4))}
    name, config = Draws(layers, seed=0).draw()
    assert name == "2"
    assert config["a"] == Bits(2, 2)


@pytest.mark.parametrize("unit", [1.0, 0.01])
def test_steps_are_those_of_adam_in_units(unit: float) -> None:
    torch.manual_seed(0)
    own, other = torch.randn(2, 3), torch.zeros(2, 3)
    start = own.clone()
    own.requires_grad_(), other.requires_grad_()
    optimizer = ScaledAdam()
    optimizer.add(own, torch.tensor(unit), 0.1)
    adam = torch.optim.Adam([other], lr=0.1, betas=(0.9, 0.99), eps=1e-12)
    for number in range(5):
        gradient = torch.randn(2, 3)
        own.grad, other.grad = gradient.clone(), gradient.clone()
        if number == 3:  # without a gradient it stays
            own.grad = other.grad = None
        optimizer.step(1.0)
        adam.step()
    assert torch.allclose((own - start) / unit, other, atol=1e-5)
    assert own.grad is None
    assert optimizer.parameters[0] is own


def test_a_parameter_is_pulled_back_to_where_it_started() -> None:
    optimizer = ScaledAdam(pull=0.25)
    pulled, free = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    optimizer.add(pulled, torch.ones(()), 0.1, is_pulled=True)
    optimizer.add(free, torch.ones(()), 0.1)
    pulled.grad, free.grad = -torch.ones(2), -torch.ones(2)
    optimizer.step(1.0)
    assert torch.allclose(free, torch.tensor(0.1))
    assert torch.allclose(pulled, torch.tensor(0.075))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # of torch's own, at first use
def test_a_scripted_module_takes_no_hook_and_is_passed_over() -> None:
    scripted = torch.jit.script(nn.ReLU())
    network = nn.Sequential(nn.Linear(4, 4), scripted, nn.Linear(4, 4))
    assert units_of(network, torch.randn(1, 4)) == Units(("0",), ("2",))

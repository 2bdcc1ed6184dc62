"""Weights inside the lowest bit-width's range escape weight decay, once a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import anyprec

DECAY = 0.1


def step(
    net: anyprec.ConvertedModel,
    images: Tensor,
    labels: Tensor,
    make: Any,
    *,
    decay: float,
    exempt: bool,
) -> dict[str, Tensor]:
    """Weights after one optimizer step from the same start."""
    start = {name: value.clone() for name, value in net.state_dict().items()}
    net.eval()
    optimizer = make(anyprec.param_groups(net, lr=0.05, weight_decay=decay))
    oneshot = anyprec.OneShot(net, total_steps=1, random_paths=2, seed=1)
    handle = oneshot.exempt_from_decay(optimizer) if exempt else None
    for path in oneshot.paths():
        path.loss(net(images), labels, F.cross_entropy).backward()
    optimizer.step()
    optimizer.zero_grad()
    if handle is not None:
        handle.remove()
    after = {path: layer.weight.detach().clone() for path, layer in net.quantized_layers.items()}
    net.load_state_dict(start)
    return after


@pytest.mark.parametrize(
    "make",
    [
        lambda groups: torch.optim.SGD(groups, momentum=0.9, nesterov=True),
        torch.optim.AdamW,
    ],
    ids=["sgd", "adamw"],
)
def test_weights_inside_the_lowest_range_are_not_decayed_and_those_beyond_are(
    make: Any, net: anyprec.ConvertedModel, images: Tensor, labels: Tensor
) -> None:
    with torch.no_grad():
        net.pointwise.weight[0, 0] = 5.0  # far beyond the range of 2 bits
    net.freeze({"head": (4, 2)})
    decayed = step(net, images, labels, make, decay=DECAY, exempt=False)
    plain = step(net, images, labels, make, decay=0.0, exempt=False)
    spared = step(net, images, labels, make, decay=DECAY, exempt=True)
    for path, layer in net.quantized_layers.items():
        lowest = net.frozen.get(path, layer.candidates.lowest).weight
        index = layer.candidates.weight.index(lowest)
        low, high = layer.weight_quantizer.limits(index)
        scale = (
            layer.weight_quantizer.step[index].detach().reshape(-1, *[1] * (layer.weight.ndim - 1))
        )
        inside = (layer.weight >= low * scale) & (layer.weight <= high * scale)
        expected = torch.where(inside, plain[path], decayed[path])
        torch.testing.assert_close(spared[path], expected, rtol=1e-5, atol=1e-7)
        assert not torch.equal(decayed[path], plain[path])
    assert not torch.equal(spared["pointwise"], plain["pointwise"])


def test_an_unknown_optimizer_is_asked_about(net: anyprec.ConvertedModel) -> None:
    class Own(torch.optim.Optimizer):
        pass

    oneshot = anyprec.OneShot(net, total_steps=1)
    optimizer = Own(net.parameters(), {"lr": 0.1})
    with pytest.raises(
        ValueError, match="cannot tell how Own decays weights: say decoupled=True if"
    ):
        oneshot.exempt_from_decay(optimizer)
    oneshot.exempt_from_decay(optimizer, decoupled=True)

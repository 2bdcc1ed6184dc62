"""Launches and waits of a network on the meta device, which takes the accelerator's branch.

`proxies.py` prints these counts, and tests compare them with what is demanded.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import anyprec
from anyprec.model.converted import ConvertedModel
from anyprec.searching.measuring.evaluator import Evaluator
from benchmarks.speed.operations import Launches, Waits, accepting_meta
from benchmarks.speed.small_networks import CLASSES, Pair, criterion


@dataclass(frozen=True)
class LaunchCounts:
    """Launches beyond those of the float network, for each layer; and those of a switch.

    Attributes:
        forward: In training mode.
        backward: Of the same pass.
        evaluation: Of a forward pass in eval mode, with trusted weights that are kept.
        set_bits: For the whole network, to a mixed configuration.
    """

    forward: float
    backward: float
    evaluation: float
    set_bits: int


def count_launches(pair: Pair) -> LaunchCounts:
    """The launches of a pair of networks."""
    pair = on_meta(pair)
    layers = len(pair.model.quantized_layers)
    config = mixed_config(pair.model)
    pair.model.set_bits(4)  # what is made at first use is no part of a switch
    with Launches() as switch:
        pair.model.set_bits(config)
    forward, backward = _training_launches(pair.model, pair)
    float_forward, float_backward = _training_launches(pair.network, pair)
    evaluation = _evaluation_launches(pair.model, pair.images)
    float_evaluation = _evaluation_launches(pair.network, pair.images)
    return LaunchCounts(
        forward=(forward - float_forward) / layers,
        backward=(backward - float_backward) / layers,
        evaluation=(evaluation - float_evaluation) / layers,
        set_bits=switch.count,
    )


def count_step_waits(pair: Pair) -> dict[str, int]:
    """Waits of the parts of a one-shot step, each for itself."""
    pair = on_meta(pair)
    model = pair.model.train()
    optimizer = torch.optim.SGD(anyprec.param_groups(model, lr=0.01), momentum=0.9)
    oneshot = anyprec.OneShot(model, total_steps=1)
    waits: dict[str, int] = {}

    def note(part: str, run: Callable[[], Any]) -> Any:
        with Waits() as watched:
            result = run()
        waits[part] = waits.get(part, 0) + watched.count
        return result

    config = mixed_config(model)
    note("set_bits", lambda: model.set_bits(config))
    with Waits() as whole:
        for path in oneshot.paths():
            output = note("forward", lambda: model(pair.images))
            loss = note("loss", lambda: path.loss(output, pair.labels, criterion))  # noqa: B023
            note("backward", loss.backward)
    waits["paths"] = whole.count
    oneshot.recipe.clip_gradients(optimizer)
    optimizer.step()
    note("OneShot.step", oneshot.step)
    return waits


def count_fit_waits(pair: Pair, *, steps: int) -> int:
    """Waits of `fit` in this many steps, until the weights are trained."""
    model = on_meta(pair).model
    loader = [(pair.images, pair.labels)] * steps
    with accepting_meta(), Waits() as waits:
        anyprec.fit(model, loader, epochs=1, norm_batches=0, show_progress=False)
    return waits.count


def count_evaluation_waits(pair: Pair, *, batches: int, objective: str) -> int:
    """Waits of one evaluation in a search, on this many batches."""
    model = on_meta(pair).model
    loader = [(pair.images, pair.labels)] * batches
    with accepting_meta(), Waits() as waits:
        evaluate = Evaluator(model, loader, objective)
        before = waits.count
        evaluate(mixed_config(model))
    return waits.count - before


def count_calibration_waits(pair: Pair, *, batches: int) -> dict[str, int]:
    """Waits of `calibrate`, and of `update_norms` for all precisions, on this many batches."""
    model = on_meta(pair).model
    loader = [pair.images] * batches
    with accepting_meta():
        with Waits() as calibration:
            anyprec.calibrate(model, loader)
        with Waits() as statistics:
            anyprec.update_norms(model, loader)
    return {"calibrate": calibration.count, "update_norms": statistics.count}


def on_meta(pair: Pair) -> Pair:
    """Copies of both networks without values; images and labels, too."""
    network, model = copy.deepcopy(pair.network), copy.deepcopy(pair.model)
    return Pair(
        network.to("meta"), model.to("meta"), pair.images.to("meta"), pair.labels.to("meta")
    )


def mixed_config(model: ConvertedModel) -> anyprec.BitConfig:
    """A configuration without a rule, always the same."""
    sampler = anyprec.UniformSampler()
    generator = torch.Generator().manual_seed(0)
    return sampler.draw(model.candidates, 1, generator=generator, instability={})[0]


def small_convolutions() -> Pair:
    """Two convolutions with norms and a classifier: calibration without values takes its time."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.SiLU(),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, CLASSES),
    )
    images, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    model = anyprec.convert(copy.deepcopy(network), bits=(2, 8), example_input=images)
    anyprec.calibrate(model, [images])
    return Pair(network, model, images, labels)


def _training_launches(network: nn.Module, pair: Pair) -> tuple[int, int]:
    network.train()
    # What is made at first use, and then kept, is no part of a step.
    criterion(network(pair.images), pair.labels).backward()
    network.zero_grad()
    with Launches() as forward:
        loss = criterion(network(pair.images), pair.labels)
    with Launches() as backward:
        loss.backward()
    return forward.count, backward.count


@torch.no_grad()
def _evaluation_launches(network: nn.Module, images: Tensor) -> int:
    network.eval()
    if isinstance(network, ConvertedModel):
        anyprec.trust_weights(network)
    network(images)
    with Launches() as launches:
        network(images)
    return launches.count

"""Time of the host alone: of one thread, on networks with few channels.

What a GPU waits for is the thread that asks it for operations. On networks of well-known structure
with few channels (`small_networks.py`) next to nothing else is left of a step. The time of the
thread (`time.thread_time`) does not count what other processes do meanwhile.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import nn

import anyprec
from benchmarks.speed.small_networks import Pair, criterion, make_pair

STEPS = 1_000_000
"""Of the training that a one-shot step belongs to: no event of a scheduler is near."""


@dataclass(frozen=True)
class HostTimes:
    """Seconds of the host, each the lowest tenth of many rounds, all in turn.

    Attributes:
        layers: Number of quantized layers.
        float_pass, path: Forward and backward in training mode: of the float network, of one path.
        float_evaluation, evaluation: A forward pass in eval mode.
        float_step, oneshot_step: Whole steps with clipped gradients and SGD: of the float network,
            and with a max path and three random ones.
        set_bits: A switch to another mixed configuration.
    """

    layers: int
    float_pass: float
    path: float
    float_evaluation: float
    evaluation: float
    float_step: float
    oneshot_step: float
    set_bits: float

    @property
    def microseconds_per_layer(self) -> float:
        """Of a path, beyond the float network's."""
        return 1e6 * (self.path - self.float_pass) / self.layers


def measure(pair: Pair, *, rounds: int) -> HostTimes:
    """Time both networks of a pair."""
    model, network = pair.model, pair.network
    model.set_bits(4)
    model.train(), network.train()
    float_pass, path = _lowest(
        [lambda: _train(network, pair), lambda: _train(model, pair)], rounds=rounds
    )
    model.eval(), network.eval()
    float_evaluation, evaluation = _lowest(
        [lambda: _evaluate(network, pair), lambda: _evaluate(model, pair)], rounds=rounds
    )
    switch = time_set_bits(pair, rounds=3 * rounds)
    model.train(), network.train()
    of_float, of_oneshot = _lowest(
        [_float_step(pair), oneshot_step(pair)], rounds=max(3, rounds // 3)
    )
    return HostTimes(
        layers=len(model.quantized_layers),
        float_pass=float_pass,
        path=path,
        float_evaluation=float_evaluation,
        evaluation=evaluation,
        float_step=of_float,
        oneshot_step=of_oneshot,
        set_bits=switch,
    )


def time_set_bits(pair: Pair, *, rounds: int) -> float:
    """Seconds of a switch to another mixed configuration."""
    sampler, generator = anyprec.UniformSampler(), torch.Generator().manual_seed(0)
    configs = sampler.draw(pair.model.candidates, 20, generator=generator, instability={})
    upcoming: Iterator[anyprec.BitConfig] = cycle(configs)
    return _lowest([lambda: pair.model.set_bits(next(upcoming))], rounds=rounds)[0]


def measure_network(name: str, *, rounds: int) -> HostTimes:
    """Time a small network, by its name in `small_networks`."""
    return measure(make_pair(name), rounds=rounds)


def _train(network: nn.Module, pair: Pair) -> None:
    criterion(network(pair.images), pair.labels).backward()
    network.zero_grad()


@torch.inference_mode()
def _evaluate(network: nn.Module, pair: Pair) -> None:
    network(pair.images)


def _float_step(pair: Pair) -> Callable[[], None]:
    parameters = list(pair.network.parameters())
    optimizer = torch.optim.SGD(parameters, lr=1e-6, momentum=0.9, nesterov=True)
    clip = anyprec.Recipe().clip_gradients

    def step() -> None:
        criterion(pair.network(pair.images), pair.labels).backward()
        clip(optimizer)
        optimizer.step()
        optimizer.zero_grad()

    return step


def oneshot_step(pair: Pair) -> Callable[[], None]:
    """A whole one-shot step of the converted network, with clipped gradients and SGD."""
    groups = anyprec.param_groups(pair.model, lr=1e-6)
    optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    oneshot = anyprec.OneShot(pair.model, total_steps=STEPS)

    def step() -> None:
        for path in oneshot.paths():
            path.loss(pair.model(pair.images), pair.labels, criterion).backward()
        oneshot.recipe.clip_gradients(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        oneshot.step()

    return step


def _lowest(calls: list[Callable[[], None]], *, rounds: int) -> list[float]:
    """For each call the lowest tenth of its times; the calls are made in turn."""
    times: list[list[float]] = [[] for _ in calls]
    for number in range(rounds + 2):
        for call, measured in zip(calls, times, strict=True):
            start = time.thread_time()
            call()
            elapsed = time.thread_time() - start
            if number > 1:  # the first rounds warm up
                measured.append(elapsed)
    return [statistics.quantiles(measured, n=10)[0] for measured in times]

"""Trains in one process or in several, on the same images: what a test compares.

One process trains on the joined batches, each of several on its share of every batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import anyprec
from anyprec.training.parameters import unused_parameters


class Network(nn.Module):
    """Convolutions, with BatchNorm or with a norm that looks at one image only."""

    def __init__(self, *, batch_norm: bool) -> None:
        super().__init__()
        norm = nn.BatchNorm2d if batch_norm else lambda channels: nn.GroupNorm(2, channels)
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3),
            norm(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 3, groups=8),
            norm(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 1),
            norm(8),
            nn.ReLU(),
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean(dim=(2, 3)))


RECIPE = anyprec.Recipe(
    feature_weight=0.01,
    error_weight=0.1,
    error_start=0.0,
    sampler="instability",
    weight_decay=1e-3,
    spare_decay=True,
    scheduler=anyprec.BitWidthScheduler(start=0.1, period=0.3, first_ratio=0.7),
    lr=0.05,
    ema_decay=0.5,
)


def share(batches: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """This process's part of every batch."""
    if not dist.is_initialized():
        return batches
    rank, count = dist.get_rank(), dist.get_world_size()
    return [(images.chunk(count)[rank], labels.chunk(count)[rank]) for images, labels in batches]


def make(*, batch_norm: bool) -> tuple[anyprec.ConvertedModel, list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    batches = [(torch.randn(8, 3, 10, 10).double(), torch.randint(3, (8,))) for _ in range(4)]
    # In float64 a sum in another order flips no rounding.
    network = Network(batch_norm=batch_norm).double()
    model = anyprec.convert(network, bits=(2, 4, 8), example_input=batches[0][0][:1])
    return model.double(), batches


def own_loop(model: anyprec.ConvertedModel, batches: list[tuple[Tensor, Tensor]]) -> int:
    """A user's loop under DDP; returns how often gradients were reduced."""
    network, reductions = model, 0
    if dist.is_initialized():
        network = nn.parallel.DistributedDataParallel(model)

        def count(_state, bucket):
            nonlocal reductions
            reductions += bucket.is_last()
            work = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
            return work.get_future().then(lambda future: future.value()[0])

        network.register_comm_hook(None, count)
    optimizer = torch.optim.SGD(anyprec.param_groups(model, lr=0.05), lr=0.05)
    oneshot = anyprec.OneShot(model, total_steps=2 * len(batches), feature_weight=0.01)
    model.train()
    for images, labels in 2 * batches:
        for path in oneshot.paths():
            if path.is_last or network is model:
                path.loss(network(images), labels, nn.functional.cross_entropy).backward()
            else:
                with network.no_sync():
                    path.loss(network(images), labels, nn.functional.cross_entropy).backward()
        optimizer.step()
        optimizer.zero_grad()
        oneshot.step()
    return reductions


def sharded_loop(
    model: anyprec.ConvertedModel, batches: list[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """A user's loop with parameters sharded over the processes (FSDP2); returns the whole state."""
    if dist.is_initialized():
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.SGD(anyprec.param_groups(model, lr=0.05, weight_decay=1e-3), lr=0.05)
    steps = 2 * len(batches)
    oneshot = anyprec.OneShot(model, total_steps=steps, recipe=RECIPE, sampler="sandwich")
    oneshot.exempt_from_decay(optimizer)
    model.train()
    for images, labels in 2 * batches:
        for path in oneshot.paths():
            path.loss(model(images), labels, nn.functional.cross_entropy).backward()
        optimizer.step()
        optimizer.zero_grad()
        oneshot.step()
    state = model.state_dict()
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).clone()
        for name, value in state.items()
    }


def prepare() -> tuple[anyprec.ConvertedModel, list[tuple[Tensor, Tensor]]]:
    """A network calibrated by one process on everything: all runs start from its step sizes."""
    model, batches = make(batch_norm=False)
    anyprec.calibrate(model, batches)
    return model, batches


def train(
    calibrated: anyprec.ConvertedModel, batches: list[tuple[Tensor, Tensor]], *, result: Path
) -> None:
    """Train in several ways, and write what came out to a file, by the first process."""
    outcome: dict[str, Any] = {}
    for name in ("group norm", "batch norm"):
        model = calibrated
        if name == "batch norm":
            model, batches = make(batch_norm=True)
            anyprec.calibrate(model, share(batches))
        outcome[f"{name}, calibrated"] = clone(model)
        history = anyprec.fit(model, share(batches), epochs=3, recipe=RECIPE, seed=3)
        outcome[name] = clone(model)
        outcome[f"{name}, frozen"] = {path: str(bits) for path, bits in model.frozen.items()}
        outcome[f"{name}, losses"] = history[-1].losses
        anyprec.update_norms(model, share(batches), 2)
        (statistics,) = model.anyprec_record.statistics.values()
        outcome[f"{name}, statistics"] = statistics
    model, batches = make(batch_norm=True)
    anyprec.calibrate(model, batches)
    assert unused_parameters(model)
    outcome["reductions"] = own_loop(model, share(batches))
    outcome["own loop"] = clone(model)
    model, batches = make(batch_norm=False)
    model.load_state_dict(outcome["group norm, calibrated"])
    outcome["sharded"] = sharded_loop(model, share(batches))
    if dist.is_initialized():
        first, second = gather(outcome)
        outcome["agreement"] = {name: equal(first[name], second[name]) for name in first}
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(outcome, result)


def gather(outcome: dict[str, Any]) -> list[dict[str, Any]]:
    """What every process has, in the order of their ranks."""
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, outcome)
    return outcomes


def clone(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(left: Any, right: Any) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(
            equal(value, right[name]) for name, value in left.items()
        )
    if isinstance(left, tuple):
        return len(left) == len(right) and all(map(equal, left, right))
    return torch.equal(left, right) if isinstance(left, Tensor) else left == right

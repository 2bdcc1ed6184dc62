"""A training run that a test kills: with dropout, shuffling and random augmentation.

So every random generator matters.
"""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import anyprec


class Images(Dataset):
    """Random images, shifted and dimmed at random whenever they are read."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.labels = torch.randint(3, (30,), generator=generator)
        self.images = torch.randn(30, 3, 12, 12, generator=generator)
        self.images[torch.arange(30), self.labels] += 1.0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self.images[index].roll(random.randrange(3), dims=2) * np.random.uniform(0.8, 1.0)
        return image + 0.1 * torch.randn(3, 12, 12), int(self.labels[index])


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 8),
        nn.ReLU(),
        nn.Linear(8, 3),
    )


def train(snapshot: Path, result: Path, kill_at: int | None, own_generator: bool) -> None:
    """Train, and kill the process, like a power cut, before the last pass of step `kill_at`."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = anyprec.convert(network(), bits=(2, 4, 8), example_input=torch.randn(1, 3, 12, 12))
    generator = torch.Generator().manual_seed(5) if own_generator else None
    loader = DataLoader(Images(), batch_size=6, shuffle=True, generator=generator)
    calls = 0

    def criterion(output: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if kill_at is not None and calls == 3 * kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return nn.functional.cross_entropy(output, targets)

    recipe = anyprec.Recipe(
        random_paths=2,
        feature_weight=0.01,
        error_weight=0.1,
        sampler="instability",
        ema_decay=0.9,
        spare_decay=True,
        scheduler=anyprec.BitWidthScheduler(start=0.1, period=0.1, first_ratio=0.7),
        weight_decay=1e-3,
        step_lr=1e-3,
    )
    drawn: list[float] = []
    history = anyprec.fit(
        model,
        loader,
        epochs=3,
        recipe=recipe,
        criterion=criterion,
        accumulation=1,
        snapshot=snapshot,
        snapshot_steps=2,
        on_epoch_end=lambda _: drawn.append(float(torch.rand(()))),
        norm_batches=2,
    )
    state = {
        "model": dict(model.state_dict()),
        "losses": [record.losses for record in history],
        "floors": model.frozen,
    }
    state["after"] = torch.rand(3)
    torch.save(state, result)

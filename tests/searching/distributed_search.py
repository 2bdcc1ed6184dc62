"""Searches in one process or in several, on the same images: what a test compares."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import anyprec

Batches = list[tuple[torch.Tensor, torch.Tensor]]


def prepare() -> tuple[anyprec.ConvertedModel, Batches]:
    """A small calibrated network and its images."""
    torch.manual_seed(0)
    hidden = [nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.ReLU()]
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), *hidden, nn.Flatten(), nn.Linear(96, 4)
    )
    batches = [(torch.randn(size, 3, 8, 8), torch.randint(4, (size,))) for size in (5, 4, 7)]
    model = anyprec.convert(net, bits=(2, 3, 4, 8), example_input=batches[0][0])
    anyprec.calibrate(model, batches)
    return model, batches


def search(model: anyprec.ConvertedModel, batches: Batches, *, folder: Path) -> None:
    """Search, and write what each process found."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    for objective in ("loss", "error", "divergence"):
        result = anyprec.search(
            model,
            batches,
            "W3A3",
            objective=objective,
            max_seconds=1000,
            resume=folder / f"{objective}.jsonl",
            report_loader=batches,
        )
        result.save(folder / f"{objective}-{rank}.json")
    if dist.is_initialized():
        interrupted(model, batches, folder)


def interrupted(model: anyprec.ConvertedModel, batches: Batches, folder: Path) -> None:
    """The second process alone gets a Ctrl-C; the search goes on from its file afterwards."""
    calls = 0

    def output(model: nn.Module) -> float:
        nonlocal calls
        calls += 1
        if calls == 7 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return sum(float(model(images).square().mean()) for images, _ in batches)

    for name in ("stopped", "resumed"):
        result = anyprec.search(
            model, batches, "W3A3", objective=output, resume=folder / "interrupted.jsonl"
        )
        result.save(folder / f"{name}-{dist.get_rank()}.json")

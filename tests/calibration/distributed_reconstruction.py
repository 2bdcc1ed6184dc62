"""A reconstruction by several processes, each with its own images."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import anyprec
from anyprec.runtime.processes import process_rank


def prepare() -> tuple[anyprec.ConvertedModel, list[torch.Tensor]]:
    """A calibrated network and batches."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.Flatten(), nn.Linear(96, 3)),
    )
    batches = [torch.randn(8, 3, 8, 8) for _ in range(4)]
    model = anyprec.convert(net.eval(), bits=(3, 4, 8), example_input=batches[0][:1])
    anyprec.calibrate(model, batches)
    return model, batches


def reconstruct(model: anyprec.ConvertedModel, batches: list[torch.Tensor], folder: Path) -> None:
    """Reconstruct on every other batch, and write the state of each process."""
    rank, own = process_rank(), []
    for batch in batches[rank::2]:
        # Batches of other sizes, so that one has more of them.
        own += batch.split(8 - 4 * rank)
    anyprec.reconstruct(model, own, steps=4, show_progress=False)
    torch.save(model.state_dict(), folder / f"reconstructed-{rank}.pt")

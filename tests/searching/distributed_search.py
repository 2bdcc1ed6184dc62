"""Searches in one process or in several, on the same images: what a test compares.

python distributed_search.py FOLDER                                 one process
torchrun --nproc-per-node 2 distributed_search.py FOLDER            every process runs its share of the batches
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import anyprec


def main() -> None:
    """Search, and write what each process found."""
    torch.manual_seed(0)
    hidden = [nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.ReLU()]
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), *hidden, nn.Flatten(), nn.Linear(96, 4)
    )
    batches = [(torch.randn(size, 3, 8, 8), torch.randint(4, (size,))) for size in (5, 4, 7)]
    model = anyprec.convert(net, bits=(2, 3, 4, 8), example_input=batches[0][0])
    anyprec.calibrate(
        model, batches
    )  # before there are several processes: the same network everywhere
    several = "RANK" in os.environ
    if several:
        dist.init_process_group("gloo")
    folder = Path(sys.argv[1])
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
        result.save(folder / f"{objective}-{dist.get_rank() if several else 0}.json")
    if several:
        interrupted(model, batches, folder)
        dist.destroy_process_group()


def interrupted(
    model: anyprec.ConvertedModel, batches: list[tuple[torch.Tensor, torch.Tensor]], folder: Path
) -> None:
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


if __name__ == "__main__":
    main()

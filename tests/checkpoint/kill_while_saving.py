"""Kills a process that saves, at random moments, and loads the file each time. Run by `test_killed.py`.

    python kill_while_saving.py FOLDER training|packed KILLS

Processes are forks of this one, so that none has to import torch. Prints the number of different networks that were found,
of which there must be two, and of temporary files that were left behind: kills that met a write.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

import anyprec


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 256, 3, padding=1)
    ).eval()


def make(seed: int) -> anyprec.ConvertedModel:
    torch.manual_seed(seed)
    images = torch.randn(2, 3, 8, 8)
    model = anyprec.convert(network(), bits=(2, 8), first_last_bits=None, example_input=images[:1])
    anyprec.calibrate(model, [images])
    return model


def main(folder: Path, *, packed: bool, kills: int) -> None:
    torch.set_num_threads(1)
    path, models, found, draw = folder / "net", [make(0), make(1)], set(), random.Random(0)
    anyprec.save(models[0], path, packed=packed)
    for _ in range(kills):
        child = os.fork()
        if child == 0:
            while True:
                for model in models:
                    anyprec.save(model, path, packed=packed)
        time.sleep(draw.uniform(0, 0.15))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL, "saving failed by itself"
        loaded = anyprec.load(path, network())
        loaded.set_bits(2)
        with torch.no_grad():
            found.add(float(loaded(torch.ones(1, 3, 8, 8)).sum()))
    sys.stdout.write(f"{len(found)} {len(list(folder.glob('.anyprec-*.tmp')))}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), packed=sys.argv[2] == "packed", kills=int(sys.argv[3]))
